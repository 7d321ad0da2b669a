"""Hidden states on disk: arrays are appended to one file per part of the model and read back one at a time.

In a folder given by the caller the files outlive the process. The last two parts are kept there, each with a JSON list
of its arrays, so that an interrupted calibration run can go on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

_KEEP = 2  # parts: if the process ends while one is being written, the one before is complete
_PREFIX = "hidden-"


@dataclass(frozen=True)
class Stored:
    """An array on disk, which takes memory only once it is read.

    Attributes:
        store: the file.
        offset: its first byte in the file.
        dtype: its type.
        shape: its shape.
    """

    store: HiddenStateStore
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def fits(self, size: int) -> bool:
        """Tells whether the array lies within a file of `size` bytes."""
        whole = all(d >= 0 for d in self.shape) and self.offset >= 0 and self.dtype.kind in "fiub"
        return whole and self.offset + math.prod(self.shape) * self.dtype.itemsize <= size

    def read(self) -> np.ndarray:
        """Returns a copy in memory."""
        array = np.empty(self.shape, self.dtype)
        self.store.read_into(array, self.offset)
        return array


class HiddenStateStore:
    """A file that arrays are appended to, one dictionary of arrays per sample.

    Args:
        folder: folder that keeps the file for a later process; None for a file without a name, which disappears with
            its last reader.
        number: number of a file to read; None for a new file.
    """

    def __init__(self, folder: Path | None, number: int | None = None) -> None:
        self.folder = folder
        self.number = number if number is not None else max(_numbers(folder), default=-1) + 1 if folder else 0
        self._index: list[dict[str, tuple[str, list[int], int]]] = []
        self._end = 0
        self._last: dict[str, tuple[np.ndarray, Stored]] = {}
        self._sum = xxhash.xxh3_64()
        self._lock = threading.Lock()  # several threads read samples at once
        if folder is None:
            self._file: Any = tempfile.TemporaryFile(prefix="onnx-woq-")  # noqa: SIM115  lives as long as its readers
        else:
            private = lambda path, flags: os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)  # noqa: E731
            self._file = open(self._path("bin"), "w+b" if number is None else "rb", opener=private)  # noqa: SIM115
        weakref.finalize(self, _close, self._file)

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fills a contiguous array with the bytes from `offset`; raises an OSError if the file ends before that."""
        with self._lock:
            self._file.seek(offset)
            if self._file.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
                raise OSError(f"a file of hidden states ends before byte {offset + array.nbytes}")

    def add(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | Stored]:
        """Appends the arrays of the next sample; returns them as stored.

        An array that is the same object as in the sample before is not written again.
        """
        out: dict[str, np.ndarray | Stored] = {}
        for name, array in arrays.items():
            last = self._last.get(name)
            out[name] = stored = last[1] if last is not None and last[0] is array else self._append(array)
            self._last[name] = (array, stored)
        self._index.append({n: (s.dtype.str, list(s.shape), s.offset) for n, s in out.items() if isinstance(s, Stored)})
        return out

    def close(self, keys: dict[str, str]) -> None:
        """Ends writing. In a folder, lists the arrays for a later process and removes files of old parts.

        Args:
            keys: digest of each value, by its name, see `structure.contents`.
        """
        self._last.clear()
        with self._lock:
            self._file.flush()
        if self.folder is None:
            return
        listing = {"keys": keys, "samples": self._index, "bytes": self._end, "sum": self._sum.hexdigest()}
        new = self._path("new")
        new.write_text(json.dumps(listing))
        os.replace(new, self._path("json"))
        for old in _numbers(self.folder):
            if old <= self.number - _KEEP:
                for kind in ("json", "bin"):
                    with suppress(OSError):
                        (self.folder / f"{_PREFIX}{old}.{kind}").unlink()

    def holds(self, listing: dict[str, Any]) -> bool:
        """Tells whether the file has the length and the hash that a list of its arrays says."""
        digest, size = xxhash.xxh3_64(), 0
        with self._lock:
            self._file.seek(0)
            while chunk := self._file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return size == listing["bytes"] and digest.hexdigest() == listing["sum"]

    def _append(self, array: np.ndarray) -> Stored:
        """Writes one array at the end of the file."""
        stored = Stored(self, self._end, array.dtype, array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._sum.update(data)
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
        self._end += data.nbytes
        return stored

    def _path(self, kind: str) -> Path:
        """Returns the path of the file of this part with the ending `kind`."""
        return (self.folder or Path()) / f"{_PREFIX}{self.number}.{kind}"


def load_newest(folder: Path, samples: int) -> tuple[dict[str, str], list[dict[str, np.ndarray | Stored]]]:
    """Loads the hidden states that an earlier process left in a folder.

    The values of the last two parts are returned together, because which of them are still valid depends on how the
    model was edited since. Damaged files are passed over.

    Args:
        folder: the folder.
        samples: number of samples.

    Returns:
        The digest of each value by its name, and the values of each sample by name.
    """
    keys: dict[str, str] = {}
    saved: list[dict[str, np.ndarray | Stored]] = [{} for _ in range(samples)]
    for number in sorted(_numbers(folder))[-_KEEP:]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            listing = json.loads((folder / f"{_PREFIX}{number}.json").read_text())
            store = HiddenStateStore(folder, number)
            if len(listing["samples"]) != samples or not store.holds(listing):
                continue
            found: list[dict[str, Stored]] = [
                {n: Stored(store, int(o), np.dtype(d), tuple(map(int, s))) for n, (d, s, o) in sample.items()}
                for sample in listing["samples"]
            ]
            if any(not s.fits(listing["bytes"]) for sample in found for s in sample.values()):
                continue
            for sample, more in zip(saved, found, strict=True):
                sample |= more
            keys |= {str(name): str(key) for name, key in listing["keys"].items()}
    return keys, saved


def room_for(size: int, folder: Path | None) -> bool:
    """Tells whether `size` more bytes fit on the disk of `folder`, or on that of temporary files for None."""
    return shutil.disk_usage(folder or tempfile.gettempdir()).free > size


def _close(file: BinaryIO) -> None:
    """Closes a file. That tries once more to write what a full disk did not take, an error that was raised before."""
    with suppress(OSError):
        file.close()


def _numbers(folder: Path) -> list[int]:
    """Returns the numbers of the parts that are listed in a folder."""
    names = (path.stem.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*.json"))
    return [int(name) for name in names if name.isdecimal()]
