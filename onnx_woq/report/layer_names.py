"""Layer names: the place of a weight in a picture of its network, worked out from the names of nodes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

# Parts of a name that say nothing about the weight: operators, counters, the word model.
_DULL = re.compile(r"(MatMul|Gemm|FusedMatMul)?(_?output)?(_\d+)?|model|#", re.IGNORECASE)


_LAYER = "\0"
"""Stands for the number of the layer in a kind, until all are known: no name has it."""


def layer_positions(names: Sequence[str], shapes: Sequence[tuple[int, int]] = ()) -> list[tuple[int | None, str]]:
    """Returns layer and kind of each weight: the number that tells repetitions of a pattern apart, and the pattern.

    `/layers.3/mlp/down_proj/MatMul` is layer 3 of the kind `/layers.#/mlp/down_proj/MatMul`. The layer is None for a
    name whose pattern does not repeat. If most names have one pattern, such as `MatMul_17`, it says nothing. Weights
    are then told apart by their shapes, and the layer is a count.

    Args:
        names: names of nodes in graph order.
        shapes: shapes (K, N) of their weights, if known.
    """
    patterns = defaultdict(list)  # by what is between the numbers: a name may hold a # of its own
    for index, name in enumerate(names):
        patterns[tuple(re.split(r"\d+", name))].append(index)
    found: list[tuple[int | None, str]] = [(None, name) for name in names]
    for between, members in patterns.items():
        numbers = [[int(number) for number in re.findall(r"\d+", names[index])] for index in members]
        if len(members) < 2 or not numbers[0]:
            continue
        if shapes and 2 * len(members) > len(names) and len({shapes[index] for index in members}) > 1:
            counts: dict[tuple[int, int], int] = defaultdict(int)
            for index in members:
                k, n = shapes[index]
                found[index] = counts[k, n], f"{_LAYER.join(between)}/{k} × {n}"
                counts[k, n] += 1
            continue
        distinct = [len(set(column)) for column in zip(*numbers, strict=True)]
        slot = distinct.index(max(distinct))
        for index, row in zip(members, numbers, strict=True):
            found[index] = row[slot], _kind(names[index], slot)
    return _told_apart(names, found)


def short_names(kinds: Sequence[str]) -> list[str]:
    """Returns a short name for each kind, no two alike: as much of its end as tells it apart, without operators."""
    parts = [[part for part in re.split(r"[/.]", kind) if not _DULL.fullmatch(part)] or [kind] for kind in kinds]
    found = []
    for index, own in enumerate(parts):
        others = [other for at, other in enumerate(parts) if at != index]
        lengths = range(min(2, len(own)), len(own) + 1)
        enough = next((n for n in lengths if all(other[-n:] != own[-n:] for other in others)), len(own))
        label = "/".join(own[-enough:])
        found.append(label if len(label) <= 32 else f"…{label[-31:]}")
    seen: dict[str, int] = defaultdict(int)
    for index, label in enumerate(found):
        seen[label] += 1
        found[index] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return found


def _kind(name: str, slot: int) -> str:
    """Returns the name with `_LAYER` for the number in place `slot`, that of its layer."""
    count = iter(range(len(name)))
    return re.sub(r"\d+", lambda match: _LAYER if next(count) == slot else match[0], name)


def _told_apart(names: Sequence[str], found: Sequence[tuple[int | None, str]]) -> list[tuple[int | None, str]]:
    """Returns the places with # for the layer in their kinds, no two kinds and no two weights of a kind alike.

    A name may have a # of its own, so two kinds may look alike then: the second gets a number. Of two weights in one
    place, as `layer.1` and `layer.01`, the second has no layer.
    """
    labels: dict[str, str] = {}
    seen: set[tuple[int, str]] = set()
    places: list[tuple[int | None, str]] = []
    for name, (layer, kind) in zip(names, found, strict=True):
        if layer is None or (layer, kind) in seen:
            places.append((None, name))
            continue
        seen.add((layer, kind))
        if kind not in labels:
            plain = kind.replace(_LAYER, "#")
            alike = sum(label == plain or label.startswith(f"{plain} (") for label in labels.values())
            labels[kind] = f"{plain} ({alike + 1})" if alike else plain
        places.append((layer, labels[kind]))
    return places
