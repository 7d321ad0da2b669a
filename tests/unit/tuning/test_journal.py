"""The journal survives a kill at any byte."""

from __future__ import annotations

import json
import logging
import os

import pytest

from onnx_woq.errors import DiskError, OutputError
from onnx_woq.tuning import journal


def test_a_cut_line_loses_only_itself(tmp_path, caplog):
    whole = tmp_path / "whole.jsonl"
    for number in range(3):
        journal.append(whole, {"key": f"k{number}", "metric": number})
    text = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in range(len(text) + 1):
        file = tmp_path / "cut.jsonl"
        file.write_bytes(text[:cut])
        finished = sum(end - 1 <= cut for end in ends)
        with caplog.at_level(logging.ERROR):
            assert len(journal.read(file)) == finished
            journal.append(file, {"key": "new", "metric": 9})
            entries = journal.read(file)
        assert entries["new"]["metric"] == 9
        assert len(entries) == finished + 1


def test_the_last_entry_of_a_key_counts(tmp_path):
    file = tmp_path / "j.jsonl"
    journal.append(file, {"key": "a", "metric": 1})
    journal.append(file, {"key": "a", "metric": 2})
    assert journal.read(file) == {"a": {"key": "a", "metric": 2}}
    assert journal.read(tmp_path / "none.jsonl") == {}


def damaged(line: bytes) -> list[bytes]:
    entry = json.loads(line)
    return [
        json.dumps(entry | {"metric": 9}).encode(),  # another number under the same checksum
        b"[" * 200_000 + b"]" * 200_000,
        b'{"key": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b"\xff\xfe{}",
        b"\0" * 4096,
        b'{"key": ["a"]}',
        b'{"metric": 1}',
        b"[1, 2]",
        b"7",
        b'"text"',
        line[: len(line) // 2],
    ]


def test_what_is_no_entry_is_skipped_and_said_once(tmp_path, caplog):
    file = tmp_path / "j.jsonl"
    journal.append(file, {"key": "a", "metric": 1})
    (line,) = file.read_bytes().splitlines()
    for bad in damaged(line):
        file.write_bytes(bad + b"\n" + bad + b"\n" + line + b"\n")
        caplog.clear()
        assert journal.read(file) == {"a": {"key": "a", "metric": 1}}, bad[:40]
        assert [record.getMessage() for record in caplog.records] == [
            f"{file}, line 1 and 1 others: not a journal entry, skipped"
        ]


def test_a_line_that_is_too_long_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MOST_LINE", 100)
    file = tmp_path / "j.jsonl"
    journal.append(file, {"key": "a"})
    line = file.read_bytes()
    for long in (b"x" * 100, b"x" * 99 + b"\n", b"x" * 100 + b"\n", b"x" * 250 + b"\n", b"{" * 1000):
        file.write_bytes(long.rstrip(b"\n") + b"\n" + line)
        assert list(journal.read(file)) == ["a"]
        file.write_bytes(line + long)
        assert list(journal.read(file)) == ["a"]


def test_a_file_that_is_too_large_is_refused(tmp_path):
    file = tmp_path / "j.jsonl"
    file.touch()
    os.truncate(file, journal.MOST_BYTES + 1)  # a hole
    with pytest.raises(OutputError, match=r"j\.jsonl has .* bytes, more than a journal.*remove it"):
        journal.read(file)


def test_lines_of_version_0_1_have_no_checksum(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"key": "a", "metric": 1}\n')
    assert journal.read(file) == {"a": {"key": "a", "metric": 1}}


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_anything_else_of_that_name_is_refused(kind, tmp_path):
    file, other = tmp_path / "j.jsonl", tmp_path / "other"
    other.write_text('{"key": "a", "metric": 1}\n')
    {"link": lambda: file.symlink_to(other), "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[kind]()
    with pytest.raises(OutputError, match="no journal of this program: remove it"):
        journal.read(file)
    journal.append(file, {"key": "b"})
    assert journal.read(file) == {"b": {"key": "b"}}
    assert other.read_text() == '{"key": "a", "metric": 1}\n'


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(DiskError, match=r"j\.jsonl cannot be written, the disk is full"):
        journal.append(tmp_path / "j.jsonl", {"key": "a"})
