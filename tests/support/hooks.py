"""Watch, slow down and kill what the package does, in this process or in a child that `run_cli` starts."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Solve = Callable[..., Any]
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


@contextmanager
def solver(method: str, around: Callable[[Solve], Solve]) -> Iterator[None]:
    """Replaces a method's solver by `around` of it; the signature, and so the options, stay."""
    from onnx_woq.core.methods.registry import METHODS

    entry = METHODS[method]
    real = entry.solve
    object.__setattr__(entry, "solve", functools.wraps(real)(around(real)))
    try:
        yield
    finally:
        object.__setattr__(entry, "solve", real)


def logged(log: Path, at: int = 0, action: Callable[[], None] = lambda: None) -> Callable[[Solve], Solve]:
    """A solver that appends a line "process K N" to `log`, and does `action` first in its call number `at`."""
    lock, calls = threading.Lock(), [0]

    def around(real: Solve) -> Solve:
        def solve(weight: Any, *args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[0] += 1
                number = calls[0]
                with log.open("a") as file:
                    file.write(f"{os.getpid()} {weight.shape[0]} {weight.shape[1]}\n")
            if number == at:
                action()
            return real(weight, *args, **kwargs)

        return solve

    return around


def solved(log: Path) -> int:
    """How often the solver has been called."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def _strike(number: int, pause: float) -> None:
    time.sleep(pause)  # what has been solved before is put away meanwhile
    os.kill(os.getpid(), number)
    time.sleep(2 if number == signal.SIGINT else 60)


def _kill_at_file_event(folder: str, at: int, log: str) -> None:
    """Ends this process at the `at`-th change that it makes to files below `folder`, which it counts in `log`."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in FILES or (event == "open" and not _writes(args)):
            return
        paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, str | bytes | os.PathLike)]
        if any(os.path.realpath(path).startswith(folder + os.sep) for path in paths):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if log:
                fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(fd, f"{event} {os.path.basename(paths[0])} {os.path.basename(paths[-1])}\n".encode())
                os.close(fd)

    sys.addaudithook(hook)


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run_cli(arguments: Sequence[object], **plan: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own.

    Args:
        arguments: of the command.
        plan: `log`, `method`: count the calls of that solver; `at`, `signal`, `pause`: what happens in call number
            `at`, `pause` seconds into it; `folder`, `event`, `events`: kill at that file event below the folder, and
            where to count them.
    """
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tests.support.hooks import main; main()"
    text = json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in plan.items()})
    command = [sys.executable, "-c", code, str(ROOT), text, *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "ONNX_WOQ_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)


def main() -> None:
    """What the child does."""
    plan, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    from onnx_woq.cli import main as command_line

    with ExitStack() as stack:
        if "log" in plan:
            action = functools.partial(_strike, plan.get("signal", signal.SIGKILL), plan.get("pause", 0.5))
            around = logged(Path(plan["log"]), plan.get("at", 0), action)
            stack.enter_context(solver(plan.get("method", "gptq"), around))
        if "folder" in plan:
            _kill_at_file_event(os.path.realpath(plan["folder"]), plan.get("event", 0), plan.get("events", ""))
        command_line(arguments, prog_name="onnx-woq")
