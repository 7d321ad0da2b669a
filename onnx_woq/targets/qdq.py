"""QDQ: a DequantizeLinear in front of each MatMul or Gemm, so that a model has ONNX's own operators only.

A session that optimizes its graph fuses most of them to MatMulNBits: weights `[K, N]` with blocks of 16, 32, 64, 128 or
256 input channels, or with one scale for each output channel. Other group sizes and groups of output channels give the
same values but slowly, since the weight is decoded at every inference. docs/qdq.md lists what is fused, and its speed.

Symmetric codes are int2, int4 or int8 and have no zero points; asymmetric ones are uint2, uint4 or uint8. A code of
another width is stored in the next wider type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.edit import add_constant, add_node, as_float32, insert_after, prune
from onnx_woq.graph.find.linears import Linear, LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.base import Shapes, Speed, Storage, Version
from onnx_woq.targets.gemm_bias import corrected_bias, split_bias

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor

BY_CHANNEL = False

_FUSED = (256, 128, 64, 32, 16)  # block sizes that sessions fuse; larger ones were computed wrong before 1.27
_TYPES = {(bits, signed): ir.DataType[f"{'' if signed else 'U'}INT{bits}"] for bits in (2, 4, 8) for signed in (0, 1)}
_OPSETS = {2: 25, 4: 21}
_BLOCKED, _HALF_SCALES, _PER_CHANNEL = 21, 19, 13  # the first opsets of DequantizeLinear with each
_OLDEST: dict[int, Version] = {2: (1, 24), 4: (1, 19), 8: (1, 19)}


@dataclass(frozen=True)
class Packed:
    """One weight `[K, N]` as DequantizeLinear reads it.

    Attributes:
        codes: int8 or uint8 `[K, N]` at 8 bits; else uint8, row after row, lowest bits first, the last byte padded.
        scales: float32 or float16 `[blocks, N]`, or `[K, blocks]` for groups of output channels; one-dimensional with
            one scale for each channel.
        zeros: uint8, packed like the codes; None where the codes are signed.
        k: input channels.
        n: output channels.
        bits: bits of a stored code: 2, 4 or 8.
        axis: the axis of the weight that is divided into blocks; with one scale for each channel, that of the channels.
        block: channels of a block; 0 for one scale for each channel.
        width: bits of a code of the number format, at most `bits`; names of initializers carry it.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    k: int
    n: int
    bits: int
    axis: int
    block: int
    width: int

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns the arrays to store, in the order of the operator's inputs."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Packed:
        """Returns the same weight with other arrays, given as `arrays` gives them."""
        codes, scales, *zeros = arrays
        return replace(self, codes=codes, scales=scales, zeros=zeros[0] if zeros else None)

    def tensors(self) -> list[ir.TensorProtocol]:
        """Returns codes, scales and perhaps zero points as tensors; tensors of one array are written to a file once."""
        dtype = _TYPES[self.bits, self.zeros is None]
        found = [_tensor(self.codes, dtype, (self.k, self.n)), ir.Tensor(self.scales)]
        return found if self.zeros is None else [*found, _tensor(self.zeros, dtype, self.scales.shape)]


def refusal(spec: Spec) -> str:  # noqa: ARG001  (the signature is that of the protocol)
    """Returns "": DequantizeLinear can hold every number format."""
    return ""


def minimum_opset(spec: Spec, scale_dtype: type[np.floating]) -> int:
    """Returns the lowest opset whose DequantizeLinear has the types of codes and scales, and blocks if need be."""
    whole = _HALF_SCALES if scale_dtype is np.float16 else _PER_CHANNEL
    return _OPSETS.get(container(spec.bits), whole if spec.group_size == -1 else _BLOCKED)


def speed(spec: Spec) -> Speed:
    """Returns "native" for formats that sessions fuse to MatMulNBits, "slow" for all others."""
    fused = spec.group_size == -1 or any(spec.group_size % block == 0 for block in _FUSED)
    return "native" if fused and spec.group_dim == 1 else "slow"


def runtime(node: ir.Node, *, in_body: bool) -> Version | None:  # noqa: ARG001
    """Returns the oldest onnxruntime that runs a DequantizeLinear of constant codes, None for any other node."""
    if node.op_type != "DequantizeLinear" or node.domain:
        return None
    codes = node.inputs[0]
    dtype = codes.dtype if codes is not None and codes.is_initializer() else None
    bits = next((bits for (bits, _), one in _TYPES.items() if one == dtype), None)
    return _OLDEST[bits] if bits else None


def scale_factor(spec: Spec, storage: Storage) -> float:  # noqa: ARG001
    """Returns 1: scales are stored as they are."""
    return 1.0


def shapes(k: int, n: int, spec: Spec, storage: Storage) -> Shapes:
    """Returns the shape and type of each of `Packed.arrays` for a weight `[k, n]`, known before it is solved."""
    bits = _width(spec.bits, n)
    axis, block = _layout(spec.group_size, spec.group_dim, k, n)
    blocks = -(-(k, n)[axis] // block) if block else 0
    scales = ((blocks, n) if axis == 0 else (k, blocks)) if block else ((k, n)[axis],)
    stored = (_bits_shape((k, n), bits, signed=spec.symmetric), (scales, np.dtype(storage.scale_dtype)))
    return stored if spec.symmetric else (*stored, _bits_shape(scales, bits, signed=False))


def packed_from(arrays: Sequence[np.ndarray], k: int, n: int, spec: Spec, storage: Storage) -> Packed:  # noqa: ARG001
    """Returns the packed weight `[k, n]` that has these arrays, whose shapes are those that `shapes` gives."""
    codes, scales, *zeros = arrays
    axis, block = _layout(spec.group_size, spec.group_dim, k, n)
    return Packed(codes, scales, zeros[0] if zeros else None, k, n, _width(spec.bits, n), axis, block, spec.bits)


def pack(q: QuantizedTensor, storage: Storage) -> Packed:
    """Lays a quantized weight out as DequantizeLinear reads it; a group of several blocks has its scale repeated."""
    k, n = q.codes.shape
    bits = _width(q.bits, n)
    axis, block = _layout(q.group_size, q.group_dim, k, n)
    scales, zeros = q.scales, q.zeros
    if block:
        groups = np.arange(-(-(k, n)[axis] // block)) * block // q.group_size
        scales, zeros = scales.take(groups, axis), zeros.take(groups, axis)
    else:
        scales, zeros = scales.reshape(-1), zeros.reshape(-1)
    codes = q.codes
    if q.symmetric:  # signed codes in two's complement, cut to their bits
        codes = codes - np.uint8(1 << q.bits - 1) & np.uint8((1 << bits) - 1)
    stored = _stored(codes, bits, signed=q.symmetric)
    scales = np.ascontiguousarray(scales, storage.scale_dtype)
    points = None if q.symmetric else _stored(zeros, bits, signed=False)
    return Packed(stored, scales, points, k, n, bits, axis, block, q.bits)


def lower(
    model: Model,
    group: LinearGroup,
    packed: Sequence[Packed],
    *,
    accuracy_level: int,  # noqa: ARG001 (a session decides it)
    bias: Sequence[np.ndarray] = (),
) -> None:
    """Puts a DequantizeLinear in front of every linear of a group; the nodes stay MatMul and Gemm.

    Sessions fuse nothing that is shared. So each linear has a DequantizeLinear of its own, with tensors under names of
    its own, even where the weight is the same; its bytes are in the data file once. For a linear in the body of an If
    or Loop, the DequantizeLinear stands in the main graph, since sessions read external data only there, and is not
    fused.

    Args:
        model: the model that holds the group.
        group: the linear group.
        packed: its distinct weights, in order.
        accuracy_level: not used: a session decides it (`session.qdq_matmulnbits_accuracy_level`, 4 by default).
        bias: float32 `[n]` for each weight, added to its outputs; none if empty.
    """
    for linear, index in list(zip(group.linears, group.weight_indices(), strict=True)):
        before = linear.node if linear.node.graph is model.ir.graph else model.ir.graph[0]
        name = f"{linear.weight_name}_Q{packed[index].width}"
        weight = _dequantized(model, before, name, packed[index], linear.dtype)
        _rewrite(model, linear, weight, bias[index] if bias else None)


def store(model: Model, name: str, packed: Packed, dtype: ir.DataType) -> tuple[ir.Value | None, ...]:
    """Adds a weight to the main graph, with a DequantizeLinear in front of all other nodes; returns its output."""
    return (_dequantized(model, model.ir.graph[0], name, packed, dtype),)


def multiply(
    before: ir.Node,
    activation: ir.Value | None,
    name: str,
    packed: Packed,  # noqa: ARG001  (the signature is that of the protocol)
    stored: Sequence[ir.Value | None],
    accuracy_level: int,  # noqa: ARG001
) -> ir.Value:
    """Adds a MatMul of an activation `[..., K]` with a stored weight `[K, N]`; returns its output.

    It is added in front of the node `before`, whose output has the same type.
    """
    product = add_node("MatMul", [activation, *stored], name, before=before)
    product.type = before.outputs[0].type
    return product


def container(bits: int) -> int:
    """Returns the width of the narrowest type that holds codes of `bits` bits."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def _width(bits: int, n: int) -> int:
    """Returns the bits of the type that codes of a weight with `n` output channels are stored in.

    Rows of 2-bit codes that do not fill whole bytes get 4 bits: onnxruntime 1.25 to 1.32 fuses them to a product of
    wrong numbers.
    """
    return 4 if bits <= 2 and n % 4 else container(bits)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes as ONNX does: row after row, lowest bits first, the last byte padded with zeros.

    Args:
        codes: uint8 of any shape.
        bits: bits of a code: 2, 4 or 8.

    Returns:
        uint8 `[ceil(codes.size * bits / 8)]`.
    """
    flat, per = np.ascontiguousarray(codes, np.uint8).reshape(-1), 8 // bits
    if short := -flat.size % per:
        flat = np.pad(flat, (0, short))
    packed = flat[::per].copy()
    for place in range(1, per):
        packed |= flat[place::per] << np.uint8(place * bits)
    return packed


def _bits_shape(shape: Sequence[int], bits: int, *, signed: bool) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and type of the array that stores an array of `bits`-bit numbers."""
    if bits == 8:
        return tuple(shape), np.dtype(np.int8 if signed else np.uint8)
    return (-(-math.prod(shape) * bits // 8),), np.dtype(np.uint8)


def _stored(numbers: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """Returns uint8 numbers packed into the array that `_bits_shape` describes; signed ones are in two's complement."""
    if bits == 8:
        return np.ascontiguousarray(numbers, np.uint8).view(np.int8 if signed else np.uint8)
    return pack_bits(numbers, bits)


def _layout(group_size: int, group_dim: int, k: int, n: int) -> tuple[int, int]:
    """Returns (axis, block) of a weight `[k, n]`, see `Packed`.

    The block is the largest that sessions fuse and that divides a group; the group itself if none does.
    """
    axis, channels = (0, k) if group_dim == 1 else (1, n)
    if group_size == -1 or group_size >= channels:
        return 1 - axis, 0
    if axis == 0:
        return axis, next((block for block in _FUSED if group_size % block == 0), group_size)
    return axis, group_size


def _tensor(array: np.ndarray, dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    if dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        return ir.Tensor(array)
    return ir.PackedTensor(array, dtype, shape=ir.Shape(shape))


def _dequantized(model: Model, before: ir.Node, name: str, packed: Packed, dtype: ir.DataType) -> ir.Value:
    """Adds the tensors of a weight and the DequantizeLinear that reads them; returns the float weight `[K, N]`.

    For a bfloat16 activation, which no CPU kernel multiplies, it is float32.
    """
    graph = model.ir.graph
    codes, scales, *zeros = packed.tensors()
    stored = add_constant(graph, name, codes)
    scale = add_constant(graph, f"{stored.name}_scales", scales)
    inputs = [stored, scale, *(add_constant(graph, f"{stored.name}_zero_points", zero) for zero in zeros)]
    wanted = ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype
    if scale.dtype != wanted:  # float16 scales: sessions fold this Cast before they fuse the product
        inputs[1] = add_node("Cast", [scale], f"{stored.name}_wide", before=before, to=wanted)
        inputs[1].type, inputs[1].shape = ir.TensorType(wanted), scale.shape
    attributes: dict[str, Any] = {"axis": packed.axis} | ({"block_size": packed.block} if packed.block else {})
    weight = add_node("DequantizeLinear", inputs, f"{stored.name}_dequantized", before=before, **attributes)
    weight.type, weight.shape = ir.TensorType(wanted), ir.Shape((packed.k, packed.n))
    return weight


def _rewrite(model: Model, linear: Linear, weight: ir.Value, correction: np.ndarray | None) -> None:
    """Makes a linear read its new weight `[K, N]`, and adds Casts and an Add around it where it needs them."""
    node, half = linear.node, linear.dtype == ir.DataType.BFLOAT16
    old = node.inputs[1]
    if half:  # inserted before any Add, so that it runs after it
        node.replace_input_with(0, as_float32(node.inputs[0], f"{linear.name}_input", node))
        product = insert_after(node, "Cast", [], "float32", to=ir.DataType.BFLOAT16)
        product.type = ir.TensorType(ir.DataType.FLOAT)
    if linear.kind == "Gemm":
        if half or correction is not None:
            _move_bias(model, linear, correction)
        for name in ("transB", "alpha"):  # both are part of the weight now
            node.attributes.pop(name, None)
    elif correction is not None:
        bias = corrected_bias(model, linear, None, correction)
        insert_after(node, "Add", [bias], "uncorrected", label="correction")
    node.replace_input_with(1, weight)
    prune(old)


def _move_bias(model: Model, linear: Linear, correction: np.ndarray | None) -> None:
    """Makes the bias of a Gemm a constant in the type it computes in, and turns any other C into an Add behind it."""
    node = linear.node
    old = node.inputs[2] if len(node.inputs) > 2 else None
    bias, addend = split_bias(model, linear)
    if correction is not None:
        bias = corrected_bias(model, linear, bias, correction)
    if addend is not None:
        if linear.dtype == ir.DataType.BFLOAT16:
            addend = as_float32(addend, f"{linear.name}_addend", node)
        insert_after(node, "Add", [addend], "product")
    node.resize_inputs(2 if bias is None else 3)
    if bias is not None:
        node.replace_input_with(2, bias)
    node.attributes.pop("beta", None)
    prune(old)
