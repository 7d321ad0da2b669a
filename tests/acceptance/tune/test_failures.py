"""A configuration that fails, a fault of this program and a failure of the system are three different things."""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from onnx_woq import Recipe, Spec, tune
from onnx_woq.errors import EvaluationError, ModelError, OutputError, ResourceError
from tests.support import hooks, measure

CONFIGS = {"b4": Recipe("rtn", Spec(4, 32)), "hqq": Recipe("hqq", Spec(4, 32)), "b8": Recipe("rtn", Spec(8, 32))}


def by_bits(path: Path) -> float:
    recipe = measure.recipe_of(Path(path))
    return recipe["spec"]["bits"] / 8 if recipe else 1.0


def broken(error: BaseException):
    """A context in which HQQ raises."""

    def raising(*_: object, **__: object) -> None:
        raise error

    return hooks.solver("hqq", lambda _: raising)


def remembered(work: Path) -> list[str]:
    entries = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()]
    return [entry["name"] for entry in entries if "name" in entry]


def test_a_configuration_that_does_not_go_with_the_model_is_remembered(enc, tmp_path):
    with broken(ModelError("not this one")):
        result = tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    assert [(t.status, t.error) for t in result.trials][1] == ("failed", "ModelError: not this one")
    assert (result.met, result.best.name, result.faults) == (True, "b8", ())
    again = tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    assert [trial.resumed for trial in again.trials] == [True] * 3


@pytest.mark.parametrize(
    "error", [KeyError("/key/MatMul"), TypeError("no"), AssertionError(), ValueError("no")], ids=repr
)
def test_a_fault_of_this_program_is_said_and_tried_again(error, enc, tmp_path):
    with broken(error):
        result = tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    [fault] = result.faults
    assert (fault.name, fault.status) == ("hqq", "fault")
    for part in (type(error).__name__, str(error), "Please report it", "line"):
        assert part in fault.error
    assert (result.met, result.best.name) == (True, "b8")
    assert remembered(tmp_path) == ["b4", "b8"]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["trials"][1]["status"] == "fault"
    again = tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    assert [(trial.status, trial.resumed) for trial in again.trials] == [("ok", True), ("ok", False), ("ok", True)]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError("4 GB"), ResourceError),
        (OSError(errno.EMFILE, "Too many open files"), ResourceError),
        (BrokenProcessPool("a worker was killed"), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError),
        (OutputError("another process is writing it"), OutputError),
    ],
    ids=repr,
)
def test_a_failure_of_the_system_ends_the_run_and_a_later_one_goes_on(error, named, enc, tmp_path):
    with broken(error), pytest.raises(named):
        tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    assert remembered(tmp_path) == ["b4"]
    again = tune(enc, by_bits, configs=CONFIGS, workdir=tmp_path)
    assert [(trial.status, trial.resumed) for trial in again.trials] == [("ok", True), ("ok", False), ("ok", False)]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_what_runs_out_in_an_evaluation_ends_the_run_too(error, enc, tmp_path):
    def evaluate(path: Path) -> float:
        if by_bits(path) == 0.5:
            raise error
        return by_bits(path)

    with pytest.raises(ResourceError):
        tune(enc, evaluate, configs=CONFIGS, workdir=tmp_path)
    assert remembered(tmp_path) == []


@pytest.mark.parametrize("end", [SystemExit(0), SystemExit("x"), type("Odd", (BaseException,), {})("odd")], ids=repr)
@pytest.mark.parametrize("bits", [None, 4], ids=["float", "quantized"])
def test_an_evaluation_that_ends_the_program_is_an_error(bits, end, enc, tmp_path):
    def evaluate(path: Path) -> float:
        recipe = measure.recipe_of(Path(path))
        if (recipe["spec"]["bits"] if recipe else None) == bits:
            raise end
        return 1.0

    with pytest.raises(EvaluationError, match=f"ends the program .{type(end).__name__}"):
        tune(enc, evaluate, configs=CONFIGS, workdir=tmp_path / "w", output=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_an_evaluation_that_changes_the_folder_does_no_harm(enc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def evaluate(path: Path) -> float:
        found = by_bits(path)
        os.chdir(tmp_path / "elsewhere")
        return found

    result = tune(enc, evaluate, configs=CONFIGS, workdir="w", output="q.onnx")
    assert result.met
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "q.onnx", "q.onnx.data", "w"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


# The command line


@pytest.fixture
def command(lm, ids, cli, tmp_path):
    def command(*more: object, code: int):
        done = cli("quantize", lm, "-o", tmp_path / "q.onnx", "--calib", ids, *more, fault=code == 1)
        assert done.exit_code == code, done.stderr
        assert "Traceback" not in done.output
        return done

    return command


def test_a_run_that_lost_everything_else_to_a_fault_does_not_end_as_done(command, tmp_path):
    with (
        hooks.solver("gptq", lambda _: lambda *a, **k: {}["a key"]),
        hooks.solver("awq", lambda _: lambda *a, **k: {}["a key"]),
    ):
        done = command("--auto", "--tolerance", 1e-9, code=1)
        assert done.stdout.count("could not be tried: a fault of onnx-woq") == 5
        assert (tmp_path / "q.onnx").exists(), "the best that there is, as where no limit is met"
        done = command("--auto", "--tolerance", 100, "--objective", "best", code=0)
        assert done.stdout.count("could not be tried: a fault of onnx-woq") == 5
        assert "RTN_G32ASYM is within the tolerance" in done.stdout


def test_one_recipe_that_meets_a_fault(command, tmp_path):
    with hooks.solver("gptq", lambda _: lambda *a, **k: {}["a key"]):
        done = command("--config", "GPTQ_G32ASYM", code=1)
    assert "KeyError: 'a key'" in done.stderr
    assert "Please report it" in done.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_a_traceback_is_for_those_who_ask(lm, ids, cli, tmp_path):
    with hooks.solver("rtn", lambda _: lambda *a, **k: {}["a key"]):
        done = cli("--debug", "quantize", lm, "-o", tmp_path / "q.onnx", fault=True)
    assert done.exit_code == 1
    assert "Traceback" in done.stderr


def test_memory_that_runs_out_is_no_fault(command, tmp_path):
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with hooks.solver("gptq", lambda _: out_of_memory):
        done = command("--auto", "--tolerance", 1e-9, code=2)
    assert "memory has run out" in done.stderr
    assert "the same command goes on from there" in done.stderr
    assert command("--auto", "--tolerance", 1e-9, code=3).stdout.count("resumed") == 1


METRICS = """
import os, sys
from tests.support import measure

def by(found, odd):
    def metric(path):
        return odd() if bool(measure.recipe_of(path)) == found else 1.0
    return metric

def odd_error():
    raise type("Odd", (BaseException,), {})("odd")

def wrong():
    raise ValueError("out of cheese")

def printing(path):
    print("a step")
    return 1.0

VALUES = {"none": lambda: None, "text": lambda: "0.9", "array": lambda: [1.0], "nan": lambda: float("nan"),
          "exits": lambda: sys.exit(0), "odd": odd_error, "wrong": wrong}
for name, odd in VALUES.items():
    globals()[f"{name}_float"], globals()[f"{name}_made"] = by(False, odd), by(True, odd)
"""


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    (tmp_path / "odd_metrics.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "odd_metrics"
    sys.modules.pop("odd_metrics", None)


@pytest.mark.parametrize("name", ["none", "text", "array", "nan", "exits", "odd", "wrong"])
def test_a_metric_that_misbehaves_is_never_a_success(name, enc, cli, metrics, tmp_path):
    arguments = ("quantize", enc, "-o", tmp_path / "q.onnx", "--eval")
    done = cli(*arguments, f"{metrics}:{name}_float")
    assert done.exit_code == 2
    assert "evaluation function" in done.stderr
    done = cli(*arguments, f"{metrics}:{name}_made")
    assert done.exit_code == (2 if name in ("exits", "odd") else 3)
    assert ("ends the program" in done.stderr) == (name in ("exits", "odd"))
    assert not (tmp_path / "q.onnx").exists()


def test_what_a_metric_prints_is_not_in_the_way_of_json(enc, cli, metrics, tmp_path):
    assert cli.json("quantize", enc, "-o", tmp_path / "q.onnx", "--eval", f"{metrics}:printing")["met"]
