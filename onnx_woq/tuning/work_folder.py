"""The folder of a tuning run: its journal and the models of its trials."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_woq.engine.output import make_folder, remove_empty
from onnx_woq.errors import OutputError


@contextmanager
def work_folder(given: str | Path | None, *, keep: bool) -> Iterator[Path]:
    """Opens the folder of journal and trials: the one given, or a temporary one that is removed unless `keep`.

    A failure leaves a given folder for the next run to resume from, and none that was made for nothing.
    """
    if given is None:
        folder = Path(tempfile.mkdtemp(prefix="onnx-woq-"))
        try:
            yield folder
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        made = make_folder(Path(given))
    except OSError as error:
        raise OutputError(f"cannot make the work folder {given}: {error.strerror or error}") from error
    try:
        yield Path(given)
    except BaseException:
        remove_empty(made)
        raise
