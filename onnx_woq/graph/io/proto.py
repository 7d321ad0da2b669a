"""Between protobuf and the graph in memory, without copying what is only looked at."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import onnx
import onnx_ir as ir

from onnx_woq.core.cpu import no_garbage_search

__all__ = ["copied", "from_proto", "to_proto"]


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The graph that `proto` describes; raises whatever onnx_ir meets."""
    with no_garbage_search():
        return ir.from_proto(proto)


def to_proto(
    model: ir.Model,
    tensors: Mapping[str, ir.TensorProtocol] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    ir_version: int | None = None,
) -> onnx.ModelProto:
    """`model` as protobuf, with `tensors` in place of the main graph's initializers of those names.

    `metadata` is added to the model's own, `ir_version` replaces it.

    What is large comes as `ir.ExternalTensor`, which is written as its place in a file; `model` itself is neither
    copied nor changed. That costs a third of cloning it to exchange its tensors.
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
    with no_garbage_search():
        proto = ir.to_proto(whole)
    if metadata:
        onnx.helper.set_model_props(proto, {**model.metadata_props, **metadata})
    return proto


def copied(model: ir.Model) -> ir.Model:
    """A copy of the structure; the tensors are shared."""
    with no_garbage_search():
        return model.clone()


def _holding(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """As `value`, which stays in its graph, with other data."""
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
