"""Sharing bytes out over layers: which choice each takes so that they lose least together.

A multiple-choice knapsack: each layer takes exactly one of its choices, bytes and losses add up. Of a layer's choices
only those on the lower convex hull of (bytes, loss) can be optimal for some price of a byte; going from one of them to
the next has a slope, loss saved per byte. Taking the steps of all layers by falling slope passes through the optimum of
the relaxed problem at every budget, and after each whole step through an optimum of the problem itself (Sinha and
Zoltners, "The Multiple-Choice Knapsack Problem", 1979; the LP-greedy of Kellerer, Pferschy and Pisinger, "Knapsack
Problems", section 11.2). One sort gives the whole frontier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One way of storing a layer: the bytes it takes and the loss it makes."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """One choice for every layer.

    Attributes:
        bytes: of all of them together.
        loss: likewise.
        picks: the index of each layer's choice.
    """

    bytes: int
    loss: float
    picks: tuple[int, ...]


Layers = Sequence[Sequence[Choice]]


def frontier(layers: Layers) -> list[Allocation]:
    """Returns the allocations that are optimal for a price per byte, from the fewest bytes to the least loss.

    None of any kind has less loss at the bytes of one of them. Bytes rise strictly and losses fall strictly; steps of
    equal slope are taken in the order of the layers.

    Raises:
        ValueError: there are no layers, one has no choice, or a loss is negative or not finite.
    """
    _check(layers)
    hulls = [_hull(layer) for layer in layers]
    steps = sorted(
        (-(layer[a].loss - layer[b].loss) / (layer[b].bytes - layer[a].bytes), index, place, b)
        for index, (layer, hull) in enumerate(zip(layers, hulls, strict=True))
        for place, (a, b) in enumerate(itertools.pairwise(hull))
    )
    picks = [hull[0] for hull in hulls]
    points = [_sum(layers, picks)]
    for _, index, _, choice in steps:
        picks[index] = choice
        point = _sum(layers, picks)
        if point.loss < points[-1].loss:  # not where the step is lost in rounding
            points.append(point)
    return points


def within_bytes(layers: Layers, most: int) -> Allocation | None:
    """Returns an allocation of at most `most` bytes with little loss, None if the smallest takes more.

    Never worse than the last point of the frontier that fits. What that leaves unused is filled by changing one layer
    at a time, always the one that saves the most; the same is tried from the next point of the frontier, brought
    within the budget by the one change that loses least.

    Raises:
        ValueError: as `frontier`.
    """
    points = frontier(layers)
    if points[0].bytes > most:
        return None
    last = max(index for index, point in enumerate(points) if point.bytes <= most)
    filled = [_filled(layers, start, most) for start in points[last : last + 2]]
    return min((one for one in filled if one.bytes <= most), key=lambda one: (one.loss, one.bytes))


def within_loss(layers: Layers, most: float) -> Allocation | None:
    """Returns an allocation that loses at most `most` in few bytes, None if all lose more.

    Never larger than the first point of the frontier within the limit, see `within_bytes`.

    Raises:
        ValueError: as `frontier`.
    """
    points = frontier(layers)
    if points[-1].loss > most:
        return None
    first = min(index for index, point in enumerate(points) if point.loss <= most)
    emptied = [_emptied(layers, start, most) for start in points[max(0, first - 1) : first + 1]]
    return min((one for one in emptied if one.loss <= most), key=lambda one: (one.bytes, one.loss))


def _check(layers: Layers) -> None:
    if not layers:
        raise ValueError("there is no layer to share bytes out to")
    for layer in layers:
        if not layer:
            raise ValueError("a layer has no choice")
        if not all(math.isfinite(choice.loss) for choice in layer):
            raise ValueError("a loss is not finite")
        if any(choice.loss < 0 for choice in layer):
            raise ValueError("a loss is negative")


def _hull(layer: Sequence[Choice]) -> list[int]:
    """Returns the choices on the lower convex hull, by rising bytes and falling loss; the first of equals."""
    hull: list[int] = []
    for new in sorted(range(len(layer)), key=lambda i: (layer[i].bytes, layer[i].loss, i)):
        if hull and layer[new].loss >= layer[hull[-1]].loss:
            continue
        while len(hull) > 1 and not _below(layer[hull[-2]], layer[hull[-1]], layer[new]):
            hull.pop()
        if hull and layer[hull[-1]].bytes == layer[new].bytes:
            hull.pop()
        hull.append(new)
    return hull


def _below(left: Choice, middle: Choice, right: Choice) -> bool:
    """Tells whether `middle` lies below the line from `left` to `right`."""
    saved, whole = left.loss - middle.loss, left.loss - right.loss
    return saved * (right.bytes - left.bytes) > whole * (middle.bytes - left.bytes)


def _sum(layers: Layers, picks: Sequence[int]) -> Allocation:
    chosen = [layer[pick] for layer, pick in zip(layers, picks, strict=True)]
    return Allocation(sum(c.bytes for c in chosen), math.fsum(c.loss for c in chosen), tuple(picks))


def _changes(layers: Layers, start: Allocation) -> list[tuple[int, float, int, int]]:
    """Returns (bytes added, loss added, layer, choice) of every change of one layer."""
    return [
        (new.bytes - layer[pick].bytes, new.loss - layer[pick].loss, index, choice)
        for index, (layer, pick) in enumerate(zip(layers, start.picks, strict=True))
        for choice, new in enumerate(layer)
        if choice != pick
    ]


def _with(layers: Layers, start: Allocation, layer: int, choice: int) -> Allocation:
    return _sum(layers, (*start.picks[:layer], choice, *start.picks[layer + 1 :]))


def _filled(layers: Layers, start: Allocation, most: int) -> Allocation:
    """Changes one layer at a time, each time the one that saves the most loss within `most` bytes.

    A start of more bytes is first brought within them, by the change that loses least.
    """
    while True:
        over = start.bytes > most
        fitting = [c for c in _changes(layers, start) if start.bytes + c[0] <= most and (over or c[1] < 0)]
        if not fitting:
            return start
        _, _, layer, choice = min(fitting, key=lambda c: (c[1], c[0], c[2], c[3]))
        changed = _with(layers, start, layer, choice)
        if not over and changed.loss >= start.loss:  # less by less than rounding
            return start
        start = changed


def _emptied(layers: Layers, start: Allocation, most: float) -> Allocation:
    """Changes one layer at a time, each time the one that saves the most bytes within a loss of `most`.

    A start of more loss is first brought within it, by the change that adds the fewest bytes.
    """
    while True:
        over = start.loss > most
        fitting = (c for c in sorted(_changes(layers, start)) if start.loss + c[1] <= most and (over or c[0] < 0))
        for _, _, layer, choice in fitting:
            changed = _with(layers, start, layer, choice)
            if changed.loss <= most:  # by no less than rounding
                start = changed
                break
        else:
            return start
