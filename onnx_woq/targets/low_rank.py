"""Low-rank factors beside a quantized weight: two thin MatMulNBits and an Add, `y = x·Ŵ + (x·A)·B`.

A is of the activation and B of the weight: sites that read one activation share `x·A`, sites that share a weight B.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_woq.core.refine.low_rank import GRID
from onnx_woq.graph.edit import fresh_name, graph_of, insert_after
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.matmulnbits import (
    DOMAIN,
    Packed,
    add_packed,
    attributes_of,
    lower_group,
    packed_bytes,
    weight_places,
)


def factor_shapes(group: LinearGroup) -> list[tuple[int, int]]:
    """`[K, r]` of the first factor of a tap and `[r, n]` of the second for each distinct weight; none at rank 0."""
    return [(group.k, group.rank), *((group.rank, part.n) for part in group.weight_sources())] if group.rank else []


def group_bytes(group: LinearGroup) -> int:
    """Bytes that a tap takes once quantized: its weights, and what is added to them and to their outputs."""
    factors = sum(packed_bytes(k, n, GRID, group.scale_dtype) for k, n in factor_shapes(group))
    bias = group.n * np.dtype(group.kernel_dtype).itemsize if group.corrected else 0
    return packed_bytes(group.k, group.n, group.spec, group.scale_dtype, dense=group.dense) + factors + bias


def lower_compensated(
    model: Model,
    group: LinearGroup,
    packed: Sequence[Packed],
    factors: Sequence[Packed],
    *,
    accuracy_level: int,
    bias: Sequence[np.ndarray] = (),
) -> None:
    """Rewrites every site of `tap` as `lower_tap` does, and adds the product with the factors to what each makes.

    The value that a site made keeps its name and is now that of the Add.

    Args:
        model: the model `tap` was found in.
        tap: every site of it is rewritten.
        packed: its distinct weights, in order.
        factors: A, then B of each weight; none if empty.
        accuracy_level: of all products.
        bias: see `lower_tap`.
    """
    name, places = group.linears[0].weight_name, weight_places(group)
    weights = [group.linears[places.index(index)].weight_name for index in range(len(packed))]
    lower_group(model, group, packed, accuracy_level=accuracy_level, bias=bias)
    if not factors:
        return
    down, *ups = factors
    dtype = group.linears[0].dtype
    first = add_packed(model, f"{name}_down_Q{down.width}", down, dtype)
    second = [add_packed(model, f"{w}_up_Q{up.width}", up, dtype) for w, up in zip(weights, ups, strict=True)]
    thin: dict[tuple[int, int], ir.Value] = {}
    for linear, index in zip(group.linears, places, strict=True):
        activation, graph = linear.node.inputs[0], graph_of(linear.node)
        key = (id(activation), id(graph))  # what is computed in one branch of an If is not there in another
        if key not in thin:
            thin[key] = _product(linear.node, activation, f"{linear.name}_down", down, first, accuracy_level)
        addend = _product(linear.node, thin[key], f"{linear.name}_up", ups[index], second[index], accuracy_level)
        insert_after(linear.node, "Add", [addend], "uncompensated")


def _product(
    before: ir.Node,
    activation: ir.Value | None,
    name: str,
    packed: Packed,
    stored: Sequence[ir.Value | None],
    accuracy_level: int,
) -> ir.Value:
    """A new MatMulNBits of the activation with a factor, in front of a node that makes values of the same type."""
    graph = graph_of(before)
    out = ir.Value(name=fresh_name(graph, name), type=before.outputs[0].type)
    inputs = [activation, *stored]
    while inputs[-1] is None:
        inputs.pop()
    attributes = attributes_of(packed, accuracy_level)
    node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=DOMAIN, outputs=[out], name=out.name)
    graph.insert_before(before, node)
    return out
