"""A model that changes while it is being read: a named error, nothing written, whatever was changed and how."""

from __future__ import annotations

import os
import shutil

import pytest

from onnx_woq import quantize, tune
from onnx_woq.engine import execute
from onnx_woq.errors import InputChanged
from onnx_woq.recipe import Recipe
from tests.support import hooks, measure
from tests.zoo import small as zoo


def touch(path):
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def rewrite(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    touch(path)  # clocks of file systems may be coarse


def replace(path):
    """By another of the same size and time, as `mv` and every download does."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    os.replace(other, path)


def append(path):
    times = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = [touch, rewrite, replace, append, os.unlink]


@pytest.fixture
def model(tmp_path):
    return zoo.language_model(tmp_path / "in" / "m.onnx", external="weights.bin")


def at_the_last_weight(change, path, log):
    """Changes `path` while the last of the seven groups is solved, when everything before it has been kept."""
    return hooks.solver("rtn", hooks.logged(log, 7, lambda: change(path)))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["m.onnx", "weights.bin"])
def test_quantize(change, file, model, tmp_path):
    if os.name == "nt" and change in (replace, os.unlink):
        pytest.skip("an open file can be neither replaced nor removed there")
    out = tmp_path / "out"
    out.mkdir()
    with at_the_last_weight(change, model.with_name(file), tmp_path / "log"), pytest.raises(InputChanged, match=file):
        quantize(model, out / "q.onnx")
    assert hooks.solved(tmp_path / "log") >= 7
    assert list(out.iterdir()) == []


def test_after_the_last_weight(model, tmp_path, monkeypatch):
    """What stays float is copied last, from a file that may have changed since."""
    real = execute.final_metadata

    def changing(*args):
        rewrite(model.with_name("weights.bin"))
        return real(*args)

    monkeypatch.setattr(execute, "final_metadata", changing)
    with pytest.raises(InputChanged, match=r"weights\.bin"):
        quantize(model, tmp_path / "q.onnx")
    assert measure.listing(tmp_path).keys() == {"in", "in/m.onnx", "in/weights.bin"}


def test_the_command_says_it(model, tmp_path, cli):
    with at_the_last_weight(rewrite, model, tmp_path / "log"):
        result = cli("quantize", model, "-o", tmp_path / "out" / "q.onnx")
    assert result.exit_code == 2
    assert "m.onnx was changed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_resumed_run(model, tmp_path):
    """The first run is interrupted; the second goes on from there, and the model changes under it."""

    def interrupt():
        raise KeyboardInterrupt

    out = tmp_path / "out" / "q.onnx"
    with hooks.solver("rtn", hooks.logged(tmp_path / "a", 5, interrupt)), pytest.raises(KeyboardInterrupt):
        quantize(model, out)
    change = hooks.logged(tmp_path / "b", 1, lambda: rewrite(model.with_name("weights.bin")))
    with hooks.solver("rtn", change), pytest.raises(InputChanged):
        quantize(model, out, resume=True)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize("when", ["while a trial is made", "while it is judged"])
def test_tune(when, model, lm_data, tmp_path):
    """A run that tries several configurations stops: none of them would be of the model that was read."""
    judged = []

    def score(path):
        judged.append(path)
        if when == "while it is judged" and len(judged) == 2:  # the float model is judged first
            rewrite(model.with_name("weights.bin"))
        return 1.0

    at = 7 if when == "while a trial is made" else 10**6
    log = hooks.logged(tmp_path / "log", at, lambda: rewrite(model))
    recipes = {"a": Recipe(), "b": Recipe().with_spec(bits=8)}
    with hooks.solver("rtn", log), pytest.raises(InputChanged):
        tune(model, score, configs=recipes, output=tmp_path / "out" / "q.onnx", objective="smallest")
    assert not (tmp_path / "out").exists()


def test_a_link_that_is_pointed_elsewhere_changes_nothing(tmp_path):
    """The files that are read are the real ones; a cache may point its link to a newer snapshot meanwhile."""
    model = zoo.language_model(tmp_path / "blobs" / "m.onnx")
    link = tmp_path / "m.onnx"
    link.symlink_to(model)

    def repoint(path):
        path.unlink()
        path.symlink_to(tmp_path / "blobs" / "newer.onnx")

    with at_the_last_weight(repoint, link, tmp_path / "log"):
        quantize(link, tmp_path / "q.onnx")
    quantize(model, tmp_path / "r.onnx")
    assert (tmp_path / "q.onnx.data").read_bytes() == (tmp_path / "r.onnx.data").read_bytes()
