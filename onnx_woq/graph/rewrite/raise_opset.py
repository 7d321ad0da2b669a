"""Conversion of a model to a newer opset by ONNX's version converter; the weights stay where they are.

The *opset* is the version of the ONNX operators that a model is written for. Low-bit types and some operators need a
newer one than many exporters write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx
from onnx import version_converter
from onnx_ir.passes.common import InlinePass

from onnx_woq.errors import ModelError
from onnx_woq.graph.io.model import Model, clone, finish, structure
from onnx_woq.graph.io.proto import from_proto

_ASIDE = "onnx_woq.aside"  # the domain of operators unknown to the converter, meanwhile: it leaves other domains alone
_NOT_CONVERTED = ("GroupNormalization",)  # opset 21 changed it, and the converter does not


def raise_opset(model: Model, opset: int, *, otherwise: str = "") -> Model:
    """Returns a copy of `model` in a newer opset that computes the same; names of values and nodes stay.

    Args:
        model: stays as it is.
        opset: the opset of the copy, newer than that of the model.
        otherwise: what a user who cannot export the model anew may do instead, for the message of the error.

    Raises:
        ModelError: the version converter cannot convert the model.
    """
    source = clone(model)
    if source.ir.functions:
        InlinePass()(source.ir)  # the converter drops functions
    proto = structure(source)
    nodes = list(_nodes(proto.graph))
    if stuck := next((node.op_type for node in nodes if node.op_type in _NOT_CONVERTED and not node.domain), None):
        raise _refused(model, opset, f"the converter does not convert {stuck}", otherwise)
    props = {node.output[0]: list(node.metadata_props) for node in nodes if node.metadata_props and node.output}
    for node in nodes:
        if not node.domain and not onnx.defs.has(node.op_type, ""):
            node.domain = _ASIDE
    proto.opset_import.add(domain=_ASIDE, version=1)
    try:
        new = version_converter.convert_version(proto, opset)
    except Exception as error:  # RuntimeError, ConvertError, IndexError: they have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refused(model, opset, reason, otherwise) from error
    for node in _nodes(new.graph):
        if node.domain == _ASIDE:
            node.domain = ""
        node.metadata_props.extend(props.get(node.output[0] if node.output else "", []))
    for graph in _graphs(new.graph):
        del graph.value_info[:]  # the converter inferred these
    for index in reversed([i for i, one in enumerate(new.opset_import) if one.domain == _ASIDE]):
        del new.opset_import[index]
    raised = from_proto(new)
    for name, value in source.ir.graph.initializers.items():
        raised.graph.initializers[name].const_value = value.const_value
    oldest = onnx.helper.find_min_ir_version_for(list(new.opset_import), ignore_unknown=True)
    raised.ir_version = max(model.ir.ir_version, oldest)
    return finish(replace(model, ir=raised))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(body)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    return (node for one in _graphs(graph) for node in one.node)


def _refused(model: Model, opset: int, reason: str, otherwise: str) -> ModelError:
    way = f", or {otherwise}" if otherwise else ""
    return ModelError(f"{model.path} cannot be raised to opset {opset} ({reason}): export it with opset {opset}{way}")
