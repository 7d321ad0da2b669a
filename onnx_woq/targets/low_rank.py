"""Low-rank factors beside a quantized weight: two thin products and an Add, `y = x·Ŵ + (x·A)·B`.

`A [K, r]` belongs to the activation and `B [r, N]` to the weight: linears that read one activation share the product
`x·A`, and linears that read one weight share B. Both factors are quantized.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_woq.core.refine.low_rank import GRID
from onnx_woq.graph.edit import graph_of, insert_after
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.base import LinearOperator, Packed


def factor_dims(group: LinearGroup, rank: int) -> list[tuple[int, int]]:
    """Returns (K, r) of the first factor of a linear group, then (r, n) of each weight's second; none at rank 0."""
    return [(group.k, rank), *((rank, weight.n) for weight in group.weight_sources())] if rank else []


def lower_compensated(
    model: Model,
    group: LinearGroup,
    packed: Sequence[Packed],
    factors: Sequence[Packed],
    operator: LinearOperator,
    *,
    accuracy_level: int,
    bias: Sequence[np.ndarray] = (),
) -> None:
    """Rewrites every linear of a group in place, and adds the product with the factors to its output.

    The output value of a linear keeps its name and is now that of the Add.

    Args:
        model: the model that holds the group.
        group: the linear group.
        packed: its distinct weights, in order.
        factors: A, then B of each weight; without any, this is the operator's `lower`.
        operator: writes weights and factors.
        accuracy_level: 4 computes all products with int8 activations where the operator can, 0 in float.
        bias: float32 `[n]` for each weight, to be added to its outputs; none if empty.
    """
    name, indices = group.linears[0].weight_name, group.weight_indices()
    weights = [group.linears[indices.index(index)].weight_name for index in range(len(packed))]
    operator.lower(model, group, packed, accuracy_level=accuracy_level, bias=bias)
    if not factors:
        return
    down, *ups = factors
    dtype = group.linears[0].dtype
    first = operator.store(model, f"{name}_down_Q{GRID.bits}", down, dtype)
    second = [operator.store(model, f"{w}_up_Q{GRID.bits}", up, dtype) for w, up in zip(weights, ups, strict=True)]
    thin: dict[tuple[int, int], ir.Value] = {}
    for linear, index in zip(group.linears, indices, strict=True):
        activation, graph = linear.node.inputs[0], graph_of(linear.node)
        key = (id(activation), id(graph))  # a value that one branch of an If computes does not exist in the other
        if key not in thin:
            thin[key] = operator.multiply(linear.node, activation, f"{linear.name}_down", down, first, accuracy_level)
        addend = operator.multiply(
            linear.node, thin[key], f"{linear.name}_up", ups[index], second[index], accuracy_level
        )
        insert_after(linear.node, "Add", [addend], "uncompensated")
