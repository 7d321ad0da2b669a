"""Outputs that cannot be written are refused before any work is done."""

from __future__ import annotations

import os

import pytest

from onnx_woq.engine.output import companions_copied, destination, make_folder
from onnx_woq.errors import OutputError


def test_output_is_a_file_by_its_suffix_and_a_folder_otherwise(tmp_path):
    source = tmp_path / "in.onnx"
    source.touch()
    assert destination(tmp_path / "out.onnx", source).folder is None
    place = destination(tmp_path / "out", source)
    assert place.onnx == tmp_path / "out" / "in.onnx"
    assert place.folder == tmp_path / "out"


def test_output_equal_to_input_is_refused_also_through_a_link(tmp_path):
    source = tmp_path / "in.onnx"
    source.touch()
    (tmp_path / "link.onnx").symlink_to(source)
    for output in (source, tmp_path, tmp_path / "link.onnx", tmp_path / "x" / ".." / "in.onnx"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="input"):
            destination(output, source)


def test_a_file_in_the_way_is_refused(tmp_path):
    source = tmp_path / "in.onnx"
    source.touch()
    with pytest.raises(OutputError, match="not a folder"):
        destination(source / "below" / "out.onnx", source)


def test_companions_are_copied_and_weights_are_not(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "model.onnx", "model.onnx.data", "notes.txt"):
        (source / name).write_text(name)
    (target / "config.json").write_text("old")
    before = sorted(os.listdir(target))
    with pytest.raises(KeyError), companions_copied(source, target):
        raise KeyError
    assert sorted(os.listdir(target)) == before
    assert (target / "config.json").read_text() == "old"
    with companions_copied(source, target):
        assert (target / "config.json").read_text() == "old"
    assert sorted(os.listdir(target)) == ["config.json", "merges.txt", "tokenizer.json"]
    assert (target / "config.json").read_text() == "config.json"


def test_make_folder_says_what_it_created(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []
