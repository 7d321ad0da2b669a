"""Resumable output: solved weights go to a data file beside the output at once, and a journal records them.

`.NAME.onnx-woq-partial` is a private folder on the disk of the output. Packed weights are appended to its data file and
memory-mapped from there, so no weight is held in memory twice. The journal records each finished weight. After a crash,
`--resume` replays the journal up to the last complete block. On success the data file, completed with what stays float,
is renamed into place (`onnx_woq.graph.io.save`).

    data        each array of more than `LARGE` bytes at a place that follows from the sizes of those before it
    journal     what this is the result of, then a line per weight (`onnx_woq.engine.resume.records`)
    states/     hidden states at the last block boundaries, kept by `onnx_woq.runtime`
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from onnx_woq.engine.plan import PlannedWeight
from onnx_woq.engine.resume.locked_folder import clear, locked, own_file, own_folder, remove
from onnx_woq.engine.resume.records import (
    arrays_of,
    assign_offsets,
    difference,
    finished,
    first_line,
    head,
    most_bytes,
    raw,
    record_line,
    with_arrays,
)
from onnx_woq.engine.solve import Solved
from onnx_woq.errors import DiskError, OutputError
from onnx_woq.graph.io.save import Stored, data_path, failure

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0  # between two waits for the disk, or ten times what the last one took
MAPS = sys.platform != "win32"
"""True if the data file can be mapped, so that memory need not hold it: Windows never renames a file that is mapped."""

_JOURNAL = "journal"
_KEPT = (KeyboardInterrupt, SystemExit, DiskError)  # ends after which the same run may go on


def partial_folder(out: Path) -> Path:
    """Returns the folder of the resumable output of `out`."""
    return out.with_name(f".{out.name}.onnx-woq-partial")


@dataclass
class ResumeStore:
    """A resumable output, locked by this process.

    Attributes:
        out: the .onnx file it will be.
        folder: where it is until then.
        finished: weights by name that an earlier run has solved, in the order it put them in.
        end: bytes of the data file that count.
        places: `id` of an array -> its offset in the data file.
    """

    out: Path
    folder: Path
    _data: FileIO
    _journal: FileIO
    finished: dict[str, Solved] = field(default_factory=dict)
    end: int = 0
    places: dict[int, int] = field(default_factory=dict)
    _map: np.ndarray | None = None  # all of the data file, where files can be mapped
    _lines: int = 0
    _arrays: list[np.ndarray] = field(default_factory=list)  # what `places` speaks of has to stay alive
    _synced: float = field(default_factory=time.monotonic)
    _pause: float = SYNC_SECONDS

    @property
    def states(self) -> Path:
        """Returns the folder for hidden states."""
        return self.folder / "states"

    def complete(self) -> Stored:
        """Closes the data file and returns what `save` makes of it; nothing more can be kept."""
        self._data.close()
        return Stored(self.folder, self.places, self.end)

    def keep(self, weight: PlannedWeight, solved: Solved) -> Solved:
        """Stores a solved weight; returns it with its large arrays read from the data file.

        Raises:
            OutputError: the disk does not take it; a DiskError where it is full or fails.
        """
        with _named_errors(self.out):
            return self._keep(weight, solved)

    def _keep(self, weight: PlannedWeight, solved: Solved) -> Solved:
        arrays = arrays_of(solved)
        places, end = assign_offsets((array.nbytes for array in arrays), self.end)
        for array, place in zip(arrays, places, strict=True):
            if place is not None:
                _write(self._data, raw(array), place)
        _write(self._journal, memoryview(record_line(weight, solved, end)), self._journal.seek(0, os.SEEK_END))
        self.end = end
        self._lines += 1
        kept = []
        for array, place in zip(arrays, places, strict=True):
            if place is not None and self._map is not None:
                array = self.read(array.shape, array.dtype, place)
            self._hold(array, place)
            kept.append(array)
        self._sync_sometimes()
        return with_arrays(solved, kept)

    def map_data(self, size: int) -> None:
        """Maps the data file in one piece, for each map keeps a file open; until it is full there is a hole at its end.

        Args:
            size: bytes that it may have in the end, without what `save` appends.
        """
        if MAPS and size:
            if os.fstat(self._data.fileno()).st_size < size:
                self._data.truncate(size)
            self._map = np.asarray(np.memmap(self._data, np.uint8, "r", 0, (size,)))

    def read(self, shape: tuple[int, ...], dtype: np.dtype, place: int) -> np.ndarray:
        """Reads an array of the data file, mapped if that is possible.

        Raises:
            ValueError: the file ends before.
        """
        count = math.prod(shape)
        if self._map is not None:
            return self._map[place : place + count * dtype.itemsize].view(dtype).reshape(shape)
        self._data.seek(0)
        return np.fromfile(self._data, dtype, count, offset=place).reshape(shape)

    def _hold(self, array: np.ndarray, place: int | None) -> None:
        """Remembers which array of the model lies where."""
        if place is not None:
            self.places[id(array)] = place
            self._arrays.append(array)

    def _sync_sometimes(self) -> None:
        if time.monotonic() - self._synced > self._pause:
            start = time.monotonic()
            self.sync()
            self._synced = time.monotonic()
            self._pause = max(SYNC_SECONDS, 10 * (self._synced - start))

    def sync(self) -> None:
        """Waits until everything so far has reached the disk, the data before what speaks of them."""
        for file in (self._data, self._journal):
            if not file.closed:
                os.fsync(file.fileno())

    def left(self) -> int:
        """Returns the number of weights that a later run can go on from; none once the data file has its final name."""
        return self._lines if (self.folder / data_path(self.out).name).exists() else 0

    def settle(self) -> None:
        """Leaves on the disk what is finished, and nothing that is half written."""
        with suppress(OSError):
            if not self._data.closed:
                self._data.truncate(self.end)
            self.sync()

    def take_over(self, weights: Sequence[PlannedWeight], blocks: Sequence[Sequence[PlannedWeight]]) -> None:
        """Continues with the weights of all blocks that are finished, and forgets what comes after them."""
        entries, position = finished(_read_all(self._journal), weights, blocks, self.read)
        for entry in entries:
            arrays = arrays_of(entry.solved)
            places, self.end = assign_offsets((array.nbytes for array in arrays), self.end)
            for array, place in zip(arrays, places, strict=True):
                self._hold(array, place)
            self.finished[entry.name] = entry.solved
            self._lines += 1
        self._journal.truncate(position)  # first what speaks of the data, then the data
        self._data.truncate(self.end)
        if self._map is not None:
            self._data.truncate(len(self._map))


@contextmanager
def open_store(
    out: Path,
    key: Mapping[str, str],
    weights: Sequence[PlannedWeight],
    blocks: Sequence[Sequence[PlannedWeight]],
    *,
    resume: str = "",
) -> Iterator[ResumeStore]:
    """Opens the resumable output of `out`, new or continued; it is removed at the end of the `with` block.

    Only an interrupt and a disk that is full or fails leave it where it is, once it holds anything, and say so. An
    earlier one that is not continued is replaced.

    Args:
        out: the .onnx file it will be; its folder exists.
        key: what the result follows from, by the name people know it under.
        weights: all there are.
        blocks: the same by block; a block is continued with only if it was finished.
        resume: "" to begin anew; "same" to continue, if there is something and it has the same key; "any" to continue
            if the key is the same, and begin anew otherwise.

    Raises:
        OutputError: another process is at work on it, the folder cannot be used, or what is there has another key.
        DiskError: as above; also for what else in the `with` block met it.
    """
    with _named_errors(out):
        lock = locked(partial_folder(out), out)
    # What an earlier run has left stays where this one cannot begin.
    files, keep = ExitStack(), bool(resume) and (partial_folder(out) / _JOURNAL).exists()
    try:
        with _named_errors(out):
            partial = _opened(files, out, key, weights, blocks, resume)
        keep = False
        try:
            yield partial
        except BaseException as error:
            end = _named(error, out)
            done = partial.left() if isinstance(end, _KEPT) else 0
            keep = done > 0
            if keep:
                partial.settle()
                end = type(end)(_kept(end, done, len(weights), partial.folder))
            if end is error:
                raise
            raise end from error
    finally:
        files.close()
        if keep:
            lock.close()
        else:
            remove(partial_folder(out), lock)


def _opened(
    files: ExitStack,
    out: Path,
    key: Mapping[str, str],
    weights: Sequence[PlannedWeight],
    blocks: Sequence[Sequence[PlannedWeight]],
    resume: str,
) -> ResumeStore:
    """Opens what is in a locked folder: continued if that is asked for and possible, else empty."""
    folder = partial_folder(out)
    data, journal = (folder / name for name in (data_path(out).name, _JOURNAL))
    partial = ResumeStore(out, folder, files.enter_context(own_file(data)), files.enter_context(own_file(journal)))
    first = first_line(_read_all(partial._journal))
    if resume == "same" and first and first != head(key):
        raise OutputError(difference(folder, key, first))
    going_on = bool(resume) and first == head(key)
    if not going_on:
        clear(folder, {data.name, journal.name})
        partial._journal.truncate(0)
        partial._data.truncate(0)
    own_folder(partial.states)
    partial.map_data(most_bytes(weights))
    if going_on:
        partial.take_over(weights, blocks)
    else:
        _write(partial._journal, memoryview(head(key)), 0)
    return partial


def _named(error: BaseException, out: Path) -> BaseException:
    """Returns an error as it is, but that of a disk that is full or fails by its name."""
    named = failure(error, out) if isinstance(error, OSError) else error
    return named if isinstance(named, DiskError) else error


def _kept(end: BaseException, done: int, weights: int, folder: Path) -> str:
    """Returns what people are told of an output that can be resumed."""
    what = f"{end}; " if isinstance(end, DiskError) else ""
    return (
        f"{what}{done} of {weights} groups of MatMuls are done and kept in {folder}; "
        "the same command with --resume goes on from there"
    )


@contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """Turns errors of the system into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise failure(error, out) from error


def _write(file: FileIO, content: memoryview, place: int) -> None:
    """Writes all of `content` at a place of the file."""
    file.seek(place)
    while content:
        content = content[file.write(content) :]


def _read_all(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()
