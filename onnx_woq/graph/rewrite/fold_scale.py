"""Divide an activation by a vector, in the weights of what makes it wherever that is exact.

AWQ scales the input channels of a weight by s and divides its input by s (Lin et al. 2023, eq. 4): `(x / s) @ (s W)`.
The division costs nothing where x comes from something that ends in numbers of its own per channel: a norm's scale and
bias, a product with a constant, the output channels of a linear layer that has been quantized already, whose scales
they are. `_makers` finds those numbers; only if every reader of x is part of the tap may they change. The weight of a
linear layer that stays float is never touched: whoever left it out expects to find it as it was.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, fresh_name, graph_of, prune
from onnx_woq.graph.find.constants import FLOATS, Constant, resolve
from onnx_woq.graph.find.linears import LinearGroup

# (domain, operator) -> inputs that scale and shift the normalized value, and only it.
_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2,),
    ("com.microsoft", "EmbedLayerNormalization"): (5, 6),
}
_LAST, _FIRST = -1, 0  # the axis of a constant along which the channels lie


@dataclass(frozen=True)
class _Maker:
    """A constant that every channel of an activation is proportional to.

    Attributes:
        node: reads it.
        index: of the input.
        constant: what it reads.
        axis: of the constant, along which the channels lie.
        inverse: the activation is divided by it, so it is to be multiplied.
        linear: it is part of a linear layer rather than of a norm.
    """

    node: ir.Node
    index: int
    constant: Constant
    axis: int = _LAST
    inverse: bool = False
    linear: bool = False


def can_fold(group: LinearGroup) -> bool:
    """Whether the tap's activations can be divided without a new node, numbers permitting."""
    return all(_makers(value, _site_nodes(group), group.k) is not None for value in _activations(group))


def divide_input(group: LinearGroup, scale: np.ndarray, *, allow_mul: bool) -> str:
    """Divides what every site of `tap` reads by `scale [K]`, exactly but for one rounding.

    Constants that others read as well are replaced by a copy. Nothing is changed when it fails.

    Args:
        tap: not lowered yet.
        scale: positive and finite.
        allow_mul: where folding is not exact, multiply by `1 / scale` in a new node.

    Returns:
        "norm", "linear", or "mul" if at least one such node was needed.

    Raises:
        ValueError: the scale is unusable, or cannot be folded and `allow_mul` is off.
    """
    scale = np.asarray(scale, np.float64)
    if scale.shape != (group.k,) or not np.all(np.isfinite(scale)) or scale.min() <= 0:
        raise ValueError(f"the scale of {group.name!r} must be {group.k} positive finite numbers")
    dtype = group.linears[0].dtype
    nodes = _site_nodes(group)
    edits: list[tuple[_Maker, np.ndarray]] = []
    factors: list[ir.Value] = []
    for value in _activations(group):
        arrays = [(maker, _divided(maker, scale)) for maker in _makers(value, nodes, group.k) or ()]
        if arrays and all(array is not None for _, array in arrays):
            edits += [(maker, array) for maker, array in arrays if array is not None]
        else:
            factors.append(value)
    inverse = _stored(1.0 / scale, dtype) if factors and allow_mul else None
    if factors and inverse is None:
        raise ValueError(f"the input of {group.name!r} cannot be divided exactly by its scale")
    for maker, array in edits:
        _replace(maker, array)
    if inverse is not None:
        for value in factors:
            _multiply(value, inverse, dtype, nodes)
    return "mul" if factors else "linear" if any(maker.linear for maker, _ in edits) else "norm"


def _site_nodes(group: LinearGroup) -> set[ir.Node]:
    return {linear.node for linear in group.linears}


def _activations(group: LinearGroup) -> list[ir.Value]:
    return list(dict.fromkeys(value for linear in group.linears if (value := linear.node.inputs[0]) is not None))


def _makers(value: ir.Value | None, allowed: Set[ir.Node], k: int) -> list[_Maker] | None:
    """The constants to divide so that `value [..., k]` is divided, None if nothing exact exists.

    Args:
        value: an activation.
        allowed: nodes that want it divided; any other reader forbids it, but for those of its shape.
        k: channels.
    """
    node = value.producer() if value is not None else None
    if node is None or value is None or value.is_graph_output() or value.index() != 0:
        return None
    if any(node not in allowed and node.op_type not in ("Shape", "Size") for node, _ in value.uses()):
        return None
    makers: list[_Maker | None] | None
    if indices := _NORMS.get((node.domain, node.op_type)):
        makers = [_vector(node, i, k) for i in indices if i < len(node.inputs) and node.inputs[i] is not None]
    elif node.op_type == "MatMulNBits":
        makers = _linear(node, k)
    elif node.domain == "" and node.op_type in ("Mul", "Div", "Add", "Sub", "Cast", "Identity"):
        return _elementwise(node, k)
    else:
        return None
    return None if not makers or None in makers else [maker for maker in makers if maker is not None]


def _elementwise(node: ir.Node, k: int) -> list[_Maker] | None:
    """As `_makers`, for an elementwise node whose output is to be divided."""
    through = {node}
    if node.op_type in ("Add", "Sub"):
        sides = [_side(node, index, k) for index in (0, 1)]
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    if node.op_type == "Mul":  # one factor is enough; of gate and up the one that is linear
        return next((side for index in (1, 0) if (side := _side(node, index, k)) is not None), None)
    if node.op_type == "Div" and (divisor := _vector(node, 1, k, inverse=True)):
        return [divisor]
    if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) not in FLOATS:
        return None
    return _side(node, 0, k) if node.op_type == "Div" else _makers(node.inputs[0], through, k)


def _side(node: ir.Node, index: int, k: int) -> list[_Maker] | None:
    """One operand of an elementwise node: a constant, or something computed that only this node reads."""
    if resolve(node.inputs[index]) is not None:
        maker = _vector(node, index, k)
        return None if maker is None else [maker]
    if node.inputs[0] is node.inputs[1]:
        return None
    return _makers(node.inputs[index], {node}, k)


def _linear(node: ir.Node, k: int) -> list[_Maker | None]:
    """The scales and bias of a quantized linear layer with `k` output channels."""
    bias = [_vector(node, 5, k, linear=True)] if len(node.inputs) > 5 and node.inputs[5] is not None else []
    cast = node.inputs[2].producer() if node.inputs[2] is not None else None
    scales = None
    if cast is not None and cast.op_type == "Cast" and len(cast.outputs[0].uses()) == 1:  # kept in float16, and its own
        scales = _vector(cast, 0, k, axis=_FIRST, linear=True)
    return [scales or _vector(node, 2, k, axis=_FIRST, linear=True), *bias]


def _vector(
    node: ir.Node, index: int, k: int, *, axis: int = _LAST, inverse: bool = False, linear: bool = False
) -> _Maker | None:
    """Input `index` if it is a float constant with `k` channels along `axis`, or one number for all of them."""
    constant = resolve(node.inputs[index])
    if constant is None or constant.overridable or constant.dtype not in FLOATS:
        return None
    width = constant.shape[axis] if constant.shape else 1
    if width != k and (width != 1 or linear):
        return None
    return _Maker(node, index, constant, axis, inverse, linear)


def _divided(maker: _Maker, scale: np.ndarray) -> np.ndarray | None:
    """The constant to use instead, None if its type cannot hold it."""
    array = maker.constant.array().astype(np.float64)
    factor = scale if maker.inverse else 1.0 / scale
    if maker.axis == _FIRST:
        factor = factor.reshape(-1, *[1] * (array.ndim - 1))
    return _stored(array * factor, maker.constant.dtype)


def _stored(array: np.ndarray, dtype: ir.DataType) -> np.ndarray | None:
    """`array` in the type the model uses, None if something overflows or loses its precision to underflow."""
    numpy_type = dtype.numpy()
    with np.errstate(over="ignore", under="ignore"):
        out = array.astype(numpy_type)
    back = out.astype(np.float64)
    if not np.all(np.isfinite(back)):
        return None
    precision = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10}.get(dtype, 2.0**-7)
    return out if np.all(np.abs(back - array) <= precision * np.abs(array)) else None


def _replace(maker: _Maker, array: np.ndarray) -> None:
    old = maker.node.inputs[maker.index]
    name = f"{maker.constant.root.name}_scaled"
    new = add_initializer(graph_of(maker.node), name, array, maker.constant.dtype)
    maker.node.replace_input_with(maker.index, new)
    prune(old)


def _multiply(value: ir.Value, inverse: np.ndarray, dtype: ir.DataType, nodes: Set[ir.Node]) -> None:
    """Puts `value * inverse` between `value` and the given nodes."""
    graph = graph_of(value)
    factor = add_initializer(graph, f"{value.name}_inverse_scale", inverse, dtype)
    product = ir.Value(name=fresh_name(graph, f"{value.name}_scaled"), type=value.type, shape=value.shape)
    node = ir.node("Mul", [value, factor], outputs=[product], name=product.name)
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    for reader in nodes:
        if reader.inputs[0] is value:
            reader.replace_input_with(0, product)
