"""Ranks (numbers of dimensions) of values, inferred only when somebody asks for one.

Shapes that a file notes beside its values are not believed: exporters and editors leave wrong ones, which runtimes pass
over. Believed are the inputs of the main graph, to which runtimes hold their callers, and what follows from them.
"""

from __future__ import annotations

import logging
from functools import cached_property

import onnx
import onnx_ir as ir

from onnx_woq.graph.io.model import Model, structure

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of a model's values: from its inputs and constants, by ONNX shape inference, run once."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def of(self, value: ir.Value | None) -> int | None:
        """Returns the rank of `value`, None if it cannot be known."""
        if value is None:
            return None
        given = value.is_graph_input() and value.graph is self._model.ir.graph
        if value.shape is not None and (given or value.const_value is not None):
            return len(value.shape)
        return self._inferred.get(value.name or "")

    @cached_property
    def _inferred(self) -> dict[str, int]:
        proto = structure(self._model)
        _forget_shapes(proto.graph)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto)
        except Exception as error:  # of many types, for operators it does not know; ranks only add to what is quantized
            logger.info("shape inference failed: %s", error)
            return {}
        ranks: dict[str, int] = {}
        _collect(inferred.graph, ranks)
        return ranks


def _forget_shapes(graph: onnx.GraphProto, *, is_body: bool = False) -> None:
    """Removes the shapes that a graph and its bodies note for their values, except those of the main graph's inputs."""
    del graph.value_info[:]
    for info in (*graph.output, *(graph.input if is_body else ())):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for body in _bodies(graph):
        _forget_shapes(body, is_body=True)


def _collect(graph: onnx.GraphProto, ranks: dict[str, int]) -> None:
    for info in (*graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            ranks[info.name] = len(info.type.tensor_type.shape.dim)
    for body in _bodies(graph):
        _collect(body, ranks)


def _bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
