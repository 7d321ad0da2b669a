"""Locked folders: private to the user, used by one process at a time, and with no link that leads out of them.

The lock is one of the operating system, on an empty file in the folder, so it is freed when its process ends, however
that ends. Windows neither renames nor removes a file that is open, so such a file is closed first.
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


PRIVATE, READABLE = 0o077, 0o022
"""Permissions of others that a folder may not have: any, or those to write."""


def locked(folder: Path, out: Path, refused: int = PRIVATE) -> FileIO:
    """Makes a private folder, if it is not there, and locks it; closing the returned file frees the lock.

    Args:
        folder: the folder.
        out: the file that is being written in it, for messages.
        refused: the permissions of others that a folder which is there already may not have.

    Raises:
        OutputError: another process has locked the folder, or others than this user may use it.
        OSError: the folder cannot be made.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # the process that had locked it removes it meanwhile
            _check(folder, refused)
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
    """Removes a locked folder, as far as the system allows it, and frees the lock."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK:
                with suppress(OSError):
                    _discard(path)
    free(folder, lock)
    with suppress(OSError):
        folder.rmdir()


def free(folder: Path, lock: FileIO) -> None:
    """Frees the lock of a folder and removes its file; another process may use the folder from here on."""
    removed = False
    with suppress(OSError):
        (folder / _LOCK).unlink()
        removed = True
    lock.close()
    with suppress(OSError):
        if not removed:  # Windows removes it now that it is closed, unless another process has opened it meanwhile
            (folder / _LOCK).unlink()


def clear(folder: Path, but: Collection[str]) -> None:
    """Removes everything in a locked folder except some files; links are removed, not followed."""
    for path in list(folder.iterdir()):
        if path.name not in (*but, _LOCK):
            _discard(path)


def own_folder(path: Path) -> None:
    """Makes a folder in a locked one; anything else of that name is replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    path.mkdir(mode=0o700, exist_ok=True)


def own_file(path: Path) -> FileIO:
    """Opens a file in a locked folder for reading and writing; links and anything else of that name are replaced."""
    with suppress(FileNotFoundError):
        status = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            _discard(path)
    return _opened(path)


def _check(folder: Path, refused: int) -> None:
    """Raises OutputError unless a path is a folder of this user on which others have no permission in `refused`."""
    status = os.stat(folder, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{folder} is in the way, and no folder of this program: remove it")
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & refused):
        raise OutputError(f"{folder} is in the way: others may write to it; remove it")


def _opened(path: Path) -> FileIO:
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(path, "r+b", buffering=0, opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
