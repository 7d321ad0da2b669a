"""The tuning journal: append-only JSONL, so that a killed run continues where it was.

Each line has a checksum of its own; those of version 0.1 have none. The journal lies in a private folder, yet whatever
stands in it is read within bounds, and an entry that is no whole one counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from onnx_woq.engine.resume.locked_folder import own_file
from onnx_woq.errors import OutputError
from onnx_woq.graph.io.save import failure

logger = logging.getLogger(__name__)

MOST_LINE, MOST_BYTES = 16 << 20, 1 << 30
"""Bytes of a line, and of a journal, at most: a trial takes some kilobytes."""

_CHECK = "check"


def append(path: Path, entry: dict[str, Any]) -> None:
    """Adds one line and makes sure that it has reached the disk.

    Raises:
        OutputError: it cannot be written; a DiskError if the disk is full or fails.
    """
    line = json.dumps(entry | {_CHECK: _checksum(entry)}, sort_keys=True).encode() + b"\n"
    try:
        with own_file(path) as file:
            if file.seek(0, os.SEEK_END) and not _ends_with_newline(file):
                line = b"\n" + line  # a killed run may have left half a line: close it, `read` skips it
            file.seek(0, os.SEEK_END)
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise failure(error, path) from error


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the last entry of every key; lines that are cut short or damaged are skipped with a warning.

    Raises:
        OutputError: the file is no journal, or cannot be read.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(f"{path} is in the way, and no journal of this program: remove it")
    try:
        if not path.exists():
            return {}
        if (size := path.stat().st_size) > MOST_BYTES:
            raise OutputError(f"{path} has {size:,} bytes, more than a journal of this program: remove it")
        with path.open("rb") as file:
            return _entries(path, file)
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror or error}): remove it") from error


def _entries(path: Path, file: IO[bytes]) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    skipped: list[int] = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry = json.loads(line)
            check = entry.pop(_CHECK, None)
            if check is not None and check != _checksum(entry):
                raise ValueError("another checksum")
            entries[entry["key"]] = entry
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped.append(number)
    if skipped:
        more = f" and {len(skipped) - 1} others" if len(skipped) > 1 else ""
        logger.warning("%s, line %d%s: not a journal entry, skipped", path, skipped[0], more)
    return entries


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file; one that is too long as an empty one."""
    while line := file.readline(MOST_LINE):
        whole = line.endswith(b"\n") or len(line) < MOST_LINE
        while not whole:
            rest = file.readline(MOST_LINE)
            whole, line = rest.endswith(b"\n") or not rest, b""
        yield line


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(entry, sort_keys=True).encode(), digest_size=8).hexdigest()


def _ends_with_newline(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
