"""The unfinished result beside the output, so that memory holds no weight twice and a killed run loses little.

`.NAME.onnx-woq-partial` is a private folder on the disk of the result. Packed weights are appended to its data file as
they are made and from then on read through a memory map; the journal gets a line for each tap. At the end the same data
file, completed with what stays float, is renamed to be that of the result (`onnx_woq.graph.save`).

    data        each array of more than `LARGE` bytes at a place that follows from the sizes of those before it
    journal     what this is the result of, then a line per tap (`onnx_woq.partial_journal`)
    states/     hidden states at the last block boundaries, kept by `onnx_woq.runtime`
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnx_woq.errors import OutputError
from onnx_woq.graph.lower.matmulnbits import Packed
from onnx_woq.graph.save import Stored, data_path, explain
from onnx_woq.graph.taps import Tap
from onnx_woq.partial_journal import arrays_of, difference, finished, first_line, head, laid_out, raw, tap_line
from onnx_woq.solving import Solved

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0  # between two waits for the disk, or ten times what the last one took
_KEPT = (KeyboardInterrupt, SystemExit)  # ends that are not failures


def partial_folder(out: Path) -> Path:
    """Where the unfinished result of `out` is."""
    return out.with_name(f".{out.name}.onnx-woq-partial")


@dataclass
class Partial:
    """An unfinished result, locked by this process.

    Attributes:
        out: the .onnx file it will be.
        folder: where it is until then.
        finished: taps by name that an earlier run has solved, in the order it put them in.
        end: bytes of the data file that count.
        places: `id` of an array -> its offset in the data file.
    """

    out: Path
    folder: Path
    finished: dict[str, Solved] = field(default_factory=dict)
    end: int = 0
    places: dict[int, int] = field(default_factory=dict)
    _lines: int = 0
    _data: int = -1
    _journal: int = -1
    _arrays: list[np.ndarray] = field(default_factory=list)  # what `places` speaks of has to stay alive
    _synced: float = field(default_factory=time.monotonic)
    _pause: float = SYNC_SECONDS

    @property
    def states(self) -> Path:
        """The folder for hidden states."""
        return self.folder / "states"

    @property
    def stored(self) -> Stored:
        """What `save` needs to make the data file that of the result."""
        return Stored(self.folder, self.places, self.end)

    def keep(self, tap: Tap, solved: Solved) -> Solved:
        """Stores a solved tap; gives it back with its large arrays read from the data file.

        Raises:
            OutputError: the disk does not take it.
        """
        try:
            return self._keep(tap, solved)
        except OSError as error:
            raise OutputError(explain(error, self.out)) from error

    def _keep(self, tap: Tap, solved: Solved) -> Solved:
        arrays = arrays_of(solved)
        places, end = laid_out((array.nbytes for array in arrays), self.end)
        for array, place in zip(arrays, places, strict=True):
            if place is not None:
                _write_at(self._data, raw(array), place)
        _write(self._journal, tap_line(tap, solved, end))
        self._lines += 1
        mapped = self._mapped(arrays, places)
        self.end = end
        self._sync_sometimes()
        return replace(solved, packed=_regrouped(solved.packed, mapped))

    def _mapped(self, arrays: Sequence[np.ndarray], places: Sequence[int | None]) -> list[np.ndarray]:
        """The same arrays, large ones as views of the data file."""
        out = []
        for array, place in zip(arrays, places, strict=True):
            if place is None:
                out.append(array)
            else:
                out.append(_map(self._data, array.shape, array.dtype, place))
                self._hold(out[-1], place)
        return out

    def _hold(self, array: np.ndarray, place: int) -> None:
        """Remembers which array of the model lies where."""
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
        os.fsync(self._data)
        os.fsync(self._journal)

    def close(self, lock: int) -> None:
        """Closes the files and gives the folder free; what has been mapped stays mapped."""
        for descriptor in (self._data, self._journal, lock):
            if descriptor >= 0:
                os.close(descriptor)


@contextmanager
def unfinished(
    out: Path, key: Mapping[str, str], taps: Sequence[Tap], blocks: Sequence[Sequence[Tap]], *, resume: str = ""
) -> Iterator[Partial]:
    """The unfinished result of `out`, new or continued; removed at the end of the `with` block.

    Only an interrupt leaves it where it is, once it holds anything. An earlier one that is not continued is replaced.

    Args:
        out: the .onnx file it will be; its folder exists.
        key: what the result follows from, by the name people know it under.
        taps: all there are.
        blocks: the same in groups; a group is continued with only if it was finished.
        resume: "" to begin anew; "same" to continue, if there is something and it has the same key; "any" to continue
            if the key is the same, and begin anew otherwise.

    Raises:
        OutputError: another process is at work on it, the folder cannot be used, or what is there has another key.
    """
    folder = partial_folder(out)
    try:
        lock = _locked(folder, out)
    except OSError as error:
        raise OutputError(explain(error, out)) from error
    partial = Partial(out, folder)
    try:
        _open(partial, key, taps, blocks, resume)
    except BaseException as error:
        if not resume:  # otherwise what an earlier run has left stays
            shutil.rmtree(folder, ignore_errors=True)
        partial.close(lock)
        if isinstance(error, OSError):
            raise OutputError(explain(error, out)) from error
        raise
    try:
        yield partial
    except _KEPT as end:
        if not partial._lines:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with suppress(OSError):
            partial.sync()
        raise type(end)(
            f"{partial._lines} of {len(taps)} groups of MatMuls are done and kept in {folder}; the same command with "
            "--resume goes on from there"
        ) from end
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        partial.close(lock)


def _locked(folder: Path, out: Path) -> int:
    """Makes the folder if need be and locks it; returns the descriptor that holds the lock."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise OutputError(f"{folder} is in the way, and no folder of this program: remove it") from error
        try:
            what = os.fstat(lock)
            if what.st_uid != os.geteuid() or stat.S_IMODE(what.st_mode) & 0o077:
                raise OutputError(f"{folder} is in the way: others may write to it; remove it")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another process is writing {out} (it has locked {folder}): wait for it, or choose another output"
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(what, os.stat(folder, follow_symlinks=False)):
                    return lock  # and nobody has removed it in between
            os.close(lock)
        except BaseException:
            os.close(lock)
            raise


def _open(
    partial: Partial, key: Mapping[str, str], taps: Sequence[Tap], blocks: Sequence[Sequence[Tap]], resume: str
) -> None:
    """Opens data and journal of a locked folder: continued where that is asked for and possible, else empty."""
    data, journal = (partial.folder / name for name in (data_path(partial.out).name, "journal"))
    partial._data, partial._journal = _file(data), _file(journal)
    if resume:
        text = _read_all(partial._journal)
        first = first_line(text)
        if first and first != head(key) and resume == "same":
            raise OutputError(difference(partial.folder, key, first))
        if first == head(key):
            _own_folder(partial.states)
            _continue(partial, text, taps, blocks)
            return
    _clear(partial, {data.name, journal.name})
    _own_folder(partial.states)
    os.ftruncate(partial._journal, 0)
    os.ftruncate(partial._data, 0)
    _write(partial._journal, head(key))


def _continue(partial: Partial, text: bytes, taps: Sequence[Tap], blocks: Sequence[Sequence[Tap]]) -> None:
    """Takes over the taps of all blocks that are finished, and forgets what comes after them."""
    size = os.fstat(partial._data).st_size

    def read(shape: tuple[int, ...], dtype: np.dtype, place: int) -> np.ndarray:
        if place + math.prod(shape) * dtype.itemsize > size:
            raise ValueError("the data file ends before")
        return _map(partial._data, shape, dtype, place)

    entries, position = finished(text, taps, blocks, read)
    for entry in entries:
        arrays = arrays_of(entry.solved)
        places, _ = laid_out((array.nbytes for array in arrays), partial.end)
        for array, place in zip(arrays, places, strict=True):
            if place is not None:
                partial._hold(array, place)
        partial.finished[entry.name] = entry.solved
        partial.end = entry.end
        partial._lines += 1
    os.ftruncate(partial._journal, position)  # first what speaks of the data, then the data
    os.ftruncate(partial._data, partial.end)


def _clear(partial: Partial, but: set[str]) -> None:
    """Empties the folder; links in it are removed, not followed."""
    for entry in os.scandir(partial.folder):
        if entry.name in but:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _own_folder(path: Path) -> None:
    """Makes a folder in a private one; anything else of that name is replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    path.mkdir(mode=0o700, exist_ok=True)


def _file(path: Path) -> int:
    """Opens a file of a private folder for reading and writing; anything but a file of its own is replaced."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        what = os.stat(path, follow_symlinks=False)
        if stat.S_ISDIR(what.st_mode):
            shutil.rmtree(path)
        elif not stat.S_ISREG(what.st_mode) or what.st_nlink > 1:
            os.unlink(path)
    return os.open(path, flags, 0o666)


def _map(file: int, shape: tuple[int, ...], dtype: np.dtype, place: int) -> np.ndarray:
    with os.fdopen(file, "rb", closefd=False) as stream:
        return np.asarray(np.memmap(stream, dtype, "r", place, shape))


def _write_at(file: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written


def _write(file: int, content: bytes) -> None:
    os.lseek(file, 0, os.SEEK_END)
    while content:
        content = content[os.write(file, content) :]


def _read_all(file: int) -> bytes:
    with os.fdopen(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read()


def _regrouped(packed: Sequence[Packed], arrays: Sequence[np.ndarray]) -> tuple[Packed, ...]:
    """The same weights with other arrays, given one after the other."""
    out, start = [], 0
    for one in packed:
        count = len(one.arrays)
        codes, scales, *zeros = arrays[start : start + count]
        out.append(replace(one, codes=codes, scales=scales, zeros=zeros[0] if zeros else None))
        start += count
    return tuple(out)
