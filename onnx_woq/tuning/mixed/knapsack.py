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


Units = Sequence[Sequence[Choice]]


def frontier(units: Units) -> list[Allocation]:
    """Returns the allocations that are optimal for a price per byte, from the fewest bytes to the least loss.

    None of any kind has less loss at the bytes of one of them. Bytes rise strictly and losses fall strictly; steps of
    equal slope are taken in the order of the units.

    Raises:
        ValueError: there are no layers, one has no choice, or a loss is negative or not finite.
    """
    _check(units)
    hulls = [_hull(unit) for unit in units]
    steps = sorted(
        (-(unit[a].loss - unit[b].loss) / (unit[b].bytes - unit[a].bytes), index, place, b)
        for index, (unit, hull) in enumerate(zip(units, hulls, strict=True))
        for place, (a, b) in enumerate(itertools.pairwise(hull))
    )
    picks = [hull[0] for hull in hulls]
    points = [_sum(units, picks)]
    for _, index, _, choice in steps:
        picks[index] = choice
        point = _sum(units, picks)
        if point.loss < points[-1].loss:  # not where the step is lost in rounding
            points.append(point)
    return points


def within_bytes(units: Units, most: int) -> Allocation | None:
    """Returns an allocation of at most `most` bytes with little loss, None if the smallest takes more.

    Never worse than the last point of the frontier that fits. What that leaves unused is filled by changing one layer
    at a time, always the one that saves the most; the same is tried from the next point of the frontier, brought
    within the budget by the one change that loses least.

    Raises:
        ValueError: as `frontier`.
    """
    points = frontier(units)
    if points[0].bytes > most:
        return None
    last = max(index for index, point in enumerate(points) if point.bytes <= most)
    filled = [_filled(units, start, most) for start in points[last : last + 2]]
    return min((one for one in filled if one.bytes <= most), key=lambda one: (one.loss, one.bytes))


def within_loss(units: Units, most: float) -> Allocation | None:
    """Returns an allocation that loses at most `most` in few bytes, None if all lose more.

    Never larger than the first point of the frontier within the limit, see `within_bytes`.

    Raises:
        ValueError: as `frontier`.
    """
    points = frontier(units)
    if points[-1].loss > most:
        return None
    first = min(index for index, point in enumerate(points) if point.loss <= most)
    emptied = [_emptied(units, start, most) for start in points[max(0, first - 1) : first + 1]]
    return min((one for one in emptied if one.loss <= most), key=lambda one: (one.bytes, one.loss))


def _check(units: Units) -> None:
    if not units:
        raise ValueError("there is no unit to share bytes out to")
    for unit in units:
        if not unit:
            raise ValueError("a unit has no choice")
        if not all(math.isfinite(choice.loss) for choice in unit):
            raise ValueError("a loss is not finite")
        if any(choice.loss < 0 for choice in unit):
            raise ValueError("a loss is negative")


def _hull(unit: Sequence[Choice]) -> list[int]:
    """Returns the choices on the lower convex hull, by rising bytes and falling loss; the first of equals."""
    hull: list[int] = []
    for new in sorted(range(len(unit)), key=lambda i: (unit[i].bytes, unit[i].loss, i)):
        if hull and unit[new].loss >= unit[hull[-1]].loss:
            continue
        while len(hull) > 1 and not _below(unit[hull[-2]], unit[hull[-1]], unit[new]):
            hull.pop()
        if hull and unit[hull[-1]].bytes == unit[new].bytes:
            hull.pop()
        hull.append(new)
    return hull


def _below(left: Choice, middle: Choice, right: Choice) -> bool:
    """Tells whether `middle` lies below the line from `left` to `right`."""
    saved, whole = left.loss - middle.loss, left.loss - right.loss
    return saved * (right.bytes - left.bytes) > whole * (middle.bytes - left.bytes)


def _sum(units: Units, picks: Sequence[int]) -> Allocation:
    chosen = [unit[pick] for unit, pick in zip(units, picks, strict=True)]
    return Allocation(sum(c.bytes for c in chosen), math.fsum(c.loss for c in chosen), tuple(picks))


def _changes(units: Units, start: Allocation) -> list[tuple[int, float, int, int]]:
    """Returns (bytes added, loss added, layer, choice) of every change of one layer."""
    return [
        (new.bytes - unit[pick].bytes, new.loss - unit[pick].loss, index, choice)
        for index, (unit, pick) in enumerate(zip(units, start.picks, strict=True))
        for choice, new in enumerate(unit)
        if choice != pick
    ]


def _with(units: Units, start: Allocation, unit: int, choice: int) -> Allocation:
    return _sum(units, (*start.picks[:unit], choice, *start.picks[unit + 1 :]))


def _filled(units: Units, start: Allocation, most: int) -> Allocation:
    """Changes one layer at a time, each time the one that saves the most loss within `most` bytes.

    A start of more bytes is first brought within them, by the change that loses least.
    """
    while True:
        over = start.bytes > most
        fitting = [c for c in _changes(units, start) if start.bytes + c[0] <= most and (over or c[1] < 0)]
        if not fitting:
            return start
        _, _, unit, choice = min(fitting, key=lambda c: (c[1], c[0], c[2], c[3]))
        changed = _with(units, start, unit, choice)
        if not over and changed.loss >= start.loss:  # less by less than rounding
            return start
        start = changed


def _emptied(units: Units, start: Allocation, most: float) -> Allocation:
    """Changes one layer at a time, each time the one that saves the most bytes within a loss of `most`.

    A start of more loss is first brought within it, by the change that adds the fewest bytes.
    """
    while True:
        over = start.loss > most
        fitting = (c for c in sorted(_changes(units, start)) if start.loss + c[1] <= most and (over or c[0] < 0))
        for _, _, unit, choice in fitting:
            changed = _with(units, start, unit, choice)
            if changed.loss <= most:  # by no less than rounding
                start = changed
                break
        else:
            return start
