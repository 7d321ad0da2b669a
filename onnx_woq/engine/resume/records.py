"""The journal of a resumable output: one line, a **record**, for each solved weight.

The first line names the model, recipe, data and package version that the output follows from. A record has the name of
its weight (under the key "tap"), the end of its arrays in the data file and their checksum, the arrays that are too
small for that file, the input scale, the bias, the error, and a checksum of all that. It counts only if the data file
has its arrays, since the system may write the two files in any order. The shapes of arrays and their offsets follow
from model and recipe alone, so nothing that stands in a journal can make anyone read or write elsewhere.
"""

from __future__ import annotations

import base64
import itertools
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
_SUM = "sum"  # of the whole record; version 0.1 did not write it

Read = Callable[[tuple[int, ...], np.dtype, int], np.ndarray]
"""A function that reads an array of a shape and type at an offset of the data file, in bytes.

It raises ValueError if the file ends before the array does."""


@dataclass(frozen=True)
class Record:
    """A record that was read back.

    Attributes:
        name: the name of the weight.
        solved: its solution.
        end: the offset at which its arrays end in the data file, in bytes.
        line_end: the offset at which its line ends in the journal, in bytes.
    """

    name: str
    solved: Solved
    end: int
    line_end: int


def assign_offsets(sizes: Iterable[int], end: int) -> tuple[list[int | None], int]:
    """Returns the offsets at which arrays are appended to a data file, and the end of the file after them.

    The offset of an array that is too small for the data file is None.

    Args:
        sizes: the bytes of each array, in order.
        end: the end of the data file before them, in bytes.
    """
    offsets: list[int | None] = []
    for nbytes in sizes:
        offset = next_place(end, nbytes) if nbytes > LARGE else None
        offsets.append(offset)
        end = end if offset is None else offset + nbytes
    return offsets, end


def most_bytes(weights: Iterable[PlannedWeight]) -> int:
    """Returns an upper bound of the bytes of a data file of these weights, in whatever order they come."""
    shapes = (shape for weight in weights for shapes in weight.shapes() for shape in shapes)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    return sum(next_place(1, size) + size for size in sizes if size > LARGE)


def head(key: Mapping[str, str]) -> bytes:
    """Returns the first line of a journal: everything that the output follows from, named as messages name it."""
    return _line({"format": _FORMAT, "key": dict(key)})


def first_line(journal: bytes) -> bytes:
    """Returns the first line of a journal, with its newline; empty if it was cut short."""
    return journal[: journal.find(b"\n") + 1]


def record_line(weight: PlannedWeight, solved: Solved, end: int) -> bytes:
    """Returns the record of a weight as a line of the journal.

    Args:
        weight: the weight.
        solved: its solution.
        end: the offset at which its arrays end in the data file.
    """
    arrays = arrays_of(solved)
    check = 0
    for array in arrays:
        check = zlib.crc32(raw(array), check)
    entry = {
        "tap": weight.name,
        "end": end,
        "check": check,
        "small": [_text(array) for array in arrays if array.nbytes <= LARGE],
        "input_scale": None if solved.input_scale is None else _text(solved.input_scale),
        "bias": [_text(bias) for bias in solved.bias],
        "error": solved.error,
    }
    return _line(entry | {_SUM: _line_sum(entry)})


def finished(
    journal: bytes, weights: Iterable[PlannedWeight], blocks: Sequence[Sequence[PlannedWeight]], read: Read
) -> tuple[list[Record], int]:
    """Reads the records of finished blocks, up to the first that the data file does not confirm.

    Args:
        journal: the whole journal; its first line is not checked here.
        weights: all weights of the plan.
        blocks: the same weights by block; a block is finished if all its weights have records.
        read: reads an array of the data file.

    Returns:
        The records, in the order of the journal, and the offset at which the line of the last one ends.
    """
    by_name = {weight.name: weight for weight in weights}
    start = len(first_line(journal))
    found: dict[str, Record] = {}
    position, end = start, 0
    for line in journal[start:].splitlines(keepends=True):
        entry = _parsed(line)
        if entry.pop(_SUM, None) not in (None, _line_sum(entry)):  # none: a record of version 0.1
            break
        weight = by_name.get(str(entry.get("tap")))
        solved = None if weight is None or weight.name in found else _read_back(entry, weight, end, read)
        if weight is None or solved is None:
            break
        position, end = position + len(line), entry["end"]
        found[weight.name] = Record(weight.name, solved, end, position)
    whole = {weight.name for block in blocks if all(weight.name in found for weight in block) for weight in block}
    records = list(itertools.takewhile(lambda record: record.name in whole, found.values()))
    return records, records[-1].line_end if records else start


def difference(folder: Path, key: Mapping[str, str], first: bytes) -> str:
    """Returns the message that an unfinished result follows from something else than a run.

    Args:
        folder: the folder of the unfinished result.
        key: everything that the run's output follows from.
        first: the first line of the journal in the folder.
    """
    was = _parsed(first).get("key")
    was = was if isinstance(was, dict) else {}
    other = [name for name in key if was.get(name) != key[name]] or ["format"]
    return (
        f"the unfinished result in {folder} is of another {' and another '.join(other)}: give the same as then "
        "to resume it, or leave out --resume to begin anew"
    )


def arrays_of(solved: Solved) -> list[np.ndarray]:
    """Returns the arrays of a solution that are stored, in order, each contiguous."""
    both = (*solved.packed, *solved.factors)
    return [np.ascontiguousarray(array) for packed in both for array in packed.arrays]


def with_arrays(solved: Solved, arrays: Sequence[np.ndarray]) -> Solved:
    """Returns a solution with other arrays, given as `arrays_of` gives them."""
    left = list(arrays)
    out = [one.with_arrays([left.pop(0) for _ in one.arrays]) for one in (*solved.packed, *solved.factors)]
    weights = len(solved.packed)
    return replace(solved, packed=tuple(out[:weights]), factors=tuple(out[weights:]))


def raw(array: np.ndarray) -> memoryview:
    """Returns the bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _read_back(entry: Mapping[str, Any], weight: PlannedWeight, start: int, read: Read) -> Solved | None:
    """Reads a solution from its record and its arrays in the data file.

    Args:
        entry: the record.
        weight: its weight, which tells the shapes of the arrays.
        start: the end of the arrays of all records before.
        read: reads an array of the data file.

    Returns:
        The solution; None if the record is malformed or the data file does not have its arrays.
    """
    arrays: list[list[np.ndarray]] = []
    check, end = 0, start
    try:
        small = list(entry["small"])
        for shapes in weight.shapes():
            arrays.append([])
            offsets, end = assign_offsets((math.prod(shape) * dtype.itemsize for shape, dtype in shapes), end)
            for (shape, dtype), offset in zip(shapes, offsets, strict=True):
                array = _array(small.pop(0), dtype).reshape(shape) if offset is None else read(shape, dtype, offset)
                check = zlib.crc32(raw(array), check)
                arrays[-1].append(array)
        packed, factors = weight.packed_from(arrays)
        scale = entry["input_scale"]
        input_scale = None if scale is None else _array(scale, np.dtype(np.float32)).reshape(weight.k)
        wanted = weight.weight_sources() if weight.corrected else []
        vectors = [_array(text, np.dtype(np.float32)) for text in entry["bias"]]
        bias = tuple(vector.reshape(one.n) for one, vector in zip(wanted, vectors, strict=True))
        error = None if entry["error"] is None else float(entry["error"])
        if (end, check) != (entry["end"], entry["check"]):
            return None
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return Solved(packed, input_scale, error, factors, bias)


def _line_sum(entry: Mapping[str, Any]) -> int:
    """Returns a checksum of a whole record, also of what no checksum of arrays covers: scales, biases, the error."""
    return zlib.crc32(_line(entry))


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """Returns a line of the journal as a dictionary, empty if the line is malformed or cut short."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(raw(np.ascontiguousarray(array))).decode()


def _array(text: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
