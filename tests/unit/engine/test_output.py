"""Outputs that cannot be written are refused before any work is done."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from onnx_woq.engine.output import companions, companions_copied, destination, make_folder
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
    with pytest.raises(KeyError), companions_copied(source / "model.onnx", target):
        raise KeyError
    assert sorted(os.listdir(target)) == before
    assert (target / "config.json").read_text() == "old"
    with companions_copied(source / "model.onnx", target):
        assert (target / "config.json").read_text() == "old"
    assert sorted(os.listdir(target)) == ["config.json", "merges.txt", "tokenizer.json"]
    assert (target / "config.json").read_text() == "config.json"


NAMES = ["config.json", "source.spm", "cl100k.tiktoken", "tokens.txt", "bpe.codes", "chat.jinja", "sp.model"]


def filled(folder, names, text="x"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


def test_from_a_folder_called_onnx_those_one_above_are_taken_too(tmp_path):
    filled(tmp_path / "repo", NAMES)
    filled(tmp_path / "repo" / "onnx", ["model.onnx", "config.json"], "nearer")
    found = companions(tmp_path / "repo" / "onnx" / "model.onnx")
    assert [path.name for path in found] == sorted(NAMES)
    assert {path.name for path in found if path.read_text() == "nearer"} == {"config.json"}
    filled(tmp_path / "repo" / "other", ["model.onnx"])
    assert companions(tmp_path / "repo" / "other" / "model.onnx") == []


def test_a_relative_name_finds_them_as_well(tmp_path, monkeypatch):
    filled(tmp_path / "repo", NAMES)
    monkeypatch.chdir(filled(tmp_path / "repo" / "onnx", ["model.onnx"]))
    with companions_copied(Path("model.onnx"), filled(tmp_path / "out", [])):
        pass
    assert sorted(os.listdir(tmp_path / "out")) == sorted(NAMES)


def test_links_that_lead_out_are_left_out_with_a_warning(tmp_path, caplog):
    secret = filled(tmp_path, ["secret.json"]) / "secret.json"
    model = filled(tmp_path / "in", ["model.onnx", "real.txt"]) / "model.onnx"
    (tmp_path / "in" / "config.json").symlink_to(secret)
    (tmp_path / "in" / "vocab.txt").symlink_to("real.txt")
    os.link(secret, tmp_path / "in" / "hard.json")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in companions(model)] == ["vocab.txt"]
    assert "config.json is not copied" in caplog.text
    assert "hard.json is not copied" in caplog.text


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    cache = filled(tmp_path / "models--a--b" / "blobs", ["1", "2", "3"])
    snapshot = filled(tmp_path / "models--a--b" / "snapshots" / "f" / "onnx", [])
    (snapshot / "model.onnx").symlink_to("../../../blobs/1")
    (snapshot / "config.json").symlink_to("../../../blobs/2")
    (snapshot.parent / "tokenizer.json").symlink_to("../../blobs/3")
    assert cache.is_dir()
    assert [path.name for path in companions(snapshot / "model.onnx")] == ["config.json", "tokenizer.json"]


def test_companions_are_not_copied_onto_themselves(tmp_path):
    repo = filled(tmp_path / "repo", ["config.json"])
    filled(repo / "onnx", ["model.onnx", "vocab.txt"])
    with companions_copied(repo / "onnx" / "model.onnx", repo):
        pass
    assert sorted(os.listdir(repo)) == ["config.json", "onnx", "vocab.txt"]


def test_make_folder_says_what_it_created(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []
