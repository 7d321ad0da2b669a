"""Bit planes: a gapless form of codes of 1, 3, 5, 6 and 7 bits in the file, which the session expands when it loads.

MatMulNBits has kernels for 2, 4 and 8 bits only. A code of another width lies in the next wider **container** and
leaves a **gap** of unused bits: two 3-bit codes are a byte `0ccc0ccc`, one 5-bit code is `000ccccc`. To save the gaps,
the bytes of each block are cut into equal **parts** Q0, Q1, …. The file stores the first few as **planes** P0, P1, …
and hides the others in the gaps of the planes, such that for every byte

    (Q0, …, Qm) = (P0, P1, …, T, …) & mask,    T = P_a >> s_a ^ P_b >> s_b ^ …

where T is a hidden part. Each bit of a hidden part is set by one gap bit that is shifted to its place; code bits that
are shifted there too are known when it is set. With 3 bits the gaps are bits 3 and 7, and
`T = P0 >> 1 ^ P1 >> 2 ^ P2 >> 3`.

Symmetric codes have no zero points, and the kernel then takes the middle of the container for zero. So they are moved
up by the width of the gap (bytes `ccc0ccc0`, all shifts mirrored) and their scales are divided by as much. That is
exact, except for float16 scales that leave the normal range (below 2**-13 with 3 bits): values then move by up to 4e-6.

The expansion takes four operators of opset 18, which ONNX Runtime folds into constants at load. It keeps their outputs
until all weights are done, so these are the memory that loading takes: docs/storage.md has figures and other forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node

OPSET = 18
"""The first opset with bitwise operators: what older ones offer takes too much time and memory to load."""

_TILE = 1 << 18  # bytes worked on at once, which stay in the cache


@dataclass(frozen=True)
class Form:
    """The form in which codes of one width lie in the file.

    Attributes:
        gap: the bits of a container that its code leaves unused.
        mask: the bits of a byte that codes take, with the gaps above them.
        planes: the number of planes in the file.
        hidden: for each hidden part, (plane, shift) of the terms that are combined to it.
    """

    gap: int
    mask: int
    planes: int
    hidden: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def parts(self) -> int:
        """Returns the number of parts that a block is cut into."""
        return self.planes + len(self.hidden)


def _chain(gap: int, mask: int, planes: int) -> Form:
    """Returns the form of a width that is a multiple of its gap: one part is hidden in all the others."""
    return Form(gap, mask, planes, (tuple((i, gap * (i + 1)) for i in range(planes)),))


FORMS: Mapping[int, Form] = {
    1: _chain(1, 0x55, 1),
    3: _chain(1, 0x77, 3),
    # The first two hidden parts each take the gap of one plane and two bits of another's; the third takes the rest.
    5: Form(3, 0x1F, 5, (((0, 3), (1, 6)), ((2, 3), (3, 6)), ((4, 3), (1, 5), (3, 4)))),
    6: _chain(2, 0x3F, 3),
    7: _chain(1, 0x7F, 7),
}
"""The form of each width that no kernel has, by bits of a code."""


@dataclass(frozen=True)
class Layout:
    """A form, or its mirror image for symmetric codes.

    Attributes:
        form: the form.
        mirrored: codes lie above their gaps, and shifts go left.
    """

    form: Form
    mirrored: bool

    @property
    def mask(self) -> int:
        """Returns the bits of a byte that codes take."""
        return self.form.mask << self.form.gap & 0xFF if self.mirrored else self.form.mask

    @property
    def direction(self) -> str:
        """Returns the direction in which BitShift moves planes to make hidden parts."""
        return "LEFT" if self.mirrored else "RIGHT"

    @property
    def shift(self) -> Callable[[np.ndarray, np.uint8], np.ndarray]:
        """Returns the NumPy function that shifts in that direction."""
        return np.left_shift if self.mirrored else np.right_shift

    @property
    def back(self) -> Callable[[np.ndarray, np.uint8], np.ndarray]:
        """Returns the NumPy function that shifts in the other direction."""
        return np.right_shift if self.mirrored else np.left_shift

    def owned(self) -> list[list[int]]:
        """Returns, for each hidden part, the bits of it that the gap of each of its planes sets."""
        free = [~self.mask & 0xFF] * self.form.planes
        found = []
        for terms in self.form.hidden:
            left, owned = self.mask, []
            for plane, by in terms:
                bits = left & (free[plane] << by if self.mirrored else free[plane] >> by)
                free[plane] ^= bits >> by if self.mirrored else bits << by
                left ^= bits
                owned.append(bits)
            found.append(owned)
        return found


def layout_of(bits: int, *, symmetric: bool) -> Layout:
    """Returns the layout of codes of a width in `FORMS`; symmetric codes have no zero points."""
    return Layout(FORMS[bits], symmetric)


def planes_of(codes: np.ndarray, layout: Layout) -> tuple[np.ndarray, ...]:
    """Returns the planes, uint8 `[N, blocks, bytes / parts]` each, of codes `[N, blocks, bytes]` in containers."""
    n, blocks, width = codes.shape
    form, owned = layout.form, layout.owned()
    planes = tuple(np.empty((n, blocks, width // form.parts), np.uint8) for _ in range(form.planes))
    step = max(1, _TILE // max(1, blocks * width))
    for top in range(0, n, step):
        parts = np.split(codes[top : top + step], form.parts, axis=-1)
        made = [plane[top : top + step] for plane in planes]
        for plane, part in zip(made, parts, strict=False):
            plane[...] = part
        for terms, decided, part in zip(form.hidden, owned, parts[form.planes :], strict=True):
            wrong = _hidden(made, terms, layout) ^ part
            for (index, by), bits in zip(terms, decided, strict=True):
                made[index] |= layout.back(wrong & np.uint8(bits), np.uint8(by))
    return planes


def codes_of(planes: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    """Returns the codes `[N, blocks, bytes]` in containers that `planes_of` made planes of."""
    hidden = (_hidden(planes, terms, layout) for terms in layout.form.hidden)
    return np.concatenate((*planes, *hidden), axis=-1) & np.uint8(layout.mask)


def add_expansion(graph: ir.Graph, name: str, planes: Sequence[np.ndarray], layout: Layout) -> ir.Value:
    """Adds planes to a graph, and the nodes that expand them in front of all others; returns the codes.

    Args:
        graph: the main graph of a model whose opset is at least 18.
        name: the name of the codes; the names of planes and nodes begin with it.
        planes: from `planes_of`.
        layout: the layout that `planes_of` was given.
    """
    first = graph[0]
    stored = [add_initializer(graph, f"{name}_plane{i}", plane) for i, plane in enumerate(planes)]

    def shifted(plane: int, by: int) -> ir.Value:
        amount = _number(graph, by)
        return add_node(
            "BitShift", [stored[plane], amount], f"{name}_shifted", before=first, direction=layout.direction
        )

    def mixed(one: ir.Value, other: ir.Value) -> ir.Value:
        return add_node("BitwiseXor", [one, other], f"{name}_mixed", before=first)

    hidden = [reduce(mixed, [shifted(*term) for term in terms]) for terms in layout.form.hidden]
    whole = add_node("Concat", [*stored, *hidden], f"{name}_unmasked", before=first, axis=-1)
    codes = add_node("BitwiseAnd", [whole, _number(graph, layout.mask)], name, before=first)
    n, blocks, width = planes[0].shape
    codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape((n, blocks, layout.form.parts * width))
    return codes


def planes_behind(codes: ir.Value) -> tuple[list[ir.Value], Layout] | None:
    """Returns the planes and the layout of codes that `add_expansion` made, None for any other value."""
    last = _maker(codes, "BitwiseAnd")
    whole = _maker(last.inputs[0], "Concat") if last is not None else None
    mask = last.inputs[1].const_value if last is not None and last.inputs[1] is not None else None
    if whole is None or mask is None:
        return None
    layouts = (Layout(form, mirrored) for form in FORMS.values() for mirrored in (False, True))
    layout = next((one for one in layouts if mask.size == 1 and one.mask == mask.numpy()), None)
    if layout is None or len(whole.inputs) != layout.form.parts:
        return None
    stored = [
        value for value in whole.inputs[: layout.form.planes] if value is not None and value.const_value is not None
    ]
    return (stored, layout) if len(stored) == layout.form.planes else None


def _hidden(planes: Sequence[np.ndarray], terms: Sequence[tuple[int, int]], layout: Layout) -> np.ndarray:
    """Returns a hidden part, not masked yet."""
    return reduce(np.bitwise_xor, (layout.shift(planes[plane], np.uint8(by)) for plane, by in terms))


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _number(graph: ir.Graph, number: int) -> ir.Value:
    """Returns a uint8 constant, which all weights of a model share."""
    name = f"onnx_woq.uint8_{number}"
    there = graph.initializers.get(name)
    if there is not None and there.const_value is not None and not there.is_graph_input():
        array = there.const_value.numpy()
        if array.dtype == np.uint8 and array.shape == () and array == number:
            return there
    return add_initializer(graph, name, np.array(number, np.uint8))
