"""The tuning journal: append-only JSONL, so that a killed run continues where it was."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def append(path: Path, entry: dict[str, Any]) -> None:
    """Adds one line and makes sure that it has reached the disk."""
    with path.open("a+b") as file:
        if file.tell() and not _ends_with_newline(file):
            file.write(b"\n")  # a killed run may have left half a line: close it, `read` skips it
        file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the last entry of every key; lines cut short by a kill are skipped with a warning."""
    entries: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return entries
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            entries[entry["key"]] = entry
        except (ValueError, KeyError, TypeError):
            logger.warning("%s, line %d: not a journal entry, skipped", path, number)
    return entries


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
