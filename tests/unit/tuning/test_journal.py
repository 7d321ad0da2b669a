"""The journal survives a kill at any byte."""

from __future__ import annotations

import logging

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
