"""The folder of a tuning run, with its journal and the models of its trials: private, and locked while it is used."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onnx_woq.engine.output import make_folder, remove_empty
from onnx_woq.engine.resume.locked_folder import READABLE, free, locked, remove
from onnx_woq.errors import OutputChanged, OutputError

_ENDING = ".onnx-woq-tune"


def default_folder(output: Path) -> Path:
    """Returns the work folder of a run that writes to `output`, if the user names none.

    It lies beside the output, or in it if that is a folder in a place where nothing can be made, as where a container
    has a folder of its host.
    """
    beside = output.parent / f".{output.name}{_ENDING}"
    if not output.is_dir() or (beside.is_dir() and output.name):
        return beside
    if output.name in ("", "..") or not os.access(output.parent, os.W_OK | os.X_OK):
        return output / _ENDING
    return beside


@contextmanager
def work_folder(given: str | Path | None, *, keep: bool, out: Path | None = None) -> Iterator[Path]:
    """Opens the folder of journal and trials: the one given, or a temporary one that is removed unless `keep`.

    A failure leaves a given folder for the next run to resume from, and none that was made for nothing.

    Args:
        given: the folder that the user named; None for a temporary one.
        keep: a temporary folder stays.
        out: the file that the run will write, for messages.

    Raises:
        OutputError: the folder cannot be made, others may write to it, or another process works in it.
    """
    if given is None:
        folder = Path(tempfile.mkdtemp(prefix="onnx-woq-"))
        try:
            yield folder
        except BaseException as error:
            keep = isinstance(error, OutputChanged)  # the chosen model is there
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return
    folder = Path(given)
    new: list[Path] = []
    try:
        new += [] if folder.exists() else [folder]
        new += make_folder(folder.parent)
        lock = locked(folder, out or folder, READABLE)
    except OSError as error:
        remove_empty(new)
        reason = error.strerror or error
        raise OutputError(f"cannot use the work folder {given}: {reason}; name another one (--workdir)") from error
    try:
        yield folder
    except BaseException:
        free(folder, lock)
        remove_empty(new)
        raise
    free(folder, lock)


def discard(folder: Path) -> None:
    """Removes the work folder of a finished run, unless another process works in it already."""
    with suppress(OutputError, OSError):
        remove(folder, locked(folder, folder, READABLE))
