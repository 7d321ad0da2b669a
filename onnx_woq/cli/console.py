"""The terminal: named errors as exit codes, a progress bar, results as JSON or tables, announcements."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from onnx_woq.errors import OnnxWoqError, fault_text, system_failure, visible

if TYPE_CHECKING:
    from onnx_woq.progress import Progress

TOLERANCE_NOT_MET = 3
"""Exit code of a run whose result is written but is not as accurate as was asked for."""

INTERRUPTED = 130

FAULT = 1
"""Exit code of a run that met a fault of this program and has no result that is good enough."""

logger = logging.getLogger(__name__)


class BadInput(click.ClickException):
    """A named error on its way to the user: the message alone, exit code 2."""

    exit_code = 2


class Fault(click.ClickException):
    """A fault of this program on its way to the user: its type and place, exit code 1."""

    exit_code = FAULT


@contextmanager
def named_errors() -> Iterator[None]:
    """Turns named errors, and those of the system on a file, into exit code 2, others into 1, an interrupt into 130."""
    try:
        yield
    except OnnxWoqError as error:
        raise BadInput(visible(str(error))) from error
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if scarce := system_failure(error):
            raise BadInput(visible(str(scarce))) from error
        if isinstance(error, OSError):
            path = error.filename if isinstance(error.filename, str | bytes) else None  # a number of an open file
            told = str(error) if path is None else f"{os.fsdecode(path)}: {error.strerror}: check the path"
            raise BadInput(visible(told)) from error
        logger.debug("a fault of the program", exc_info=error)
        raise Fault(visible(fault_text(error))) from error
    except KeyboardInterrupt as interrupt:
        announce(f"interrupted: {interrupt}" if interrupt.args else "interrupted: nothing was written")
        sys.exit(INTERRUPTED)


def announce(line: str) -> None:
    """Writes a line to standard error, where it is not in the way of JSON and tables."""
    click.echo(visible(line), err=True)


class _Lasting(io.FileIO):
    """A stream that forgets what nobody takes: its reader has gone, or its disk is full."""

    def write(self, content: Any) -> int:
        """Writes bytes if that is possible; returns their number in any case."""
        with suppress(OSError):
            return super().write(content)
        return memoryview(content).nbytes


def make_streams_last() -> None:
    """Keeps standard output and standard error from stopping or undoing the work when they cannot be written.

    The numbers of closed streams are taken, or the next file that is opened would get the lines meant for them.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and not stream.isatty()):
            encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "replace")
            raw = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=name == "stderr"))


class _Messages(logging.Formatter):
    """The form of log messages, each on one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))


def set_up_logging(*, debug: bool = False) -> None:
    """Sends warnings, those of the log and those of libraries, to standard error; with `debug` all of our own log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Messages("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("onnx_woq").setLevel(logging.DEBUG if debug else logging.NOTSET)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message)

    warnings.showwarning = show


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Shows a bar on standard error and yields the callback that moves it; yields None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=visible(stage), completed=done, total=total or None)

        yield progress


def print_result(result: Any, as_json: bool, table: Callable[[Any], None]) -> None:
    """Prints a result as JSON, or as the tables that `table` draws."""
    if as_json:
        print_json(result.to_dict())
    else:
        table(result)


def print_json(value: Any) -> None:
    """Prints a value as JSON; infinities and NaN, which JSON does not know, become null."""
    click.echo(json.dumps(replace_non_finite(value), indent=2))


def replace_non_finite(value: Any) -> Any:
    """Replaces infinities and NaN by None, however deep in dictionaries, lists and tuples."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
