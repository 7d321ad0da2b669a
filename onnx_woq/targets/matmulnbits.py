"""MatMulNBits: the operator of ONNX Runtime that multiplies by 2, 4 and 8 bit weights as they are.

Its CPU kernels take less than its schema says, and not all they take is fast; the constants below are what was tried.
Other widths are stored in the next wider one and other groups in smaller blocks with repeated scales: same numbers.
These codes are dense in the file where the model's opset allows it, and scales may be float16 there; the session
that loads it makes of them what the kernels read (`onnx_woq.targets.bitplanes`, docs/storage.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.edit import add_initializer, add_node, fresh_name, graph_of, insert_after, prune
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
_BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}  # those with a fast kernel
_OLDEST = {2: (1, 24), 4: (1, 20), 8: (1, 22)}  # each tried with every group size, scheme, type and level
_BODIES = (1, 29)  # before, int8 products with zero points in bodies are silently wrong: constants lie outside
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Packed:
    """One weight `[K, N]` as MatMulNBits stores it; nothing but arrays and numbers, so it can be sent and kept.

    Attributes:
        codes: uint8 [N, blocks, bytes per block]; or the arrays of `dense.planes_of`, a part of that as wide.
        scales: float32 or float16 [N, blocks].
        zeros: uint8 [N, bytes], None where all of them are the middle of the range.
        k, n: of the weight.
        bits: per stored code.
        block: rows per block.
        width: bits of the grid, at most `bits`; names carry it.
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
        """What there is to store, in the order of the operator's inputs."""
        return (*self.codes, self.scales) if self.zeros is None else (*self.codes, self.scales, self.zeros)

    @property
    def dense(self) -> bool:
        """Whether the codes are planes."""
        return 8 * self.codes[0].shape[-1] != self.block * self.bits

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Packed:
        """The same weight with other arrays, given as `arrays` gives them."""
        count = len(self.codes)
        scales, *zeros = arrays[count:]
        return replace(self, codes=tuple(arrays[:count]), scales=scales, zeros=zeros[0] if zeros else None)


def minimum_runtime(bits: int, *, accuracy_level: int = 4, scale_dtype: type[np.floating] = np.float32) -> str:
    """Returns the oldest onnxruntime whose CPU kernels run weights of `bits` bits as `lower` writes them."""
    return ".".join(map(str, _oldest(_container(bits), accuracy_level, scale_dtype is np.float16)))


def refusal(spec: Spec) -> str:
    """Returns why MatMulNBits cannot hold weights of a number format, "" if it can."""
    if spec.group_size != -1 and spec.group_size % 16:
        return (
            f"group_size={spec.group_size} is not for MatMulNBits: choose -1 (one group per output channel) "
            "or a multiple of 16 (16, 32, 64, 128 and 256 are native)"
        )
    if spec.group_dim != 1:
        return f"group_dim={spec.group_dim} is not for MatMulNBits: its groups are input channels (group_dim=1)"
    return ""


def minimum_opset(spec: Spec, scale_dtype: type[np.floating]) -> int:  # noqa: ARG001 (every operator is asked alike)
    """Returns 0: the operator is of a domain of its own."""
    return 0


def speed(spec: Spec) -> Speed:  # noqa: ARG001
    """Returns "native": every width is run by a kernel of 2, 4 or 8 bits."""
    return "native"


def runtime(node: ir.Node, *, in_body: bool) -> Version | None:
    """Returns the oldest onnxruntime whose CPU kernels run a MatMulNBits of ours, None for any other node."""
    if node.op_type != "MatMulNBits" or "accuracy_level" not in node.attributes:
        return None
    level = node.attributes["accuracy_level"].as_int()
    if in_body and level == 4 and len(node.inputs) > 3 and node.inputs[3] is not None:
        return _BODIES
    return _oldest(node.attributes["bits"].as_int(), level, _is_half(node.inputs[2]))


def native_layout(bits: int, group_size: int, k: int) -> tuple[int, int]:
    """How a weight is stored: (bits per stored code, rows per block).

    A block divides the group, so that every block has one scale. A native group size is its own block; otherwise the
    block that takes the fewest bytes, the larger of equals. At 2 bits only blocks of 32, 64 and 128 have the int8
    kernel; groups that are no multiple of 32 need blocks of 16 all the same.

    Args:
        bits: 1 to 8.
        group_size: rows per scale, -1 for all.
        k: input channels.
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
    """Returns shape and type of each of `Packed.arrays` for a weight `[k, n]`, known before it is solved."""
    container, block = native_layout(spec.bits, spec.group_size, k)
    blocks = -(-k // block)
    byte = np.dtype(np.uint8)
    width = block * container // 8
    form = FORMS[spec.bits] if _is_dense(spec.bits, storage) else None
    codes = (((n, blocks, width // form.parts), byte),) * form.planes if form else (((n, blocks, width), byte),)
    stored = (*codes, ((n, blocks), np.dtype(storage.scale_dtype)))
    return stored if spec.symmetric else (*stored, ((n, -(-blocks * container // 8)), byte))


def packed_from(arrays: Sequence[np.ndarray], k: int, n: int, spec: Spec, storage: Storage) -> Packed:
    """Returns the `Packed` that has these `arrays`, of the shapes that `shapes` gives."""
    container, block = native_layout(spec.bits, spec.group_size, k)
    count = FORMS[spec.bits].planes if _is_dense(spec.bits, storage) else 1
    scales, *zeros = arrays[count:]
    return Packed(tuple(arrays[:count]), scales, zeros[0] if zeros else None, k, n, container, block, spec.bits)


def pack(q: QuantizedTensor, storage: Storage) -> Packed:
    """Lays `q` out as MatMulNBits stores it; codes take no more than their bits where the opset can expand them."""
    k, n = q.codes.shape
    dense = _is_dense(q.bits, storage)
    container, block = native_layout(q.bits, q.group_size, k)
    # Without zero points the kernel takes the middle of its own range, so symmetric codes move there.
    shift = (1 << container - 1) - (1 << q.bits - 1) if q.symmetric and not dense else 0
    scales = spread(q.scales, k, q.group_size, block).T.astype(storage.scale_dtype, order="C")
    zeros = None if q.symmetric else pack_zeros(spread(q.zeros, k, q.group_size, block), container)
    codes = pack_codes(q.codes, container, block, shift)
    if not dense:
        return Packed((codes,), scales, zeros, k, n, container, block, q.bits)
    if q.symmetric:
        gap = FORMS[q.bits].gap
        codes <<= gap
        np.divide(scales, 1 << gap, out=scales)
    planes = planes_of(codes, layout_of(q.bits, symmetric=q.symmetric))
    return Packed(planes, scales, zeros, k, n, container, block, q.bits)


def lower(
    model: Model, group: LinearGroup, packed: Sequence[Packed], *, accuracy_level: int, bias: Sequence[np.ndarray] = ()
) -> list[ir.Value]:
    """Rewrites every site of `tap` in place as MatMulNBits reading `packed`.

    Nodes and outputs keep their names. Sites that share a weight share the new initializers. A Gemm's constant bias
    becomes the bias input, together with what is to be added to the outputs; any other C becomes an Add. bfloat16,
    which has no CPU kernel, is computed in float32 between Casts. Float weights go when nothing reads them any more.

    Args:
        model: the model `tap` was found in.
        tap: every site of it is rewritten.
        packed: its distinct weights, in order.
        accuracy_level: 4 computes with int8 activations, 0 in float.
        bias: float32 [n] for each weight, added to what it makes; none if empty.

    Returns:
        The new initializers, weight by weight.
    """
    model.ir.opset_imports.setdefault(DOMAIN, 1)
    added: dict[int, tuple[ir.Value | None, ...]] = {}
    places = group.weight_indices()  # before any weight goes
    if max(places) + 1 != len(packed):
        raise ValueError(f"{group.name!r} has {max(places) + 1} weights, not {len(packed)}")
    for linear, index in zip(group.linears, places, strict=True):
        if index not in added:
            name = f"{linear.weight_name}_Q{packed[index].width}"
            added[index] = store(model, name, packed[index], linear.dtype)
        _rewrite(model, linear, packed[index], added[index], accuracy_level, bias[index] if bias else None)
    return [value for values in added.values() for value in values if value is not None]


def _is_dense(bits: int, storage: Storage) -> bool:
    """Tells whether codes take no more than their bits in the file: the opset has what expands them at load."""
    return bits in FORMS and storage.opset >= OPSET


def _container(bits: int) -> int:
    """The width a code of `bits` bits is stored in."""
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
    """The inputs of MatMulNBits that describe a weight: codes, scales, zero points or None; the codes get the name.

    What has to be made of the stored arrays first is made in front of everything else, where sessions fold it. If one
    does not, codes must be computed where scales are: the int8 kernel takes scales only together with constant codes,
    and silently computes nonsense when it has got the one without the other.

    Args:
        model: the model.
        name: of the codes.
        packed: the weight.
        dtype: of the activation; scales that are float16 beside another one are cast.
    """
    graph = model.ir.graph  # also for sites in bodies: sessions take large tensors from outside only there
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
    """Adds a MatMulNBits of an activation with a stored weight in front of a node, whose type its output has."""
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
    """The attributes of a MatMulNBits node that multiplies by `packed`."""
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
    """Turns one node into MatMulNBits, and adds the nodes around it for what the float one did itself."""
    node = linear.node
    old = list(node.inputs)
    activation = old[0]
    bias, addend = split_bias(model, linear)
    if correction is not None:
        bias = corrected_bias(model, linear, bias, correction)
    if addend is not None:
        insert_after(node, "Add", [addend], "product")
    if linear.dtype == ir.DataType.BFLOAT16:  # after the Add, so that it comes before it in the graph
        activation = add_node("Cast", [activation], f"{linear.name}_input", before=node, to=ir.DataType.FLOAT)
        product = insert_after(node, "Cast", [], "float32", to=ir.DataType.BFLOAT16)
        product.type = ir.TensorType(ir.DataType.FLOAT)
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
