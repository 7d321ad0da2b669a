"""Three-bit codes without gaps in the file: the session that loads it expands them, once.

MatMulNBits has no 3-bit kernel, and in its 4-bit one two codes of three bits are a byte `0ccc0ccc`. The bytes of each
block fall into quarters Q0 … Q3. The file has P0, P1, P2: the first three quarters with the fourth in their gaps, bits
3 and 7, such that in every byte

    (Q0, Q1, Q2, Q3) = (P0, P1, P2, T) & 0x77,    T = ((P2 >> 1 ^ P1) >> 1 ^ P0) >> 1 = P0 >> 1 ^ P1 >> 2 ^ P2 >> 3

What is `>> 1` has its gaps at bits 2 and 6, what is `>> 2` at 1 and 5, what is `>> 3` at 0 and 4: each bit of Q3 is
decided by one gap, whatever codes get there as well. Without zero points the kernel takes 8 for zero, so symmetric
codes are doubled and their scales halved, which is exact: bytes `ccc0ccc0`, and the same mirrored.

These are seven operators, of opset 18, that ONNX Runtime folds. It keeps what lies between them until all weights are
done, so that their outputs are what loading takes in memory: docs/storage.md has figures, and other forms tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node

BITS, OPSET = 3, 18
"""Of codes, and the first opset with bitwise operators: what older ones have takes too much time and memory to load."""

PLANES = 3
"""Arrays that the file has for the codes of a weight."""

_TILE = 1 << 18  # bytes worked on at once, which stay in the cache


@dataclass(frozen=True)
class Layout:
    """Where the three bits lie in their four.

    Attributes:
        mask: the bits of a byte that codes take.
        gaps: the bits of T that the gaps of P0, P1 and P2 decide.
        direction: of the shifts that make T.
        shift: does that.
        back: undoes it.
    """

    mask: int
    gaps: tuple[int, int, int]
    direction: str
    shift: Callable[[np.ndarray, np.uint8], np.ndarray]
    back: Callable[[np.ndarray, np.uint8], np.ndarray]


LOW = Layout(0x77, (0x44, 0x22, 0x11), "RIGHT", np.right_shift, np.left_shift)
HIGH = Layout(0xEE, (0x22, 0x44, 0x88), "LEFT", np.left_shift, np.right_shift)


def layout_of(*, symmetric: bool) -> Layout:
    """The layout of a weight without zero points, or with them."""
    return HIGH if symmetric else LOW


def planes_of(codes: np.ndarray, layout: Layout) -> tuple[np.ndarray, ...]:
    """P0, P1, P2, uint8 `[N, blocks, bytes / 4]`, of codes `[N, blocks, bytes]` that lie as `layout` says."""
    n, blocks, width = codes.shape
    planes = tuple(np.empty((n, blocks, width // 4), np.uint8) for _ in range(PLANES))
    step = max(1, _TILE // max(1, blocks * width))
    for top in range(0, n, step):
        rows = slice(top, top + step)
        *quarters, last = np.split(codes[rows], 4, axis=-1)
        wrong = _fourth(quarters, layout) ^ last
        for i, (plane, quarter) in enumerate(zip(planes, quarters, strict=True)):
            plane[rows] = quarter | layout.back(wrong & np.uint8(layout.gaps[i]), np.uint8(i + 1))
    return planes


def codes_of(planes: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    """The codes `[N, blocks, bytes]` that `planes_of` has made planes of."""
    return np.concatenate((*planes, _fourth(planes, layout)), axis=-1) & np.uint8(layout.mask)


def add_expansion(graph: ir.Graph, name: str, planes: Sequence[np.ndarray], layout: Layout) -> ir.Value:
    """The codes called `name` of a weight, computed from new initializers in front of everything else.

    Args:
        graph: the main graph of a model whose opset is at least 18.
        name: of the codes, with which all other names begin.
        planes: from `planes_of`.
        layout: the same.
    """
    first = graph[0]
    one, mask = (_number(graph, value) for value in (1, layout.mask))
    stored = [add_initializer(graph, f"{name}_plane{i}", plane) for i, plane in enumerate(planes)]
    mixed = stored[-1]
    for plane in (*stored[-2::-1], None):
        fourth = add_node("BitShift", [mixed, one], f"{name}_shifted", before=first, direction=layout.direction)
        if plane is not None:
            mixed = add_node("BitwiseXor", [fourth, plane], f"{name}_mixed", before=first)
    whole = add_node("Concat", [*stored, fourth], f"{name}_unmasked", before=first, axis=-1)
    codes = add_node("BitwiseAnd", [whole, mask], name, before=first)
    n, blocks, width = planes[0].shape
    codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape((n, blocks, 4 * width))
    return codes


def planes_behind(codes: ir.Value) -> tuple[list[ir.Value], Layout] | None:
    """The initializers that `add_expansion` has made of planes, and how the codes lie; None for other values."""
    last = codes.producer()
    whole = _maker(last.inputs[0], "Concat") if last is not None and last.op_type == "BitwiseAnd" else None
    if whole is None or len(whole.inputs) != PLANES + 1:
        return None
    stored = [value for value in whole.inputs[:PLANES] if value is not None and value.const_value is not None]
    shift = _maker(whole.inputs[PLANES], "BitShift")
    if len(stored) < PLANES or shift is None:
        return None
    return stored, LOW if shift.attributes["direction"].as_string() == LOW.direction else HIGH


def _fourth(planes: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    """T."""
    one = np.uint8(1)
    mixed = planes[-1]
    for plane in planes[-2::-1]:
        mixed = layout.shift(mixed, one) ^ plane
    return layout.shift(mixed, one)


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _number(graph: ir.Graph, number: int) -> ir.Value:
    """A constant that all weights of a model share."""
    name = f"onnx_woq.uint8_{number}"
    there = graph.initializers.get(name)
    if there is not None and there.const_value is not None and not there.is_graph_input():
        array = there.const_value.numpy()
        if array.dtype == np.uint8 and array.shape == () and array == number:
            return there
    return add_initializer(graph, name, np.array(number, np.uint8))
