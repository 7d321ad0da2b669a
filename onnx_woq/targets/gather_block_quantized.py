"""GatherBlockQuantized: the operator of ONNX Runtime that looks up rows of 2, 4 and 8-bit tables.

Its layout is that of MatMulNBits (com.microsoft, see ContribOperators.md of ONNX Runtime), except that the codes of a
row lie in one piece instead of in blocks. So a head that is tied to its embedding table shares its codes: they are
stored once, and the table reads them through a Reshape, which the runtime folds when it loads the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node, insert_after, prune
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.base import Version
from onnx_woq.targets.matmulnbits import (
    BY_CHANNEL,
    DOMAIN,
    Packed,
    minimum_opset,
    pack,
    packed_from,
    refusal,
    scale_factor,
    shapes,
    speed,
    store,
)

__all__ = [
    "BY_CHANNEL",
    "SHARES",
    "lower",
    "minimum_opset",
    "pack",
    "packed_from",
    "refusal",
    "runtime",
    "scale_factor",
    "shapes",
    "share",
    "speed",
]

SHARES = True

_OLDEST = {2: (1, 27), 4: (1, 23), 8: (1, 23)}  # the runtime with a kernel for uint8 codes of so many bits, each tried
_RAGGED = (1, 27)  # older kernels read wrong zero points, silently, where those of a row do not fill whole bytes


def runtime(node: ir.Node, *, in_body: bool) -> Version | None:  # noqa: ARG001 (every operator is asked alike)
    """Returns the oldest onnxruntime whose CPU kernel runs a GatherBlockQuantized, None for any other node."""
    if node.op_type != "GatherBlockQuantized":
        return None
    bits = node.attributes["bits"].as_int()
    scales, zeros = node.inputs[2], node.inputs[3] if len(node.inputs) > 3 else None
    blocks = scales.shape[1] if scales is not None and scales.shape is not None else 1
    ragged = zeros is not None and (not isinstance(blocks, int) or blocks * bits % 8)
    return _RAGGED if ragged else _OLDEST[bits]


@dataclass(frozen=True)
class _Table:
    """The constants that a GatherBlockQuantized reads.

    Attributes:
        codes: uint8 `[V, bytes]`.
        scales: `[V, blocks]`.
        zeros: uint8 `[V, bytes]`; None where all zero points are the middle of the range.
        bits: bits of a stored code.
        block: columns that share a scale.
    """

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int
    block: int

    @property
    def columns(self) -> int:
        """Returns the columns of a row that is looked up: those of whole blocks, at least D."""
        blocks = self.scales.shape[1] if self.scales.shape is not None else 0
        return int(blocks) * self.block  # type: ignore[arg-type]


def lower(model: Model, embedding: Embedding, packed: Packed) -> None:
    """Rewrites every Gather of a table as GatherBlockQuantized; nodes and outputs keep their names.

    The float table is removed once nothing reads it.

    Args:
        model: the model that holds the table.
        embedding: the table `[V, D]`.
        packed: the table as a weight `[D, V]`.
    """
    name = f"{embedding.weight_name}_Q{packed.width}_table"
    codes, scales, zeros = store(model, name, packed, embedding.dtype)
    if codes is None or scales is None:
        raise ValueError(f"{embedding.name!r} has no codes or no scales")
    stored = codes.const_value
    if isinstance(stored, ir.Tensor):  # the bytes are in order already: only their shape is another
        codes.const_value = ir.Tensor(stored.raw, name=codes.name, shape=_flat(packed))
        codes.shape = _flat(packed)
    else:
        codes = _rows(model, codes, embedding)
    _rewrite(model, embedding, _Table(codes, scales, zeros, packed.bits, packed.block), None)


def share(model: Model, embedding: Embedding, input_scale: np.ndarray | None) -> None:
    """Rewrites every Gather of a table as GatherBlockQuantized that reads the codes of its head.

    Args:
        model: the model that holds both.
        embedding: the table `[V, D]`, whose head is lowered already.
        input_scale: `[D]` if the codes are those of `diag(input_scale) @ W` (AWQ): rows are then divided by it.

    Raises:
        ValueError: there is no head, or it is float still.
    """
    head = embedding.head.node if embedding.head else None
    if head is None or head.op_type != "MatMulNBits":
        raise ValueError(f"{embedding.name!r} has no quantized head to share codes with")
    codes, scales = head.inputs[1], head.inputs[2]
    if codes is None or scales is None:
        raise ValueError(f"{embedding.head and embedding.head.name!r} has no codes or no scales")
    zeros = head.inputs[3] if len(head.inputs) > 3 else None
    bits, block = (head.attributes[name].as_int() for name in ("bits", "block_size"))
    _rewrite(model, embedding, _Table(_rows(model, codes, embedding), scales, zeros, bits, block), input_scale)


def _flat(packed: Packed) -> ir.Shape:
    (codes,) = packed.codes
    return ir.Shape((packed.n, codes[0].size))


def _rows(model: Model, codes: ir.Value, embedding: Embedding) -> ir.Value:
    """Adds a Reshape of codes `[V, blocks, bytes]` to `[V, bytes]`, behind the node that makes them, if any does."""
    graph = model.ir.graph  # also for a Gather in a body: sessions fold constants in the main graph only
    shape = add_initializer(graph, f"{codes.name}_flat", np.array([embedding.n, -1], np.int64))
    maker = codes.producer()
    rows = add_node("Reshape", [codes, shape], f"{codes.name}_rows", before=None if maker else graph[0], after=maker)
    rows.type = ir.TensorType(ir.DataType.UINT8)
    return rows


def _rewrite(model: Model, embedding: Embedding, table: _Table, input_scale: np.ndarray | None) -> None:
    """Turns each Gather into GatherBlockQuantized, and adds the Slice, Mul and Cast that its rows need behind it."""
    model.ir.opset_imports.setdefault(DOMAIN, 1)
    graph, dtype = model.ir.graph, table.scales.dtype
    inverse = None
    if input_scale is not None:
        factors = (1.0 / np.asarray(input_scale, np.float64)).astype(dtype.numpy())  # type: ignore[union-attr]
        inverse = add_initializer(graph, f"{embedding.name}_inverse_scale", factors)
    cut = []
    if table.columns != embedding.k:
        ends = {"starts": 0, "ends": embedding.k, "axes": -1}
        cut = [add_initializer(graph, f"{embedding.name}_{k}", np.array([v], np.int64)) for k, v in ends.items()]
    for node in embedding.nodes:
        old, indices = node.inputs[:2]
        # Each is inserted right behind the node, so the one that is to run last is inserted first.
        if dtype != embedding.dtype:
            insert_after(node, "Cast", [], "stored", to=embedding.dtype).type = ir.TensorType(dtype)  # type: ignore[arg-type]
        if inverse is not None:
            insert_after(node, "Mul", [inverse], "scaled")
        if cut:
            insert_after(node, "Slice", cut, "padded").shape = None
        inputs = [table.codes, indices, table.scales] + ([] if table.zeros is None else [table.zeros])
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        node.domain, node.op_type, node.version = DOMAIN, "GatherBlockQuantized", None
        node.attributes.clear()
        numbers = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1}
        for name, number in numbers.items():
            node.attributes.add(ir.AttrInt64(name, number))
        prune(old)
