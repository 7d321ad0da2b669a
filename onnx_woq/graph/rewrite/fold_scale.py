"""Division of an activation by a vector, in the constants it is made with wherever that is exact.

AWQ scales the input channels of a weight `W [K, N]` by `s [K]` and divides its input `x [tokens, K]` by s (Lin et al.
2023, eq. 4): `(x / s) @ diag(s) W`. The division costs nothing where x is made with constants that have one number per
channel: the scale and bias of a norm, the factor of a product, the scales of a quantized linear whose output channels
are those of x. Such a constant, to be divided by s, is a *fold*.

Folds may change only if every reader of x belongs to the linear group that wants x divided. The weight of a linear that
stays float is never a fold: whoever excluded it expects to find it unchanged.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node, graph_of, prune
from onnx_woq.graph.find.constants import FLOATS, Constant, resolve
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.find.quantized import dequantized_factor

# (domain, operator) -> the inputs that scale and shift the normalized value, and only that.
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
class _Fold:
    """A constant to divide so that an activation is divided, channel by channel.

    Attributes:
        node: the node that reads the constant.
        index: the index of the input.
        constant: the constant.
        axis: the axis of the constant along which the channels lie.
        inverse: whether the activation is divided by the constant, which is to be multiplied then.
        linear: whether the constant belongs to a quantized linear rather than to a norm.
    """

    node: ir.Node
    index: int
    constant: Constant
    axis: int = _LAST
    inverse: bool = False
    linear: bool = False


def can_fold(group: LinearGroup) -> bool:
    """Tells whether the activations of a linear group can be divided without a new node, unless numbers overflow."""
    return all(_find_folds(value, _nodes(group), group.k) is not None for value in _activations(group))


def divide_input(group: LinearGroup, scale: np.ndarray, *, allow_mul: bool) -> str:
    """Divides the activations that a linear group reads by `scale [K]`, in place, exactly up to one rounding.

    Constants that other nodes read as well are replaced by a copy for this reader.

    Args:
        group: a linear group whose nodes are MatMul and Gemm still.
        scale: positive finite numbers.
        allow_mul: whether a new node may multiply by `1 / scale` where folding is not exact.

    Returns:
        "norm" if norms and constants took the scale; "linear" if the scales of a quantized linear took some of it;
        "mul" if a new node was needed.

    Raises:
        ValueError: the scale is unusable, or cannot be folded and `allow_mul` is off. The model is unchanged then.
    """
    scale = np.asarray(scale, np.float64)
    if scale.shape != (group.k,) or not np.all(np.isfinite(scale)) or scale.min() <= 0:
        raise ValueError(f"the scale of {group.name!r} must be {group.k} positive finite numbers")
    dtype = group.linears[0].dtype
    wide = dtype == ir.DataType.BFLOAT16  # there is no Mul for it, and targets cast the activation to float32 anyway
    nodes = _nodes(group)
    edits: list[tuple[_Fold, np.ndarray]] = []
    undivided: list[ir.Value] = []
    for value in _activations(group):
        arrays = [(fold, _divided(fold, scale)) for fold in _find_folds(value, nodes, group.k) or ()]
        if arrays and all(array is not None for _, array in arrays):
            edits += [(fold, array) for fold, array in arrays if array is not None]
        else:
            undivided.append(value)
    inverse = _stored(1.0 / scale, ir.DataType.FLOAT if wide else dtype) if undivided and allow_mul else None
    if undivided and inverse is None:
        raise ValueError(f"the input of {group.name!r} cannot be divided exactly by its scale")
    for fold, array in edits:
        _replace(fold, array)
    if inverse is not None:
        for value in undivided:
            _multiply(value, inverse, nodes, wide=wide)
    return "mul" if undivided else "linear" if any(fold.linear for fold, _ in edits) else "norm"


def _nodes(group: LinearGroup) -> set[ir.Node]:
    return {linear.node for linear in group.linears}


def _activations(group: LinearGroup) -> list[ir.Value]:
    return list(dict.fromkeys(value for linear in group.linears if (value := linear.node.inputs[0]) is not None))


def _find_folds(value: ir.Value | None, allowed: Set[ir.Node], k: int) -> list[_Fold] | None:
    """Returns the folds of an activation `value [..., k]`, None if it cannot be divided exactly.

    Args:
        value: the activation.
        allowed: the nodes that want it divided. Any other reader forbids it, except readers of its shape.
        k: the number of channels.
    """
    node = value.producer() if value is not None else None
    if node is None or value is None or value.is_graph_output() or value.index() != 0:
        return None
    if any(node not in allowed and node.op_type not in ("Shape", "Size") for node, _ in value.uses()):
        return None
    found: list[_Fold | None] | None
    if indices := _NORMS.get((node.domain, node.op_type)):
        found = [_vector(node, i, k) for i in indices if i < len(node.inputs) and node.inputs[i] is not None]
    elif node.op_type == "MatMulNBits":
        found = _quantized_folds(node, k)
    elif dequantize := dequantized_factor(node):
        found = _dequantized_folds(node, dequantize, k)
    elif node.domain == "" and node.op_type in ("Mul", "Div", "Add", "Sub", "Cast", "Identity"):
        return _elementwise_folds(node, k)
    else:
        return None
    return None if not found or None in found else [fold for fold in found if fold is not None]


def _elementwise_folds(node: ir.Node, k: int) -> list[_Fold] | None:
    """Returns the folds of the output of an elementwise node, None if it cannot be divided exactly."""
    through = {node}
    if node.op_type in ("Add", "Sub"):
        sides = [_operand_folds(node, index, k) for index in (0, 1)]
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    if node.op_type == "Mul":  # one operand is enough; of gate and up that is the one behind no nonlinearity
        return next((side for index in (1, 0) if (side := _operand_folds(node, index, k)) is not None), None)
    if node.op_type == "Div" and (divisor := _vector(node, 1, k, inverse=True)):
        return [divisor]
    if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) not in FLOATS:
        return None
    return _operand_folds(node, 0, k) if node.op_type == "Div" else _find_folds(node.inputs[0], through, k)


def _operand_folds(node: ir.Node, index: int, k: int) -> list[_Fold] | None:
    """Returns the folds of an operand of an elementwise node: a constant, or an activation that no other node reads."""
    if resolve(node.inputs[index]) is not None:
        fold = _vector(node, index, k)
        return None if fold is None else [fold]
    if node.inputs[0] is node.inputs[1]:
        return None
    return _find_folds(node.inputs[index], {node}, k)


def _quantized_folds(node: ir.Node, k: int) -> list[_Fold | None]:
    """Returns the scales and bias of a MatMulNBits with `k` output channels as folds, None for one that is none."""
    bias = [_vector(node, 5, k, linear=True)] if len(node.inputs) > 5 and node.inputs[5] is not None else []
    cast = node.inputs[2].producer() if node.inputs[2] is not None else None
    scales = None
    if cast is not None and cast.op_type == "Cast" and len(cast.outputs[0].uses()) == 1:  # float16, for this node alone
        scales = _vector(cast, 0, k, axis=_FIRST, linear=True)
    return [scales or _vector(node, 2, k, axis=_FIRST, linear=True), *bias]


def _dequantized_folds(node: ir.Node, dequantize: ir.Node, k: int) -> list[_Fold | None]:
    """Returns the scales and bias of a MatMul or Gemm over a DequantizeLinear as folds, None for one that is none."""
    axis, block = (dequantize.attributes.get_int(name, default) for name, default in (("axis", 1), ("block_size", 0)))
    by_output = axis in (0, -2) if block else axis in (1, -1)  # each output channel has scales of its own
    whole = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    turned = node.attributes.get_int("transB", 0)
    if turned or not (by_output and whole) or len(dequantize.outputs[0].uses()) > 1:
        return [None]
    bias = [_vector(node, 2, k, linear=True)] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    cast = dequantize.inputs[1].producer() if dequantize.inputs[1] is not None else None
    half = cast is not None and cast.op_type == "Cast" and len(cast.outputs[0].uses()) == 1
    scales = _vector(cast, 0, k, linear=True) if half and cast is not None else None
    return [scales or _vector(dequantize, 1, k, linear=True), *bias]


def _vector(
    node: ir.Node, index: int, k: int, *, axis: int = _LAST, inverse: bool = False, linear: bool = False
) -> _Fold | None:
    """Returns input `index` as a fold if it is a float constant with `k` channels along `axis`, else None.

    One number for all channels will do as well, except in a quantized linear.
    """
    constant = resolve(node.inputs[index])
    if constant is None or constant.overridable or constant.dtype not in FLOATS:
        return None
    width = constant.shape[axis] if constant.shape else 1
    if width != k and (width != 1 or linear):
        return None
    return _Fold(node, index, constant, axis, inverse, linear)


def _divided(fold: _Fold, scale: np.ndarray) -> np.ndarray | None:
    """Returns the constant divided by `scale [K]`, None if its type cannot hold the result."""
    array = fold.constant.array().astype(np.float64)
    multiplier = scale if fold.inverse else 1.0 / scale
    if fold.axis == _FIRST:
        multiplier = multiplier.reshape(-1, *[1] * (array.ndim - 1))
    return _stored(array * multiplier, fold.constant.dtype)


def _stored(array: np.ndarray, dtype: ir.DataType) -> np.ndarray | None:
    """Returns `array` in the type `dtype`, None if a number overflows or loses precision to underflow."""
    numpy_type = dtype.numpy()
    with np.errstate(over="ignore", under="ignore"):
        out = array.astype(numpy_type)
    back = out.astype(np.float64)
    if not np.all(np.isfinite(back)):
        return None
    precision = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10}.get(dtype, 2.0**-7)
    return out if np.all(np.abs(back - array) <= precision * np.abs(array)) else None


def _replace(fold: _Fold, array: np.ndarray) -> None:
    old = fold.node.inputs[fold.index]
    name = f"{fold.constant.root.name}_scaled"
    new = add_initializer(graph_of(fold.node), name, array, fold.constant.dtype)
    fold.node.replace_input_with(fold.index, new)
    prune(old)


def _multiply(value: ir.Value, inverse: np.ndarray, nodes: Set[ir.Node], *, wide: bool) -> None:
    """Inserts `value * inverse` between `value` and those of its readers that are in `nodes`, in float32 if `wide`."""
    graph, producer = graph_of(value), value.producer()
    factor = add_initializer(graph, f"{value.name}_inverse_scale", inverse)
    place: dict[str, Any] = {"before": graph[0]} if producer is None else {"after": producer}
    read = value
    if wide:
        read = add_node("Cast", [value], f"{value.name}_float32", to=ir.DataType.FLOAT, **place)
        read.type = ir.TensorType(ir.DataType.FLOAT)
        place = {"after": read.producer()}
    product = add_node("Mul", [read, factor], f"{value.name}_scaled", **place)
    product.type = read.type
    for reader in nodes:
        if reader.inputs[0] is value:
            reader.replace_input_with(0, product)
