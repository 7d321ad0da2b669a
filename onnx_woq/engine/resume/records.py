"""The journal of a resumable output: a record for each solved weight, and which of them still count.

Line 1 says what the result is of. Each further line has a weight's name, where its data end in the data file and their
checksum, the arrays too small for that file, the input scale, what is added to outputs, and the error. A line counts
only if the data it speaks of are there, whatever order they reached the disk in. Shapes and places follow from model
and recipe alone: nothing that stands in a journal can lead to reading or writing anywhere else.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.engine.plan import PlannedWeight
from onnx_woq.engine.solve import Solved
from onnx_woq.graph.edit import LARGE
from onnx_woq.graph.io.save import next_place

_FORMAT = 1

Read = Callable[[tuple[int, ...], np.dtype, int], np.ndarray]
"""Gives the array of a shape and type at a place of the data file; ValueError where the file ends before."""


@dataclass(frozen=True)
class Entry:
    """A solved weight as journal and data file have it.

    Attributes:
        name: of the weight.
        solved: what became of it.
        end: where its data end in the data file.
        line_end: where its line ends in the journal.
    """

    name: str
    solved: Solved
    end: int
    line_end: int


def assign_offsets(sizes: Iterable[int], end: int) -> tuple[list[int | None], int]:
    """Assigns each of some arrays an offset in a data file; returns the offsets and the new end of the file.

    None for an array that is too small for the data file.
    """
    places: list[int | None] = []
    for nbytes in sizes:
        place = next_place(end, nbytes) if nbytes > LARGE else None
        places.append(place)
        end = end if place is None else place + nbytes
    return places, end


def most_bytes(weights: Iterable[PlannedWeight]) -> int:
    """Returns the longest that a data file of these weights can be, in whatever order they come."""
    shapes = (shape for weight in weights for shapes in weight.shapes() for shape in shapes)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    return sum(next_place(1, size) + size for size in sizes if size > LARGE)


def head(key: Mapping[str, str]) -> bytes:
    """Returns the first line: what the output follows from, by the names that people know it under."""
    return _line({"format": _FORMAT, "key": dict(key)})


def first_line(journal: bytes) -> bytes:
    """Returns the first line of a journal, empty if it was cut short."""
    return journal[: journal.find(b"\n") + 1]


def record_line(weight: PlannedWeight, solved: Solved, end: int) -> bytes:
    """Returns the record of a solved weight whose data end at `end`."""
    arrays = arrays_of(solved)
    check = 0
    for array in arrays:
        check = zlib.crc32(raw(array), check)
    return _line(
        {
            "tap": weight.name,
            "end": end,
            "check": check,
            "small": [_text(array) for array in arrays if array.nbytes <= LARGE],
            "input_scale": None if solved.input_scale is None else _text(solved.input_scale),
            "bias": [_text(bias) for bias in solved.bias],
            "error": solved.error,
        }
    )


def finished(
    journal: bytes, weights: Iterable[PlannedWeight], blocks: Sequence[Sequence[PlannedWeight]], read: Read
) -> tuple[list[Entry], int]:
    """Returns the weights of all blocks that are finished, in order, as far as the data bear the journal out.

    Args:
        journal: all of it; the first line is the caller's to judge.
        weights: all there are.
        blocks: the same in weights.
        read: gives an array of the data file.

    Returns:
        The entries, and where the last of their lines ends.
    """
    by_name = {weight.name: weight for weight in weights}
    start = len(first_line(journal))
    found: dict[str, Entry] = {}
    position, end = start, 0
    for line in journal[start:].splitlines(keepends=True):
        said = _parsed(line)
        weight = by_name.get(str(said.get("tap")))
        solved = None if weight is None or weight.name in found else _read_back(said, weight, end, read)
        if weight is None or solved is None:
            break
        position, end = position + len(line), said["end"]
        found[weight.name] = Entry(weight.name, solved, end, position)
    whole = {weight.name for block in blocks if all(weight.name in found for weight in block) for weight in block}
    entries = []
    for entry in found.values():
        if entry.name not in whole:
            break
        entries.append(entry)
    return entries, entries[-1].line_end if entries else start


def difference(folder: Path, key: Mapping[str, str], first: bytes) -> str:
    """Returns why the resumable output in `folder` is not the one of `key`, by its journal's first line."""
    was = _parsed(first).get("key")
    was = was if isinstance(was, dict) else {}
    other = [name for name in key if was.get(name) != key[name]] or ["format"]
    return (
        f"the unfinished result in {folder} is of another {' and another '.join(other)}: give the same as then "
        "to resume it, or leave out --resume to begin anew"
    )


def arrays_of(solved: Solved) -> list[np.ndarray]:
    """Returns the arrays to store of a solved weight, in order, each in one piece."""
    both = (*solved.packed, *solved.factors)
    return [np.ascontiguousarray(array) for packed in both for array in packed.arrays]


def with_arrays(solved: Solved, arrays: Sequence[np.ndarray]) -> Solved:
    """Returns a solved weight with other arrays, given as `arrays_of` gives them."""
    left = list(arrays)
    out = [one.with_arrays([left.pop(0) for _ in one.arrays]) for one in (*solved.packed, *solved.factors)]
    weights = len(solved.packed)
    return replace(solved, packed=tuple(out[:weights]), factors=tuple(out[weights:]))


def raw(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array in one piece."""
    return array.reshape(-1).view(np.uint8).data


def _read_back(said: Mapping[str, Any], weight: PlannedWeight, start: int, read: Read) -> Solved | None:
    """Reads a solved weight from its record and the data, which begin at `start`; None if anything is not right."""
    arrays: list[list[np.ndarray]] = []
    check, end = 0, start
    try:
        small = list(said["small"])
        for shapes in weight.shapes():
            arrays.append([])
            places, end = assign_offsets((math.prod(shape) * dtype.itemsize for shape, dtype in shapes), end)
            for (shape, dtype), place in zip(shapes, places, strict=True):
                array = _array(small.pop(0), dtype).reshape(shape) if place is None else read(shape, dtype, place)
                check = zlib.crc32(raw(array), check)
                arrays[-1].append(array)
        packed, factors = weight.packed_from(arrays)
        scale = said["input_scale"]
        input_scale = None if scale is None else _array(scale, np.dtype(np.float32)).reshape(weight.k)
        wanted = weight.weight_sources() if weight.corrected else []
        vectors = [_array(text, np.dtype(np.float32)) for text in said["bias"]]
        bias = tuple(vector.reshape(part.n) for part, vector in zip(wanted, vectors, strict=True))
        error = None if said["error"] is None else float(said["error"])
        if (end, check) != (said["end"], said["check"]):
            return None
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return Solved(packed, input_scale, error, factors, bias)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """Returns an entry of the journal, empty if it is none or cut short."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(raw(np.ascontiguousarray(array))).decode()


def _array(text: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
