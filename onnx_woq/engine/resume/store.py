"""The resume store: solved weights in a data file beside the output, and a journal that records them.

Packed weights are appended to the data file and memory-mapped from there, so no weight is held in memory twice. The
journal gets a line for each of them. After a crash, `--resume` replays the journal up to the last complete block. On
success, the float weights that stay are appended too, and the data file is renamed into place
(`onnx_woq.graph.io.save`). The folder `.NAME.onnx-woq-partial`, beside the output, has

    NAME.data   each array of more than `LARGE` bytes, at an offset that follows from the sizes of those before it
    journal     everything that the output follows from, then a line per weight (`onnx_woq.engine.resume.records`)
    states/     hidden states at the boundaries of the last blocks, kept by `onnx_woq.runtime`
    lock        the lock of the process that works in it
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

SYNC_SECONDS = 1.0  # between two waits for the disk; longer if a wait takes more than a tenth of that
MAPS = sys.platform != "win32"
"""True if packed weights are memory-mapped; Windows cannot rename a mapped file, so there memory holds them."""

_JOURNAL = "journal"
_KEPT = (KeyboardInterrupt, SystemExit, DiskError)  # ends of a run after which it can be resumed


def partial_folder(out: Path) -> Path:
    """Returns the folder in which the unfinished result of an .onnx file is kept."""
    return out.with_name(f".{out.name}.onnx-woq-partial")


@dataclass
class ResumeStore:
    """The resume store of one output, locked by this process.

    Attributes:
        out: the .onnx file that the output will be.
        folder: the folder of the unfinished result.
        finished: name -> solution of each weight that an earlier run has solved, in the order of that run.
        end: the bytes of the data file that have been recorded.
        array_offsets: `id` of an array -> its offset in the data file, in bytes. The store keeps the arrays alive.
    """

    out: Path
    folder: Path
    _data: FileIO
    _journal: FileIO
    finished: dict[str, Solved] = field(default_factory=dict)
    end: int = 0
    array_offsets: dict[int, int] = field(default_factory=dict)
    _map: np.ndarray | None = None  # the whole data file; None where it is not mapped
    _lines: int = 0
    _arrays: list[np.ndarray] = field(default_factory=list)  # keeps the ids in `array_offsets` from being used again
    _synced: float = field(default_factory=time.monotonic)
    _pause: float = SYNC_SECONDS

    @property
    def states(self) -> Path:
        """Returns the folder for hidden states."""
        return self.folder / "states"

    def complete(self) -> Stored:
        """Closes the data file, which no weight can be added to any more; returns it for `save` to complete."""
        self._data.close()
        return Stored(self.folder, self.array_offsets, self.end)

    def keep(self, weight: PlannedWeight, solved: Solved) -> Solved:
        """Stores the solution of a weight; returns it with its large arrays memory-mapped from the data file.

        Raises:
            OutputError: the solution cannot be written; a DiskError if the disk is full or fails.
        """
        with _named_errors(self.out):
            return self._keep(weight, solved)

    def _keep(self, weight: PlannedWeight, solved: Solved) -> Solved:
        arrays = arrays_of(solved)
        offsets, end = assign_offsets((array.nbytes for array in arrays), self.end)
        for array, offset in zip(arrays, offsets, strict=True):
            if offset is not None:
                _write(self._data, raw(array), offset)
        _write(self._journal, memoryview(record_line(weight, solved, end)), self._journal.seek(0, os.SEEK_END))
        self.end = end
        self._lines += 1
        kept = []
        for array, offset in zip(arrays, offsets, strict=True):
            if offset is not None and self._map is not None:
                array = self.read(array.shape, array.dtype, offset)
            self._hold(array, offset)
            kept.append(array)
        self._sync_sometimes()
        return with_arrays(solved, kept)

    def map_data(self, size: int) -> None:
        """Maps the data file in one piece, since every map keeps a file open; the rest of the file is a hole.

        Args:
            size: the most bytes that all weights together can take in the file.
        """
        if MAPS and size:
            if os.fstat(self._data.fileno()).st_size < size:
                self._data.truncate(size)
            self._map = np.asarray(np.memmap(self._data, np.uint8, "r", 0, (size,)))

    def read(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
        """Reads an array of the data file, memory-mapped if files can be mapped.

        Args:
            shape: the shape of the array.
            dtype: its type.
            offset: its offset in the file, in bytes.

        Raises:
            ValueError: the file ends before the array does.
        """
        count = math.prod(shape)
        if self._map is not None:
            return self._map[offset : offset + count * dtype.itemsize].view(dtype).reshape(shape)
        self._data.seek(0)
        return np.fromfile(self._data, dtype, count, offset=offset).reshape(shape)

    def _hold(self, array: np.ndarray, offset: int | None) -> None:
        """Remembers the offset of an array of the model, which `save` then need not write."""
        if offset is not None:
            self.array_offsets[id(array)] = offset
            self._arrays.append(array)

    def _sync_sometimes(self) -> None:
        if time.monotonic() - self._synced > self._pause:
            start = time.monotonic()
            self.sync()
            self._synced = time.monotonic()
            self._pause = max(SYNC_SECONDS, 10 * (self._synced - start))

    def sync(self) -> None:
        """Waits until everything so far has reached the disk, the arrays before the records of them."""
        for file in (self._data, self._journal):
            if not file.closed:
                os.fsync(file.fileno())

    def left(self) -> int:
        """Returns the number of weights that a later run can take over; 0 once the data file has its final name."""
        return self._lines if (self.folder / data_path(self.out).name).exists() else 0

    def settle(self) -> None:
        """Cuts off what is half written, and waits until everything that is recorded has reached the disk."""
        with suppress(OSError):
            if not self._data.closed:
                self._data.truncate(self.end)
            self.sync()

    def take_over(self, weights: Sequence[PlannedWeight], blocks: Sequence[Sequence[PlannedWeight]]) -> None:
        """Takes the finished blocks of an earlier run over, and removes what comes after them.

        Args:
            weights: all weights of the plan.
            blocks: the same weights by block.
        """
        records, position = finished(_read_all(self._journal), weights, blocks, self.read)
        for record in records:
            arrays = arrays_of(record.solved)
            offsets, self.end = assign_offsets((array.nbytes for array in arrays), self.end)
            for array, offset in zip(arrays, offsets, strict=True):
                self._hold(array, offset)
            self.finished[record.name] = record.solved
            self._lines += 1
        self._journal.truncate(position)  # records before their arrays: a crash between the two does no harm
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
    """Opens the resume store of an output, empty or with what an earlier run has left; the end removes it.

    It stays on the disk if it holds any weight and the `with` block ends with an interrupt, or because the disk is full
    or fails. The error then says so.

    Args:
        out: the .onnx file that the output will be; its folder exists.
        key: everything that the output follows from, by the names that messages call it.
        weights: all weights of the plan that get codes of their own.
        blocks: the same weights by block; of an earlier run, only finished blocks are taken over.
        resume: "" to begin anew; "same" to resume an earlier run, if there is one, and refuse one with another key;
            "any" to resume one with the same key and replace any other.

    Raises:
        OutputError: another process writes the output, the folder cannot be used, or the earlier run has another key.
        DiskError: the disk is full or fails, here or in the `with` block.
    """
    with _named_errors(out):
        lock = locked(partial_folder(out), out)
    # If this run cannot even begin, what an earlier one has left must stay.
    files, keep = ExitStack(), bool(resume) and (partial_folder(out) / _JOURNAL).exists()
    try:
        with _named_errors(out):
            store = _opened(files, out, key, weights, blocks, resume)
        keep = False
        try:
            yield store
        except BaseException as error:
            end = _named(error, out)
            done = store.left() if isinstance(end, _KEPT) else 0
            keep = done > 0
            if keep:
                store.settle()
                end = type(end)(_kept(end, done, len(weights), store.folder))
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
    """Returns the store in a locked folder, resumed if that is asked for and possible, else emptied."""
    folder = partial_folder(out)
    data, journal = (folder / name for name in (data_path(out).name, _JOURNAL))
    store = ResumeStore(out, folder, files.enter_context(own_file(data)), files.enter_context(own_file(journal)))
    first = first_line(_read_all(store._journal))
    if resume == "same" and first and first != head(key):
        raise OutputError(difference(folder, key, first))
    going_on = bool(resume) and first == head(key)
    if not going_on:
        clear(folder, {data.name, journal.name})
        store._journal.truncate(0)
        store._data.truncate(0)
    own_folder(store.states)
    store.map_data(most_bytes(weights))
    if going_on:
        store.take_over(weights, blocks)
    else:
        _write(store._journal, memoryview(head(key)), 0)
    return store


def _named(error: BaseException, out: Path) -> BaseException:
    """Returns a DiskError in place of a system error that means that the disk is full or fails; others as they are."""
    named = failure(error, out) if isinstance(error, OSError) else error
    return named if isinstance(named, DiskError) else error


def _kept(end: BaseException, done: int, weights: int, folder: Path) -> str:
    """Returns the message of an error after which the run can be resumed."""
    what = f"{end}; " if isinstance(end, DiskError) else ""
    return (
        f"{what}{done} of {weights} groups of MatMuls are done and kept in {folder}; "
        "the same command with --resume goes on from there"
    )


@contextmanager
def _named_errors(out: Path) -> Iterator[None]:
    """Turns system errors into OutputErrors that say what to do."""
    try:
        yield
    except OSError as error:
        raise failure(error, out) from error


def _write(file: FileIO, content: memoryview, offset: int) -> None:
    """Writes all of `content` at an offset of a file; one `write` may take only a part of it."""
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _read_all(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()
