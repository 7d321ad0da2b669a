"""The terminal: named errors as exit codes, a progress bar, results as JSON or tables, announcements."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from onnx_woq.errors import OnnxWoqError, fault_text, system_failure

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
    """Turns named errors into exit code 2, others into 1 and an interrupt into 130, without a traceback."""
    try:
        yield
    except OnnxWoqError as error:
        raise BadInput(str(error)) from error
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if named := system_failure(error) or (error if isinstance(error, OSError) else None):
            raise BadInput(str(named)) from error
        logger.debug("a fault of the program", exc_info=error)
        raise Fault(fault_text(error)) from error
    except KeyboardInterrupt as interrupt:
        announce(f"interrupted: {interrupt}" if interrupt.args else "interrupted: nothing was written")
        sys.exit(INTERRUPTED)


def announce(line: str) -> None:
    """Writes a line to standard error, where it is not in the way of JSON and tables."""
    click.echo(line, err=True)


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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

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
