"""MatMulNBits: the operator of ONNX Runtime that multiplies by 2, 4 and 8-bit weights without decoding them first.

Its CPU kernels take less than its schema says, and are fast on only part of that; the constants below were tried. A
code of another width is stored in the next wider one, its **container**, and a group of another size in several smaller
**blocks** with the same scale: the values are the same.

In the file, codes of 1, 3, 5, 6 and 7 bits are **dense**, without the gaps of their containers, if the model's opset
allows it, and scales may be float16. The session that loads the file expands both to what the kernels read
(`onnx_woq.targets.bitplanes`, docs/storage.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.edit import add_initializer, add_node, as_float32, fresh_name, graph_of, insert_after, prune
from onnx_woq.graph.find.linears import Linear, LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.base import Shapes, Speed, Storage, Version
from onnx_woq.targets.bitplanes import FORMS, OPSET, add_expansion, layout_of, planes_of
from onnx_woq.targets.gemm_bias import corrected_bias, split_bias
from onnx_woq.targets.packing import pack_codes, pack_zeros, spread

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor

DOMAIN = "com.microsoft"
BY_CHANNEL = True
_BLOCKS = {
    2: (32, 64, 128),
    4: (16, 32, 64, 128, 256),
    8: (16, 32, 64, 128, 256),
}  # block sizes with a fast kernel, by bits of a code
_OLDEST = {
    2: (1, 24),
    4: (1, 20),
    8: (1, 22),
}  # oldest runtime by bits, tried with every group size, scheme, type and level
_BODIES = (1, 29)  # older ones silently compute wrong int8 products with zero points in bodies of If and Loop
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Packed:
    """One weight `[K, N]` as MatMulNBits stores it.

    Attributes:
        codes: uint8 `[N, blocks, bytes per block]`; of dense codes their planes, see `onnx_woq.targets.bitplanes`.
        scales: float32 or float16 `[N, blocks]`.
        zeros: uint8 `[N, bytes]`; None where all zero points are the middle of the range.
        k: input channels.
        n: output channels.
        bits: bits of a container: 2, 4 or 8.
        block: input channels of a block.
        width: bits of a code, at most `bits`; names of initializers carry it.
    """

    codes: tuple[np.ndarray, ...]
    scales: np.ndarray
    zeros: np.ndarray | None
    k: int
    n: int
    bits: int
    block: int
    width: int

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns the arrays to store, in the order of the operator's inputs."""
        return (*self.codes, self.scales) if self.zeros is None else (*self.codes, self.scales, self.zeros)

    @property
    def dense(self) -> bool:
        """Tells whether the codes are planes, which a session has to expand."""
        return 8 * self.codes[0].shape[-1] != self.block * self.bits

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Packed:
        """Returns the same weight with other arrays, given as `arrays` gives them."""
        count = len(self.codes)
        scales, *zeros = arrays[count:]
        return replace(self, codes=tuple(arrays[:count]), scales=scales, zeros=zeros[0] if zeros else None)


def minimum_runtime(bits: int, *, accuracy_level: int = 4, scale_dtype: type[np.floating] = np.float32) -> str:
    """Returns the oldest onnxruntime whose CPU kernels run weights of `bits` bits as `lower` writes them."""
    return ".".join(map(str, _oldest(_container(bits), accuracy_level, scale_dtype is np.float16)))


def refusal(spec: Spec) -> str:
    """Returns the reason why MatMulNBits cannot hold weights of a number format, "" if it can."""
    if spec.group_size != -1 and spec.group_size % 16:
        return (
            f"group_size={spec.group_size} is not for MatMulNBits: choose -1 (one group per output channel) "
            "or a multiple of 16 (16, 32, 64, 128 and 256 are native)"
        )
    if spec.group_dim != 1:
        return f"group_dim={spec.group_dim} is not for MatMulNBits: its groups are input channels (group_dim=1)"
    return ""


def minimum_opset(spec: Spec, scale_dtype: type[np.floating]) -> int:  # noqa: ARG001  (the signature is that of the protocol)
    """Returns 0: the operator is not one of ONNX's own, so any opset will do."""
    return 0


def speed(spec: Spec) -> Speed:  # noqa: ARG001
    """Returns "native": a kernel of 2, 4 or 8 bits runs every width."""
    return "native"


def scale_factor(spec: Spec, storage: Storage) -> float:
    """Returns what scales are multiplied by: less than 1 where codes are stored above the gap that the kernel reads."""
    return 1 / (1 << FORMS[spec.bits].gap) if spec.symmetric and _is_dense(spec.bits, storage) else 1.0


def runtime(node: ir.Node, *, in_body: bool) -> Version | None:
    """Returns the oldest onnxruntime whose CPU kernels run a MatMulNBits as `lower` writes it, None for other nodes."""
    if node.op_type != "MatMulNBits" or "accuracy_level" not in node.attributes:
        return None
    level = node.attributes["accuracy_level"].as_int()
    if in_body and level == 4 and len(node.inputs) > 3 and node.inputs[3] is not None:
        return _BODIES
    return _oldest(node.attributes["bits"].as_int(), level, _is_half(node.inputs[2]))


def native_layout(bits: int, group_size: int, k: int) -> tuple[int, int]:
    """Returns (bits of a container, input channels of a block) that a weight is stored with.

    A group size that a kernel knows is also the block. Any other group is cut into blocks of the size that takes the
    fewest bytes, the larger of equals; a block lies within one group, so that it has one scale. At 2 bits only blocks
    of 32, 64 and 128 have the int8 kernel; groups that are no multiple of 32 are cut into blocks of 16 all the same.

    Args:
        bits: bits of a code, 1 to 8.
        group_size: input channels that share a scale, -1 for all.
        k: input channels of the weight.
    """
    container = _container(bits)
    native = _BLOCKS[container]
    whole = group_size == -1 or group_size >= k
    if not whole and group_size in native:
        return container, group_size
    fitting = [block for block in native if whole or group_size % block == 0] or [16]

    def column_bytes(block: int) -> int:
        blocks = -(-k // block)
        return blocks * (block * container // 8 + _SCALE_BYTES)

    return container, min(fitting, key=lambda block: (column_bytes(block), -block))


def shapes(k: int, n: int, spec: Spec, storage: Storage) -> Shapes:
    """Returns the shape and type of each of `Packed.arrays` for a weight `[k, n]`, known before it is solved."""
    container, block = native_layout(spec.bits, spec.group_size, k)
    blocks = -(-k // block)
    byte = np.dtype(np.uint8)
    width = block * container // 8
    form = FORMS[spec.bits] if _is_dense(spec.bits, storage) else None
    codes = (((n, blocks, width // form.parts), byte),) * form.planes if form else (((n, blocks, width), byte),)
    stored = (*codes, ((n, blocks), np.dtype(storage.scale_dtype)))
    return stored if spec.symmetric else (*stored, ((n, -(-blocks * container // 8)), byte))


def packed_from(arrays: Sequence[np.ndarray], k: int, n: int, spec: Spec, storage: Storage) -> Packed:
    """Returns the packed weight `[k, n]` that has these arrays, whose shapes are those that `shapes` gives."""
    container, block = native_layout(spec.bits, spec.group_size, k)
    count = FORMS[spec.bits].planes if _is_dense(spec.bits, storage) else 1
    scales, *zeros = arrays[count:]
    return Packed(tuple(arrays[:count]), scales, zeros[0] if zeros else None, k, n, container, block, spec.bits)


def pack(q: QuantizedTensor, storage: Storage) -> Packed:
    """Lays a quantized weight out as MatMulNBits stores it, with dense codes if the opset can expand them."""
    k, n = q.codes.shape
    dense = _is_dense(q.bits, storage)
    container, block = native_layout(q.bits, q.group_size, k)
    # Without zero points the kernel takes the middle of the container for zero, so symmetric codes move there.
    shift = (1 << container - 1) - (1 << q.bits - 1) if q.symmetric and not dense else 0
    scales = spread(q.scales, k, q.group_size, block).T.astype(storage.scale_dtype, order="C")
    zeros = None if q.symmetric else pack_zeros(spread(q.zeros, k, q.group_size, block), container)
    codes = pack_codes(q.codes, container, block, shift)
    if not dense:
        return Packed((codes,), scales, zeros, k, n, container, block, q.bits)
    if q.symmetric:
        codes <<= FORMS[q.bits].gap
        np.multiply(scales, scale_factor(Spec(q.bits, symmetric=True), storage), out=scales)
    planes = planes_of(codes, layout_of(q.bits, symmetric=q.symmetric))
    return Packed(planes, scales, zeros, k, n, container, block, q.bits)


def lower(
    model: Model, group: LinearGroup, packed: Sequence[Packed], *, accuracy_level: int, bias: Sequence[np.ndarray] = ()
) -> list[ir.Value]:
    """Rewrites every linear of a group in place as MatMulNBits; nodes and outputs keep their names.

    Linears that read the same weight share the new initializers. A Gemm's constant bias becomes the bias input, any
    other C becomes an Add. bfloat16 has no CPU kernel and is computed in float32 between two Casts. Float weights are
    removed once nothing reads them.

    Args:
        model: the model that holds the group.
        group: the linear group.
        packed: its distinct weights, in order.
        accuracy_level: 4 computes with int8 activations, 0 in float.
        bias: float32 `[n]` for each weight, added to its outputs; none if empty.

    Returns:
        The new initializers, weight by weight.
    """
    model.ir.opset_imports.setdefault(DOMAIN, 1)
    added: dict[int, tuple[ir.Value | None, ...]] = {}
    indices = group.weight_indices()  # asked for before the first float weight is removed
    if max(indices) + 1 != len(packed):
        raise ValueError(f"{group.name!r} has {max(indices) + 1} weights, not {len(packed)}")
    for linear, index in zip(group.linears, indices, strict=True):
        if index not in added:
            name = f"{linear.weight_name}_Q{packed[index].width}"
            added[index] = store(model, name, packed[index], linear.dtype)
        _rewrite(model, linear, packed[index], added[index], accuracy_level, bias[index] if bias else None)
    return [value for values in added.values() for value in values if value is not None]


def _is_dense(bits: int, storage: Storage) -> bool:
    """Tells whether codes are stored without gaps: their width leaves some, and the opset can expand them at load."""
    return bits in FORMS and storage.opset >= OPSET


def _container(bits: int) -> int:
    """Returns the bits of the container of a code."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def _oldest(container: int, accuracy_level: int, half: bool) -> tuple[int, int]:
    if container == 8 and accuracy_level != 4:
        return (1, 23)
    if container == 2 and half:
        return (1, 28)
    return _OLDEST[container]


def _is_half(scales: ir.Value | None) -> bool:
    cast = None if scales is None else scales.producer()  # a Cast makes float32 of them
    return cast is None and scales is not None and scales.dtype == ir.DataType.FLOAT16


def store(model: Model, name: str, packed: Packed, dtype: ir.DataType) -> tuple[ir.Value | None, ...]:
    """Adds a weight to the main graph; returns codes, scales, and zero points or None, the inputs of MatMulNBits.

    Dense codes are expanded, and float16 scales cast, by nodes in front of all others, which sessions fold into
    constants. In a session that folds nothing, codes must be computed wherever scales are: the int8 kernel packs scales
    together with constant codes, and silently computes nonsense when only one of the two is constant.

    Args:
        model: the model that gets the weight.
        name: the name of the codes; the names of the other arrays begin with it.
        packed: the weight.
        dtype: the type of the activation; float16 scales are cast if it is another one.
    """
    graph = model.ir.graph  # also for a linear in a body: sessions read external data in the main graph only
    cast = packed.scales.dtype == np.float16 and dtype != ir.DataType.FLOAT16
    if packed.dense:
        codes = add_expansion(graph, name, packed.codes, layout_of(packed.width, symmetric=packed.zeros is None))
    elif cast:
        stored = add_initializer(graph, f"{name}_stored", packed.codes[0])
        codes = add_node("Identity", [stored], name, before=graph[0])
        codes.type, codes.shape = stored.type, stored.shape
    else:
        codes = add_initializer(graph, name, packed.codes[0])
    scales = add_initializer(graph, f"{codes.name}_scales", packed.scales)
    if cast:
        half, scales = scales, add_node("Cast", [scales], f"{codes.name}_float", before=graph[0], to=ir.DataType.FLOAT)
        scales.type, scales.shape = ir.TensorType(ir.DataType.FLOAT), half.shape
    zeros = None if packed.zeros is None else add_initializer(graph, f"{codes.name}_zero_points", packed.zeros)
    return codes, scales, zeros


def multiply(
    before: ir.Node,
    activation: ir.Value | None,
    name: str,
    packed: Packed,
    stored: Sequence[ir.Value | None],
    accuracy_level: int,
) -> ir.Value:
    """Adds a MatMulNBits of an activation `[..., K]` with a stored weight `[K, N]`; returns its output.

    It is added in front of the node `before`, whose output has the same type.
    """
    graph = graph_of(before)
    out = ir.Value(name=fresh_name(graph, name), type=before.outputs[0].type)
    inputs = [activation, *stored]
    while inputs[-1] is None:
        inputs.pop()
    attributes = _attributes(packed, accuracy_level)
    node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=DOMAIN, outputs=[out], name=out.name)
    graph.insert_before(before, node)
    return out


def _attributes(packed: Packed, accuracy_level: int) -> dict[str, int]:
    """Returns the attributes of a MatMulNBits node that multiplies by a packed weight."""
    shape = {"K": packed.k, "N": packed.n, "bits": packed.bits, "block_size": packed.block}
    return shape | {"accuracy_level": accuracy_level}


def _rewrite(
    model: Model,
    linear: Linear,
    packed: Packed,
    stored: tuple[ir.Value | None, ...],
    accuracy_level: int,
    correction: np.ndarray | None,
) -> None:
    """Turns one node into MatMulNBits, and adds nodes around it for what MatMulNBits does not do itself."""
    node = linear.node
    old = list(node.inputs)
    activation = old[0]
    bias, addend = split_bias(model, linear)
    if correction is not None:
        bias = corrected_bias(model, linear, bias, correction)
    if linear.dtype == ir.DataType.BFLOAT16:
        activation = as_float32(activation, f"{linear.name}_input", node)
        addend = as_float32(addend, f"{linear.name}_addend", node)
        product = insert_after(node, "Cast", [], "float32", to=ir.DataType.BFLOAT16)
        product.type = ir.TensorType(ir.DataType.FLOAT)
    if addend is not None:  # inserted after the Cast, so that it runs before it
        insert_after(node, "Add", [addend], "product")
    inputs = [activation, *stored, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.domain, node.op_type, node.version = DOMAIN, "MatMulNBits", None
    node.attributes.clear()
    for name, number in _attributes(packed, accuracy_level).items():
        node.attributes.add(ir.AttrInt64(name, number))
    for value in old[1:]:
        prune(value)
