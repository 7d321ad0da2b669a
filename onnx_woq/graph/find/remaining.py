"""Every other constant that takes a share of a model's bytes: weights that no product or table of a plan accounts for.

A convolution, a recurrent layer, a fused attention or an operator of somebody else has weights as well. A user who
wonders where the bytes stayed has to find them among what stays float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_woq.graph.edit import LARGE, is_large
from onnx_woq.graph.find.constants import FLOATS, resolve
from onnx_woq.graph.find.embeddings import SMALLEST_TABLE, Embedding
from onnx_woq.graph.find.linears import LinearGroup, Skipped
from onnx_woq.graph.find.quantized import LOW_BIT_OPS
from onnx_woq.graph.io.model import Model

ALREADY = "quantized already"
"""Part of the reason of everything that is low-bit and not float."""

_SHARE = 1000  # of the bytes of the files: a constant that takes less than one part is not listed by itself

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


def account(
    model: Model,
    groups: Iterable[LinearGroup],
    tables: Iterable[Embedding],
    skipped: Sequence[Skipped],
    file_bytes: int,
) -> list[Skipped]:
    """Returns what stays as it is, so that each stored byte of a listed constant counts once.

    These are `skipped`, each with the bytes that are counted elsewhere already, and after them the nodes that read any
    other constant of at least a thousandth of the files.

    Args:
        model: the float model.
        groups: the linear groups that are quantized.
        tables: the tables that are quantized.
        skipped: the products and tables that stay float.
        file_bytes: the bytes of the model's files.
    """
    roots = [linear.root for group in groups for linear in group.linears] + [table.root for table in tables]
    counted = {_place(root.const_value) for root in roots if root.const_value is not None}
    nodes = {_name(node): node for node in _nodes(model)}
    found = []
    for row in skipped:
        tensors = dict(_constants(nodes[row.name])) if row.name in nodes else {}
        again = sum(tensor.nbytes for place, tensor in tensors.items() if place in counted)
        found.append(replace(row, again=min(again, row.weight_bytes)))
        counted.update(tensors)
    least = max(LARGE, file_bytes // _SHARE)
    listed = {row.name for row in skipped}
    for node in _nodes(model):
        mine = {p: t for p, t in _direct(node) if p not in counted and t.nbytes >= least}
        if mine and _name(node) not in listed:
            counted.update(mine)
            size = sum(tensor.nbytes for tensor in mine.values())
            reason = _reason(node, max(mine.values(), key=lambda tensor: tensor.nbytes))
            found.append(Skipped(_name(node), node.name or "", node.op_type, reason, size))
    return found + [
        Skipped(name, "", "", "no node reads it", tensor.nbytes)
        for name, tensor in _initializers(model)
        if tensor.nbytes >= least and _place(tensor) not in counted
    ]


def _reason(node: ir.Node, tensor: ir.TensorProtocol) -> str:
    if node.op_type in LOW_BIT_OPS or node.op_type == "DequantizeLinear":
        return ALREADY
    if tensor.dtype not in FLOATS:
        return f"numbers of type {tensor.dtype.name.lower()}"
    if len(tensor.shape) < 2:
        return "a vector, such as a bias or the scale of a norm"
    if node.op_type in _PRODUCTS:
        return "a second constant of a product"
    if node.op_type == "Gather" and not node.domain:
        if len(tensor.shape) > 2:
            return f"a table with {len(tensor.shape)} dimensions, not 2"
        return f"a table of less than {SMALLEST_TABLE >> 10} KiB, which would save next to nothing"
    return f"{node.op_type} is not quantized: only MatMul, Gemm and the tables of Gather are"


def _name(node: ir.Node) -> str:
    return next((value.name for value in node.outputs if value.name), node.name or "")


def _nodes(model: Model) -> Iterator[ir.Node]:
    yield from model.ir.graph.all_nodes()
    for function in model.ir.functions.values():
        yield from function.all_nodes()


def _initializers(model: Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in model.ir.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def _constants(node: ir.Node) -> Iterator[tuple[object, ir.TensorProtocol]]:
    """Yields the constants that a product or Gather reads as `Skipped.weight_bytes` counts them."""
    for value in node.inputs[:2] if node.op_type in _PRODUCTS else node.inputs[:1]:
        if (constant := resolve(value)) is not None:
            yield _place(constant.tensor), constant.tensor


def _direct(node: ir.Node) -> Iterator[tuple[object, ir.TensorProtocol]]:
    """Yields the large constants that a node reads itself, or holds."""
    for value in node.inputs:
        tensor = value.const_value if value is not None and value.is_initializer() else None
        if tensor is not None and is_large(tensor):
            yield _place(tensor), tensor
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref() and is_large(attribute.value):
            yield _place(attribute.value), attribute.value


def _place(tensor: ir.TensorProtocol) -> object:
    """Returns a key that is equal for tensors that are the same bytes of a file, or the same object."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.nbytes)
    return id(tensor)
