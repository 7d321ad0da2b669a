"""Ranks (numbers of dimensions) of values, inferred only when somebody asks for one that the file does not say."""

from __future__ import annotations

import logging
from functools import cached_property

import onnx
import onnx_ir as ir

from onnx_woq.graph.io.model import Model, structure

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of a model's values: from the file where it says so, else by ONNX shape inference, run once."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def of(self, value: ir.Value | None) -> int | None:
        """Returns the rank of `value`, None if it cannot be known."""
        if value is None:
            return None
        if value.shape is not None:
            return len(value.shape)
        return self._inferred.get(value.name or "")

    @cached_property
    def _inferred(self) -> dict[str, int]:
        try:
            inferred = onnx.shape_inference.infer_shapes(structure(self._model))
        except Exception as error:  # of many types, for operators it does not know; ranks only add to what is quantized
            logger.info("shape inference failed: %s", error)
            return {}
        ranks: dict[str, int] = {}
        _collect(inferred.graph, ranks)
        return ranks


def _collect(graph: onnx.GraphProto, ranks: dict[str, int]) -> None:
    for info in (*graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            ranks[info.name] = len(info.type.tensor_type.shape.dim)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _collect(attribute.g, ranks)
