"""Where a weight belongs in a picture of its network: the layer it is in, and which of the layer's weights it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

_DULL = re.compile(r"(MatMul|Gemm|FusedMatMul)?(_?output)?(_\d+)?|model|#", re.IGNORECASE)


def places(names: Sequence[str], shapes: Sequence[tuple[int, int]] = ()) -> list[tuple[int | None, str]]:
    """Layer and kind of each name: the number that tells the repetitions of a pattern apart, and the pattern.

    `/layers.3/mlp/down_proj/MatMul` is layer 3 of `/layers.#/mlp/down_proj/MatMul`. A name that repeats nowhere has no
    layer. Names that are all alike, as in `MatMul_17`, say nothing: what has their pattern is told apart by shape, and
    the layer is a count.

    Args:
        names: in graph order.
        shapes: of the weights, [K, N].
    """
    patterns = defaultdict(list)
    for index, name in enumerate(names):
        patterns[re.sub(r"\d+", "#", name)].append(index)
    found: list[tuple[int | None, str]] = [(None, name) for name in names]
    for pattern, members in patterns.items():
        numbers = [[int(number) for number in re.findall(r"\d+", names[index])] for index in members]
        if len(members) < 2 or not numbers[0]:
            continue
        if shapes and 2 * len(members) > len(names) and len({shapes[index] for index in members}) > 1:
            counts: dict[tuple[int, int], int] = defaultdict(int)
            for index in members:
                k, n = shapes[index]
                found[index] = counts[k, n], f"{pattern}/{k} × {n}"
                counts[k, n] += 1
            continue
        distinct = [len(set(column)) for column in zip(*numbers, strict=True)]
        slot = distinct.index(max(distinct))
        for index, row in zip(members, numbers, strict=True):
            found[index] = row[slot], _kind(names[index], slot)
    return found


def labels(kinds: Sequence[str]) -> list[str]:
    """A short name for each kind, no two alike: the end of it, without what it shares with all and with operators."""
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
    """The name with its layer's number left open."""
    count = iter(range(len(name)))
    return re.sub(r"\d+", lambda match: "#" if next(count) == slot else match[0], name)
