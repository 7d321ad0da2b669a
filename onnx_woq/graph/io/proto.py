"""Conversion between protobuf and the graph in memory, without copies of what is only read.

Every function here pauses Python's garbage collector, which would take half of the time: it searches all objects of the
graph made so far again and again, and none of them is garbage.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import onnx
import onnx_ir as ir

from onnx_woq.core.cpu import no_garbage_search
from onnx_woq.graph.io.interface import interfaces_restored

__all__ = ["copy_structure", "from_proto", "to_proto"]


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Returns the model that `proto` describes; raises the errors of onnx_ir as they are."""
    with no_garbage_search():
        return ir.from_proto(proto)


def to_proto(
    model: ir.Model,
    tensors: Mapping[str, ir.TensorProtocol] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    ir_version: int | None = None,
) -> onnx.ModelProto:
    """Returns `model` as protobuf, some of its tensors exchanged on the way.

    The model is neither copied nor changed, which takes a third of the time of cloning it to exchange the tensors.

    Args:
        model: the model.
        tensors: data to write for initializers of the main graph, by name, in place of their own. Large ones are given
            as `ir.ExternalTensor`, of which only the place in a file is written.
        metadata: properties to add to the model's own.
        ir_version: the version to write in place of the model's own.
    """
    graph, tensors = model.graph, tensors or {}
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=graph,
        initializers=[
            _holding(value, tensors[name]) if name in tensors else value for name, value in graph.initializers.items()
        ],
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    whole = copy(model)
    whole.graph = view  # type: ignore[assignment]  # documented at GraphView
    whole.ir_version = ir_version or model.ir_version
    with no_garbage_search(), interfaces_restored(graph):
        proto = ir.to_proto(whole)
    if metadata:
        onnx.helper.set_model_props(proto, {**model.metadata_props, **metadata})
    return proto


def copy_structure(model: ir.Model) -> ir.Model:
    """Returns a copy of the graph that shares the tensors."""
    with no_garbage_search():
        return model.clone()


def _holding(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """Returns a value like `value` with the data `tensor`; `value` itself stays in its graph."""
    other = ir.Value(
        name=value.name,
        type=value.type,
        shape=value.shape,
        doc_string=value.doc_string,
        const_value=tensor,
        metadata_props=value.metadata_props,
    )
    other.meta.update(value.meta)
    return other
