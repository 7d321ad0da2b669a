"""The work folder of a run: its own, in a place that can be written, and enough to go on from."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, tune
from onnx_woq.errors import OutputChanged
from onnx_woq.tuning import work_folder
from onnx_woq.tuning.trials import Run
from tests.support import measure
from tests.zoo import small as zoo

RTNS = {f"b{bits}": Recipe("rtn", Spec(bits, 32)) for bits in (4, 8)}


def by_bits(path: Path) -> float:
    recipe = measure.recipe_of(Path(path))
    return recipe["spec"]["bits"] / 8 if recipe else 1.0


def test_a_second_run_to_the_same_output_is_refused_and_the_first_unharmed(lm, ids, cli, tmp_path, monkeypatch):
    arguments = ("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--samples", 6)
    seen = []
    real = Run.say

    def second(run: Run, stage: str, done: int, total: int) -> None:
        if stage == "evaluate" and not seen:
            seen.append(stat.S_IMODE(run.folder.stat().st_mode))
            seen.append(cli(*arguments))
            seen.append(sorted(path.name for path in run.folder.iterdir()))
        real(run, stage, done, total)

    monkeypatch.setattr(Run, "say", second)
    first = cli(*arguments, "--tolerance", 10)
    mode, other, left = seen
    assert mode == 0o700
    assert other.exit_code == 2
    assert f"another process is writing {tmp_path / 'q.onnx'}" in other.stderr
    assert len(left) == 2, "the lock and the trial"
    assert first.exit_code == 0
    measure.session(tmp_path / "q.onnx")
    assert not list(tmp_path.glob(".*"))


def test_a_planted_model_is_not_delivered(enc, tmp_path):
    """Somebody who could write to the folder once has put another model in the place of the best."""
    tune(enc, by_bits, configs=RTNS, objective="best", workdir=tmp_path / "w")
    [best] = (tmp_path / "w").glob("b8-*/enc.onnx")
    zoo.encoder(best, seed=7)
    tune(enc, by_bits, configs=RTNS, objective="best", workdir=tmp_path / "w", output=tmp_path / "q.onnx")
    tune(enc, by_bits, configs=RTNS, objective="best", output=tmp_path / "wanted.onnx")
    found, wanted = (measure.decoded(tmp_path / f"{name}.onnx") for name in ("q", "wanted"))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def test_a_folder_in_a_place_that_cannot_be_written(lm_folder, ids, cli, tmp_path, monkeypatch):
    """As a container has a folder of its host: the work folder lies in it, and goes in the end."""
    (tmp_path / "out").mkdir()
    made = []
    real = os.mkdir
    monkeypatch.setattr(work_folder.os, "access", lambda path, _: Path(path) != tmp_path)
    monkeypatch.setattr(os, "mkdir", lambda path, *more, **named: made.append(Path(path)) or real(path, *more, **named))
    cli.ok("quantize", lm_folder, "-o", tmp_path / "out", "--auto", "--calib", ids, "--tolerance", 10)
    assert tmp_path / "out" / ".onnx-woq-tune" in made
    assert not [path for path in made if path.parent == tmp_path]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_work_folder_that_cannot_be_made_names_the_option(lm, ids, cli, tmp_path):
    long = "x" * 245  # the name of a folder that is not too long by itself
    done = cli("quantize", lm, "-o", tmp_path / long, "--auto", "--calib", ids)
    assert done.exit_code == 2
    assert "--workdir" in done.stderr


def test_what_was_finished_in_time_is_not_done_again(lm, ids, cli, tmp_path, monkeypatch):
    arguments = ("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--tolerance", 1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "out_of_time", lambda run: run.journal.exists())
        done = cli(*arguments, "--timeout", 5)
    assert done.exit_code == 3
    assert f"finished trials are kept in {tmp_path / '.q.onnx.onnx-woq-tune'}, the same command goes on" in done.stderr
    (tmp_path / "q.onnx").unlink()
    again = cli.json(*arguments, code=3)
    assert [trial["resumed"] for trial in again["trials"]] == [True] + [False] * 5
    assert not list(tmp_path.glob(".*"))


def test_no_time_at_all_leaves_no_folder(lm, ids, cli, tmp_path):
    done = cli("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--timeout", 1e-6)
    assert done.exit_code == 3
    assert "are kept" not in done.stderr
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("given", [True, False], ids=["work folder", "temporary"])
@pytest.mark.parametrize("before", [True, False], ids=["changed", "new"])
def test_an_output_that_others_write_meanwhile_is_not_overwritten(before, given, enc, tmp_path):
    out, work = tmp_path / "q.onnx", tmp_path / "w" if given else None
    if before:
        out.write_bytes(b"old")

    def evaluate(path: Path) -> float:
        out.write_bytes(b"theirs")
        return by_bits(path)

    with pytest.raises(OutputChanged, match="is not overwritten") as refused:
        tune(enc, evaluate, configs=RTNS, workdir=work, output=out)
    assert out.read_bytes() == b"theirs"
    measure.session(Path(str(refused.value).split("take the chosen model from ")[1]))
    if given:
        assert tune(enc, evaluate, configs=RTNS, workdir=work, output=out).met, "the same call again goes on from there"
        measure.session(out)
