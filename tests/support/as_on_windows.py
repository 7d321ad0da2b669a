"""A program that quantizes as it would on Windows, as far as another system can show it.

    as_on_windows.py MODEL DATA FOLDER

Modules and names of `os` that only Unix has are gone when the package is imported, and a file that this process has
open or mapped can be neither renamed nor removed nor replaced. What it writes into FOLDER is for the caller to judge.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GONE = [
    "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_DSYNC", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "O_SYNC",
    "O_TMPFILE", "SEEK_DATA", "SEEK_HOLE", "chown", "copy_file_range", "eventfd", "fchdir", "fchmod", "fchown",
    "fdatasync", "fork", "fstatvfs", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getpriority", "getsid",
    "getuid", "getxattr", "killpg", "lchown", "lockf", "memfd_create", "mkfifo", "nice", "pathconf", "pipe2",
    "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "readv", "sched_getaffinity",
    "sched_setaffinity", "sched_yield", "sendfile", "setpriority", "setsid", "splice", "sync", "sysconf", "uname",
    "wait", "wait3", "wait4", "writev",
]  # fmt: skip
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog")


def package() -> list[str]:
    """Every module of the package."""
    import onnx_woq

    return [module.name for module in pkgutil.walk_packages(onnx_woq.__path__, "onnx_woq.")]


def take_away() -> None:
    """Imports the package for the sake of what it needs, then again without what only Unix has."""
    names = package()
    for name in names:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "onnx_woq"]:
        del sys.modules[name]
    for name in GONE:
        if hasattr(os, name):
            delattr(os, name)
    sys.modules.update(dict.fromkeys(MODULES))
    shutil._use_fd_functions = False
    here, sys.platform = sys.platform, "win32"
    for name in names:
        importlib.import_module(name)
    sys.platform = here  # what others import later is made for this system


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped."""
    real = os.path.realpath(path)
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    if any(os.path.lexists(link) and os.readlink(link) == real for link in descriptors):
        return True
    return any(line.split(maxsplit=5)[5:] == [real] for line in Path("/proc/self/maps").read_text().splitlines())


def refuse(name: str) -> None:
    """Makes a function of `os` fail for files in use."""
    real: Callable[..., Any] = getattr(os, name)

    def refusing(*paths: Any, **options: Any) -> Any:
        if not options.get("dir_fd") and any(os.path.isfile(path) and in_use(path) for path in paths):
            raise PermissionError(13, f"{name}: another process has it, says Windows", str(paths[0]))
        return real(*paths, **options)

    setattr(os, name, refusing)


class Stop:
    """A progress callback that interrupts when so many MatMuls are solved."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "solve" and done == self.after:
            raise KeyboardInterrupt


def main(model: Path, data: Path, folder: Path) -> None:
    """Quantizes once in one go, once interrupted and resumed, once over an earlier result, and tunes."""
    take_away()
    if os.path.isdir("/proc/self/fd"):
        for name in ("rename", "replace", "unlink", "remove"):
            refuse(name)
    woq = importlib.import_module("onnx_woq")
    feeds = [dict(np.load(file)) for file in sorted(data.iterdir())]
    recipe = woq.Recipe("gptq", true_sequential=True)
    for name in ("once", "resumed", "again"):
        (folder / name).mkdir()
    woq.quantize(model, folder / "once" / "q.onnx", recipe, feeds)
    try:
        woq.quantize(model, folder / "resumed" / "q.onnx", recipe, feeds, progress=Stop(5))
    except KeyboardInterrupt as end:
        print(end)
    woq.quantize(model, folder / "resumed" / "q.onnx", recipe, feeds, resume=True)
    woq.quantize(model, folder / "again" / "q.onnx", "RTN_G32ASYM")
    woq.quantize(model, folder / "again" / "q.onnx", recipe, feeds)
    woq.tune(model, None, feeds, configs=["RTN_G32ASYM", "GPTQ_G32ASYM"], objective="best", output=folder / "tuned")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
