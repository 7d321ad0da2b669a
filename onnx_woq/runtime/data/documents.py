"""Documents: the texts in a file, of which no more is read than is used."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from onnx_woq.errors import DataError
from onnx_woq.runtime.data import chat

SUFFIXES = (".txt", ".jsonl", ".csv")

_LONGEST_LINE = 1 << 22  # characters of a line of plain text; no model takes as many tokens
_PARTS = (("prompt", "completion"), ("instruction", "input", "output"))
_FIELDS = 'no field "text", no "messages", no prompt and completion, no instruction and output'


@dataclass(frozen=True)
class Document:
    """One document; `rendered` if its special tokens are in the text already, as a chat template writes them."""

    text: str
    rendered: bool = False


def head(path: Path, characters: int) -> str:
    """Returns the first characters of a UTF-8 file.

    Raises:
        DataError: the file is empty, not text or cannot be read.
    """
    with _opened(path) as stream:
        text = stream.read(characters)
        if not text.strip() and not any(line.strip() for line in stream):
            raise DataError(f"{path} is empty: give a file with text")
        return text


def lines(path: Path) -> Iterator[Document]:
    """Yields the lines of a .txt file that are not blank; of one that is longer than any model takes, the beginning.

    Raises:
        DataError: the file is not text or cannot be read.
    """
    with _opened(path) as stream:
        while part := stream.readline(_LONGEST_LINE):
            whole = part.endswith("\n")
            yield from (Document(line) for line in part.splitlines() if line.strip())
            while not whole and (rest := stream.readline(_LONGEST_LINE)):
                whole = rest.endswith("\n")


def records(path: Path, render: chat.Render) -> Iterator[Document]:
    """Yields the document of each record of a .jsonl or .csv file.

    That is the field "text"; "messages", rendered; prompt and completion, or instruction, input and output, one below
    the other; or else the only field that is text.

    Args:
        path: of the file.
        render: turns messages into text.

    Raises:
        DataError: a record cannot be read, or has no such field.
    """
    with _opened(path) as stream:
        for where, record in _csv(path, stream) if path.suffix == ".csv" else _json_lines(path, stream):
            try:
                found = _document(record, render)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if found is None:
                raise DataError(f"{where} has {_FIELDS}, and not exactly one other string field")
            yield found


def _document(record: Any, render: chat.Render) -> Document | None:
    """Returns the document of a record, None if it has none."""
    fields = {"text": record} if isinstance(record, str) else record if isinstance(record, dict) else {}
    strings = {name: value for name, value in fields.items() if isinstance(value, str)}
    if "text" in strings:
        return Document(_encodable(strings["text"]))
    messages = fields.get("messages")
    if isinstance(messages, list):
        return Document(_encodable(render(messages)), rendered=render is not chat.plain)
    for first, *middle, last in _PARTS:
        if first in strings and last in strings:
            parts = [strings.get(name, "") for name in (first, *middle, last)]
            return Document(_encodable("\n".join(filter(None, parts))))
    return Document(_encodable(*strings.values())) if len(strings) == 1 else None


def _json_lines(path: Path, stream: IO[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise DataError(f"{path} line {number} is nested too deeply: each line must be one record") from error
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON ({error}): each line must be one record") from error
        yield f"{path} line {number}", record


def _csv(path: Path, stream: IO[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(stream)
    try:
        for record in reader:
            yield f"{path} line {reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV ({error}): convert it to .jsonl") from error


def _encodable(text: str) -> str:
    """Returns a text that UTF-8 can encode: JSON may escape halves of a character, which become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Opens a UTF-8 file; what goes wrong while it is read is said with its name."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or use .npz for arrays") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
