"""Tuning: odd configurations, odd names, work done once, nothing removed that is not its own."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, Spec, tune
from onnx_woq.cli import main
from onnx_woq.core.stats import Stats
from onnx_woq.engine import memory, schedule
from onnx_woq.engine import quantize as pipeline
from onnx_woq.engine.resume import store as partial
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.errors import DiskError, NothingToQuantize
from onnx_woq.graph.io.model import model_hash
from onnx_woq.presets import TUNED
from onnx_woq.tuning import tune as autotune
from tests.zoo.nodes import graph, node, random, value, write


@pytest.fixture
def one_matmul(tmp_path):
    """Its only MatMul is also its last one."""
    product, x, y = node("MatMul", ["x", "W"], ["y"]), value("x", ("t", 64)), value("y", ("t", 32))
    return write(tmp_path / "m.onnx", graph([product], [x], [y], {"W": random(64, 32)}))


def test_a_configuration_that_finds_nothing_is_a_failed_trial(one_matmul, tmp_path):
    data = [np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32) for i in range(4)]
    result = tune(one_matmul, lambda _: 1.0, data, objective="best", workdir=tmp_path / "w")
    status = {trial.name: trial.status for trial in result.trials}
    assert status == dict.fromkeys(TUNED, "ok") | {"GPTQ_G32ASYM_DISABLE_LAST_MATMUL": "failed"}
    assert result.met
    with pytest.raises(NothingToQuantize):
        tune(one_matmul, lambda _: 1.0, data, configs=["GPTQ_G32ASYM_DISABLE_LAST_MATMUL"], workdir=tmp_path / "v")


def test_a_full_disk_is_no_failed_trial(one_matmul, tmp_path, monkeypatch):
    """Once there is room, the same call goes on, with the trials that are finished and the MatMuls that are done."""
    configs, write = ["RTN_G32ASYM", Recipe("rtn", Spec(bits=8))], partial._write
    call = {"configs": configs, "objective": "best", "workdir": tmp_path / "w"}

    def full(file, content, place):
        if place and Path(file.name).match("rtn-*/*/journal"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content, place)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "_write", full)
        with pytest.raises(DiskError, match="make room"):
            tune(one_matmul, _better_at_8_bits, None, **call)
    done = tune(one_matmul, _better_at_8_bits, None, **call)
    assert [(trial.status, trial.resumed) for trial in done.trials] == [("ok", True), ("ok", False)]


def samples(count):
    return [np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32) for i in range(count)]


def test_a_journal_cannot_have_a_folder_removed(one_matmul, tmp_path):
    """Where a trial's model stands follows from the work folder, not from what a journal says."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "m.onnx").write_bytes(b"mine")
    work = tmp_path / "w"
    first = tune(one_matmul, _better_at_8_bits, None, configs=["RTN_G32ASYM"], objective="best", workdir=work)
    journal = work / "journal.jsonl"
    journal.write_text(journal.read_text().replace(str(first.path), str(precious / "m.onnx")))
    assert str(precious) in journal.read_text()
    configs = ["RTN_G32ASYM", Recipe("rtn", Spec(bits=8))]
    again = tune(one_matmul, _better_at_8_bits, None, configs=configs, objective="best", workdir=work)
    assert (precious / "m.onnx").read_bytes() == b"mine"
    assert again.path.is_relative_to(work)


def _better_at_8_bits(path):
    return float(path.with_name("m.onnx.data").stat().st_size if path.with_name("m.onnx.data").exists() else 0)


@pytest.mark.parametrize("name", ["../outside", "a/b", "/absolute", "..", "two words: 3 bits"])
def test_a_configuration_may_be_called_anything(name, one_matmul, tmp_path):
    work = tmp_path / "deep" / "w"
    result = tune(one_matmul, lambda _: 1.0, None, configs={name: Recipe()}, workdir=work)
    assert result.best.name == name
    assert result.path.is_relative_to(work)
    assert ".." not in result.path.relative_to(work).parts


@pytest.mark.parametrize(
    ("available", "asked", "calibrating"), [(20, 16, 16), (24, 16, 16), (40, 16, 16), (16, 16, 11)]
)
def test_asked_for_samples_calibrate_where_there_are_enough(available, asked, calibrating, one_matmul, monkeypatch):
    seen = []
    update = Stats.update
    monkeypatch.setattr(Stats, "update", lambda stats, x, *more: (seen.append(len(x)), update(stats, x, *more))[1])
    tune(one_matmul, None, samples(available), configs=["GPTQ_G32ASYM"], samples=asked)
    assert len(seen) == calibrating


def test_the_source_is_hashed_once(one_matmul, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(autotune, "model_hash", lambda model: calls.append(model) or model_hash(model))
    monkeypatch.setattr(pipeline, "model_hash", lambda model: calls.append(model) or model_hash(model))
    tune(one_matmul, lambda _: 1.0, samples(3), objective="best", output=tmp_path / "q.onnx")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        (["--algorithm", "gptq"], "GPTQ 4 bit g32 asym"),
        (["--config", "gptq_g128asym"], "GPTQ_G128ASYM"),
        (["--config", "GPTQ_G128ASYM", "--bits", "3"], "GPTQ_G128ASYM: 3 bit g128 asym"),
        ([], "RTN_G32ASYM"),
        (["--auto", "--algorithm", "rtn", "--objective", "best"], "RTN_G32ASYM"),
    ],
)
def test_a_row_is_called_what_it_is(flags, label, one_matmul, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.one", lambda _: 1.0, raising=False)
    arguments = ["quantize", str(one_matmul), "-o", str(tmp_path / "q.onnx"), "--eval", "builtins:one", "--json"]
    arguments += ["--calib", "random", "--samples", "3"]
    done = CliRunner().invoke(main, [*arguments, *flags])
    result = json.loads(done.stdout)
    assert result["best"] == label
    assert len({trial["name"] for trial in result["trials"]}) == (len(TUNED) if "--auto" in flags else 1)


@pytest.mark.parametrize("config", ["GPTQ_G32ASYM", Recipe(lowrank=16, bias_correction=True)], ids=["plain", "added"])
def test_statistics_beyond_the_memory_budget_give_the_same_model(config, one_matmul, tmp_path, monkeypatch):
    spilled = []
    spill = SharedStatistics._spill
    monkeypatch.setattr(SharedStatistics, "_spill", lambda *a: (spilled.append(file := spill(*a)), file)[1])
    written = []
    for budget in (1 << 30, 1):
        monkeypatch.setattr(memory, "WINDOW", budget)
        work = tmp_path / str(budget)
        result = tune(one_matmul, lambda _: 1.0, samples(4), configs=[config], workdir=work)
        written.append(result.path.read_bytes())
        assert len(spilled) == (budget == 1)
    assert written[0] == written[1]
    assert not spilled[0].exists()


@pytest.fixture
def two_matmuls(tmp_path):
    """The last one is left float by one of the presets."""
    nodes = [node("MatMul", ["x", "A"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "B"], ["y"])]
    weights = {"A": random(64, 96), "B": random(96, 80, seed=1)}
    return write(tmp_path / "two.onnx", graph(nodes, [value("x", ("t", 64))], [value("y", ("t", 80))], weights))


def test_what_two_configurations_have_in_common_is_solved_once(two_matmuls, tmp_path, monkeypatch):
    calls = []
    solve_task = schedule.solve_task
    monkeypatch.setattr(schedule, "solve_task", lambda task, *way: (calls.append(task), solve_task(task, *way))[1])
    size = iter(range(99))
    result = tune(two_matmuls, lambda _: next(size), samples(3), objective="best", output=tmp_path / "best.onnx")
    assert [trial.status for trial in result.trials] == ["ok"] * len(TUNED)
    assert len(calls) == 10, "two MatMuls by five different configurations"
    assert result.best.name == TUNED[-1]
    alone = tmp_path / "alone"
    alone.mkdir()
    less = "GPTQ_G32ASYM_DISABLE_LAST_MATMUL"
    both = tune(two_matmuls, lambda _: next(size), samples(3), configs=["GPTQ_G32ASYM", less], objective="best")
    pipeline.quantize(two_matmuls, alone / "two.onnx", less, samples(3))
    for name in ("two.onnx", "two.onnx.data"):
        assert both.path.with_name(name).read_bytes() == (alone / name).read_bytes()


def test_a_configuration_without_data_calibrates_nothing(two_matmuls, monkeypatch):
    monkeypatch.setattr(Stats, "update", lambda *_: pytest.fail("calibrated for nothing"))
    result = tune(two_matmuls, lambda _: 1.0, samples(3))
    assert [trial.name for trial in result.trials] == ["RTN_G32ASYM"]
