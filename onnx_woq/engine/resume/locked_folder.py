"""A folder that one process works in: nobody else may write to it, one process at a time does, and no link leads out.

The lock is the system's own, on an empty file in the folder, so it is freed when the process ends, however it ends. On
Windows a file that is open can be neither renamed nor removed: whoever renames or removes one closes it first.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection
from contextlib import suppress
from io import FileIO
from pathlib import Path

from filelock import lock_descriptor

from onnx_woq.errors import OutputError

_LOCK = "lock"


def locked(folder: Path, out: Path) -> FileIO:
    """Makes the folder if need be and locks it until the file that is returned is closed.

    Args:
        folder: private if it is there.
        out: what is being written in it, for messages.

    Raises:
        OutputError: another process has locked it, or what is there is no private folder.
        OSError: it cannot be made.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # removed by the process that had it
            _check(folder)
            if (folder / _LOCK).is_symlink():
                raise OutputError(f"{folder} is in the way: its lock is a link; remove it")
            lock = _opened(folder / _LOCK)
            try:
                if not lock_descriptor(lock.fileno(), blocking=False):
                    raise OutputError(
                        f"another process is writing {out} (it has locked {folder}): wait for it, or choose another "
                        "output"
                    )
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / _LOCK, follow_symlinks=False)):
                    return lock
            except BaseException:
                lock.close()
                raise
            lock.close()


def remove(folder: Path, lock: FileIO) -> None:
    """Removes a locked folder, as far as that is possible, and frees the lock."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK:
                with suppress(OSError):
                    _discard(path)
    free = False
    with suppress(OSError):
        (folder / _LOCK).unlink()  # last: from here on, others may come
        free = True
    lock.close()
    with suppress(OSError):
        if not free:  # Windows: now it can be, but not if another process has opened it meanwhile
            (folder / _LOCK).unlink()
        folder.rmdir()


def clear(folder: Path, but: Collection[str]) -> None:
    """Empties a locked folder but for some files; links in it are removed, not followed."""
    for path in list(folder.iterdir()):
        if path.name not in (*but, _LOCK):
            _discard(path)


def own_folder(path: Path) -> None:
    """Makes a folder in a private one; anything else of that name is replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    path.mkdir(mode=0o700, exist_ok=True)


def own_file(path: Path) -> FileIO:
    """Opens a file in a private folder for reading and writing; anything but a file with one name is replaced."""
    with suppress(FileNotFoundError):
        what = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(what.st_mode) or what.st_nlink > 1:
            _discard(path)
    return _opened(path)


def _check(folder: Path) -> None:
    """Raises OutputError for anything but a folder of this user's that nobody else may write to."""
    what = os.stat(folder, follow_symlinks=False)
    if not stat.S_ISDIR(what.st_mode):
        raise OutputError(f"{folder} is in the way, and no folder of this program: remove it")
    if hasattr(os, "geteuid") and (what.st_uid != os.geteuid() or stat.S_IMODE(what.st_mode) & 0o077):
        raise OutputError(f"{folder} is in the way: others may write to it; remove it")


def _opened(path: Path) -> FileIO:
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(path, "r+b", buffering=0, opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
