"""Output: the file or folder that a result is written to, the files copied beside it, and the disk space it needs."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from onnx_woq.engine.plan import Plan
from onnx_woq.engine.resume.store import ResumeStore, partial_folder
from onnx_woq.errors import OutputError
from onnx_woq.graph.io.external_data import leads_out
from onnx_woq.graph.io.model import Model, file_bytes
from onnx_woq.graph.io.save import data_path, failure, save

logger = logging.getLogger(__name__)

COMPANIONS = (
    "*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "bpe.codes", "merges.txt", "tokens.txt", "vocab.txt",
)  # fmt: skip
"""Patterns of the files that a tokenizer or `optimum` needs beside a model; they are copied into an output folder."""

MAX_COMPANION_BYTES = 64 << 20


@dataclass(frozen=True)
class Destination:
    """The place that a result is written to.

    Attributes:
        onnx: the .onnx file.
        folder: the folder that its companions are copied into; None if the user asked for a file.
    """

    onnx: Path
    folder: Path | None


def destination(output: str | Path, source: Path) -> Destination:
    """Returns the destination that a user's `output` names, after a check that it can be written.

    Args:
        output: an .onnx file; or a folder, which gets a model of the source's name and its companions.
        source: the .onnx file of the float model.

    Raises:
        OutputError: the destination cannot be written, or is the source itself.
    """
    try:
        return _destination(Path(output), source)
    except OSError as error:  # such as a name that is too long
        raise failure(error, Path(output)) from error


def _destination(output: Path, source: Path) -> Destination:
    is_file = output.suffix == ".onnx" and not output.is_dir()
    place = Destination(output if is_file else output / source.name, None if is_file else output)
    if place.onnx.is_dir():
        raise OutputError(f"{place.onnx} is a folder: choose another output")
    if place.onnx.exists() and place.onnx.samefile(source):
        raise OutputError(f"output {place.onnx} is the input model: choose another output, the input is never modified")
    for name in (partial_folder(place.onnx), data_path(place.onnx)):  # both are longer than that of the file
        name.exists()
    above = place.onnx.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"{above} is not a folder: choose another output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{above} is not writable: choose another output or change its permissions")
    return place


def companions(model: Path) -> list[Path]:
    """Returns the tokenizer and config files of a model: those beside it and, from a folder `onnx`, those one above.

    Links that lead out of the model's folders are left out with a warning: they would give away other people's files.
    Files of more than 64 MiB are taken for weights.

    Args:
        model: the .onnx file, as the user named it.
    """
    found: dict[str, Path] = {}
    for folder in homes(model):
        for path in sorted({path for pattern in COMPANIONS for path in folder.glob(pattern)}):
            if path.name in found or not path.is_file() or path.stat().st_size > MAX_COMPANION_BYTES:
                continue
            if leads_out(path, model):
                logger.warning("%s is not copied: it is a link that leads out of the model's folder", path)
            else:
                found[path.name] = path
    return [found[name] for name in sorted(found)]


def homes(model: Path) -> list[Path]:
    """Returns the folders that a model's companions may be in; optimum and the Hub keep models in a folder `onnx`."""
    beside = model.absolute().parent
    return [beside, beside.parent] if beside.name == "onnx" else [beside]


@contextmanager
def companions_copied(model: Path, target: Path) -> Iterator[None]:
    """Copies the companions of a model into the folder `target`, once the `with` block has succeeded.

    The copies are made before the block, in a private folder, so that a full disk is met before `target` changes.
    """
    left = [path for path in companions(model) if path.parent.resolve() != target.resolve()]
    with tempfile.TemporaryDirectory(prefix=".onnx-woq-", dir=target) as stage:
        copies = [Path(shutil.copyfile(path, Path(stage) / path.name)) for path in left]
        yield
        for copy in copies:
            os.replace(copy, target / copy.name)


def make_folder(path: Path) -> list[Path]:
    """Creates a folder and its missing parents, or none of them; returns the created ones, innermost first."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.insert(0, folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, given innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Creates the folder of a result if need be; a failure in the `with` block removes it again if it is empty.

    Raises:
        OutputError: the folder cannot be created.
    """
    try:
        made = make_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def write(
    model: Model,
    place: Destination,
    properties: Mapping[str, str],
    companions_from: Path,
    store: ResumeStore | None = None,
    check: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Writes a model and, if the output is a folder, its companions; a failure removes everything new again.

    Args:
        model: the model.
        place: its destination.
        properties: its metadata.
        companions_from: the .onnx file whose companions are copied, as the user named it.
        store: the resume store whose data file becomes that of the model; None if there is none.
        check: called with the complete model before it takes its place, see `save`.

    Returns:
        The files of the model.

    Raises:
        OutputError: a file cannot be written; a DiskError if the disk is full or fails.
    """
    stored = store.complete() if store else None
    try:
        with (
            output_folder(place.onnx.parent),
            companions_copied(companions_from, place.folder) if place.folder else nullcontext(),
        ):
            return save(model, place.onnx, metadata=properties, stored=stored, check=check)
    except OSError as error:
        raise failure(error, place.onnx) from error


def check_room(plan: Plan, place: Destination) -> None:
    """Checks that the disk has room for the result of a plan.

    What an unfinished run has left counts as free: it is either resumed or replaced.

    Raises:
        OutputError: the disk has less space than the result needs.
    """
    rows = [weight.report() for weight in (*plan.groups, *plan.embeddings)]
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    needed = file_bytes(plan.model) - saved + sum(plan.copies.values())
    above = place.onnx.absolute().parent
    while not above.exists():
        above = above.parent
    left = partial_folder(place.onnx) / data_path(place.onnx).name
    there = _on_disk(left) if left.is_file() else 0
    free = shutil.disk_usage(above).free
    if needed > free + there:
        raise OutputError(
            f"{place.onnx} needs about {needed:,} bytes, its disk has {free:,} free: make room or choose another disk"
        )


def _on_disk(file: Path) -> int:
    """Returns the bytes that a file takes on its disk, on which holes take none."""
    status = file.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
