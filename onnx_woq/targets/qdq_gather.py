"""QDQ for embedding tables: ONNX's own operators gather rows of codes and dequantize them.

In front of a Gather, a DequantizeLinear would decode the whole table for every row (docs/qdq.md). Behind it, the values
are the same, and it is nearly as fast as GatherBlockQuantized. Gather knows no types below 8 bits, so several codes of
2 or 4 bits are packed into a byte and bitwise operators unpack them: of a row of D codes, byte j holds codes j,
j + D/4, j + D/2, … at 2 bits, or j and j + D/2 at 4 bits, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.edit import add_initializer, add_node, insert_after, prune
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.base import Shapes, Speed, Storage, Version
from onnx_woq.targets.qdq import container

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor

BY_CHANNEL = True
SHARES = False

_OPSET = 21  # the first whose DequantizeLinear has blocks


@dataclass(frozen=True)
class Packed:
    """One table `[V, D]`, which is the weight `[K = D, N = V]`.

    Attributes:
        codes: uint8 `[V, bytes]`.
        scales: float32 or float16 `[V, G]`.
        zeros: uint8 `[V, G]`; None where all zero points are the middle of the range.
        columns: D.
        bits: bits of a stored code: 2, 4 or 8.
        block: columns that share a scale.
        width: bits of a code of the number format, at most `bits`; names of initializers carry it.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    columns: int
    bits: int
    block: int
    width: int

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns the arrays to store: codes, scales and perhaps zero points."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Packed:
        """Returns the same table with other arrays, given as `arrays` gives them."""
        codes, scales, *zeros = arrays
        return replace(self, codes=codes, scales=scales, zeros=zeros[0] if zeros else None)


def refusal(spec: Spec) -> str:
    """Returns the reason why a table cannot have a number format, "" if it can."""
    if spec.group_dim != 1:
        return "group_dim=0 is not for embeddings: a row that is looked up needs scales of its own"
    return ""


def minimum_opset(spec: Spec, scale_dtype: type[np.floating]) -> int:  # noqa: ARG001  (the signature is that of the protocol)
    """Returns 21, the first opset whose DequantizeLinear has blocks."""
    return _OPSET


def speed(spec: Spec) -> Speed:  # noqa: ARG001
    """Returns "native": rows are decoded as they are looked up."""
    return "native"


def runtime(node: ir.Node, *, in_body: bool) -> Version | None:  # noqa: ARG001
    """Returns the oldest onnxruntime that runs a DequantizeLinear of gathered codes, None for any other node."""
    blocked = node.op_type == "DequantizeLinear" and "block_size" in node.attributes
    return (1, 19) if blocked and not node.domain else None


def scale_factor(spec: Spec, storage: Storage) -> float:  # noqa: ARG001
    """Returns 1: scales are stored as they are."""
    return 1.0


def shapes(k: int, n: int, spec: Spec, storage: Storage) -> Shapes:
    """Returns the shape and type of each of `Packed.arrays` for a table `[n, k]`, known before it is solved."""
    groups = -(-k // spec.resolved_group(k))
    byte = np.dtype(np.uint8)
    stored = (((n, -(-k // _per_byte(spec.bits))), byte), ((n, groups), np.dtype(storage.scale_dtype)))
    return stored if spec.symmetric else (*stored, ((n, groups), byte))


def packed_from(arrays: Sequence[np.ndarray], k: int, n: int, spec: Spec, storage: Storage) -> Packed:  # noqa: ARG001
    """Returns the packed table `[n, k]` that has these arrays, whose shapes are those that `shapes` gives."""
    codes, scales, *zeros = arrays
    block = spec.resolved_group(k)
    return Packed(codes, scales, zeros[0] if zeros else None, k, container(spec.bits), block, spec.bits)


def pack(q: QuantizedTensor, storage: Storage) -> Packed:
    """Lays the codes `[D, V]` of a table out row by row, several to a byte where they are narrow."""
    k, n = q.codes.shape
    bits, per = container(q.bits), _per_byte(q.bits)
    part = -(-k // per)
    rows = np.zeros((per * part, n), np.uint8)
    rows[:k] = q.codes
    codes = rows[:part]
    for place in range(1, per):
        codes = codes | rows[place * part : (place + 1) * part] << np.uint8(place * bits)
    scales = np.ascontiguousarray(q.scales.T, storage.scale_dtype)
    zeros = None if q.symmetric else np.ascontiguousarray(q.zeros.T)
    return Packed(np.ascontiguousarray(codes.T), scales, zeros, k, bits, q.group_size, q.bits)


def lower(model: Model, embedding: Embedding, packed: Packed) -> None:
    """Rewrites every Gather of a table as a DequantizeLinear of gathered codes; nodes and outputs keep their names."""
    graph = model.ir.graph  # also for a Gather in a body: sessions read external data in the main graph only
    codes = add_initializer(graph, f"{embedding.weight_name}_Q{packed.width}_table", packed.codes)
    scales = add_initializer(graph, f"{codes.name}_scales", packed.scales)
    zeros = None if packed.zeros is None else add_initializer(graph, f"{codes.name}_zero_points", packed.zeros)
    wanted = ir.DataType.FLOAT if embedding.dtype == ir.DataType.BFLOAT16 else embedding.dtype
    for node in embedding.nodes:
        old, indices = node.inputs[:2]
        gather = _Gather(node, indices, node.outputs[0].name or "rows")
        scale = gather.rows(scales, "scales")
        zero = gather.middle(scale, packed.width) if zeros is None else gather.rows(zeros, "zero_points")
        if scales.dtype != wanted:
            scale = add_node("Cast", [scale], f"{gather.name}_wide", before=node, to=wanted)
        rows = _codes(gather, model, codes, packed)
        if embedding.dtype != wanted:
            insert_after(node, "Cast", [], "float32", to=embedding.dtype).type = ir.TensorType(wanted)
        node.resize_inputs(3)
        for index, value in enumerate((rows, scale, zero)):
            node.replace_input_with(index, value)
        node.domain, node.op_type, node.version = "", "DequantizeLinear", None
        node.attributes.clear()
        for name, number in {"axis": -1, "block_size": packed.block}.items():
            node.attributes.add(ir.AttrInt64(name, number))
        prune(old)


def share(model: Model, embedding: Embedding, input_scale: np.ndarray | None) -> None:  # noqa: ARG001
    """Raises an error: a product that sessions fuse cannot read the codes of its table.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{embedding.name!r} cannot share codes with its head under QDQ")


@dataclass(frozen=True)
class _Gather:
    """A Gather that is being rewritten.

    Attributes:
        node: the node, in front of which others are added.
        indices: the rows that it looks up.
        name: the beginning of the names of added nodes.
    """

    node: ir.Node
    indices: ir.Value | None
    name: str

    def rows(self, table: ir.Value, suffix: str) -> ir.Value:
        """Adds a Gather of the same rows of another table; returns them."""
        rows = add_node("Gather", [table, self.indices], f"{self.name}_{suffix}", before=self.node, axis=0)
        rows.type = ir.TensorType(table.dtype or ir.DataType.UINT8)
        return rows

    def middle(self, scales: ir.Value, bits: int) -> ir.Value:
        """Adds a zero point for each gathered scale, the middle of the range of `bits` bits; returns them."""
        shape = add_node("Shape", [scales], f"{self.name}_shape", before=self.node)
        half = ir.Tensor(np.array([1 << bits - 1], np.uint8))
        return add_node("ConstantOfShape", [shape], f"{self.name}_zero_points", before=self.node, value=half)


def _codes(gather: _Gather, model: Model, codes: ir.Value, packed: Packed) -> ir.Value:
    """Adds the nodes that look up rows of bytes and unpack them; returns uint8 codes `[..., D]`."""
    rows = gather.rows(codes, "codes")
    per = _per_byte(packed.width)
    if per == 1:
        return rows
    graph, before = model.ir.graph, gather.node
    mask = add_initializer(graph, f"{gather.name}_mask", np.array((1 << packed.bits) - 1, np.uint8))
    parts = []
    for place in range(per):
        by = add_initializer(graph, f"{gather.name}_shift", np.array(place * packed.bits, np.uint8))
        part = add_node("BitShift", [rows, by], f"{gather.name}_shifted", before=before, direction="RIGHT")
        parts.append(add_node("BitwiseAnd", [part, mask], f"{gather.name}_part", before=before))
    whole = add_node("Concat", parts, f"{gather.name}_whole", before=before, axis=-1)
    if packed.codes.shape[1] * per == packed.columns:
        return whole
    ends = {"starts": 0, "ends": packed.columns, "axes": -1}
    cut = [add_initializer(graph, f"{gather.name}_{k}", np.array([v], np.int64)) for k, v in ends.items()]
    return add_node("Slice", [whole, *cut], f"{gather.name}_cut", before=before)


def _per_byte(bits: int) -> int:
    return 8 // container(bits)
