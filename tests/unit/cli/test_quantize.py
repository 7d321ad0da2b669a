"""`quantize`: one recipe as it is, or a tuning run, by what the flags ask for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from onnx_woq.cli.options import RunFlags, TuneFlags
from onnx_woq.cli.quantize import open_executor, tune_keywords
from onnx_woq.errors import RecipeError
from onnx_woq.presets import TUNED
from onnx_woq.tuning import tune as tuning
from tests.unit.cli.conftest import strict_json

RANDOM = ("--calib", "random", "--samples", 6)

OTHERS = sorted(set(TUNED) - {"AWQ_G32ASYM"})


@pytest.fixture
def arguments(model, tmp_path):
    return ("quantize", model, "-o", tmp_path / "q.onnx")


@pytest.fixture
def tuned(monkeypatch):
    """Records the keywords of `tune`, and gives the result that it is told to."""
    recorded = SimpleNamespace(calls=[], met=True, faults=())

    def tune(model, evaluation, calib, **keywords):
        recorded.calls.append({"evaluation": evaluation, "calib": calib, **keywords})
        return SimpleNamespace(
            met=recorded.met, faults=recorded.faults, stopped="met", to_dict=lambda: {"metric": float("nan")}
        )

    monkeypatch.setattr(tuning, "tune", tune)
    return recorded


def test_one_recipe_is_quantized_and_told_as_json(run, arguments, tmp_path):
    found = strict_json(run(*arguments, "--bits", 8, "--json").stdout)
    assert found["recipe"]["spec"]["bits"] == 8
    assert (tmp_path / "q.onnx").exists()


def test_both_names_of_the_method_make_the_same_recipe(run, arguments):
    both = [strict_json(run(*arguments, name, "HQQ", "--json").stdout) for name in ("--method", "--algorithm")]
    assert both[0]["recipe"] == both[1]["recipe"]
    assert both[0]["recipe"]["method"] == "hqq"


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        (["--auto"], TUNED),
        (["--eval", "cli_metric:score"], ("RTN_G32ASYM",)),
        (["--eval", "cli_metric:score", "--config", "awq_g32asym"], ("AWQ_G32ASYM",)),
        (["--target-bpw", "4", "--config", "awq_g32asym"], ("AWQ_G32ASYM",)),
        (["--max-kl", "0.1", "--config", "awq_g32asym", "--auto"], ("AWQ_G32ASYM", *OTHERS)),
    ],
    ids=str,
)
def test_what_is_judged_is_tuned(flags, tried, run, arguments, tuned, metric):
    printed = run(*arguments, *flags, "--json").stdout
    assert strict_json(printed) == {"metric": None}
    (call,) = tuned.calls
    assert set(call["configs"]) == set(tried)
    assert (call["evaluation"] is not None) is ("--eval" in flags)


def test_flags_reach_tune_by_its_own_names(run, arguments, tuned, tmp_path):
    run(
        *(*arguments, "--auto", "--json", *RANDOM, "--seqlen", 7, "--tokenizer", "t", "--max-memory", "3GB"),
        *("--criterion", "absolute", "--objective", "smallest", "--lower-is-better", "--max-trials", 2),
        *("--timeout", 5, "--workdir", tmp_path / "w", "--tolerance", 0.5, "--executor", "serial"),
    )
    (call,) = tuned.calls
    reading = {"calib": "random", "samples": 6, "seqlen": 7, "tokenizer": "t", "max_memory": 3 * 10**9}
    judging = {"criterion": "absolute", "objective": "smallest", "higher_is_better": False, "judge_limit": 0.5}
    trying = {"tolerance": 0.01, "max_trials": 2, "timeout": 5.0, "workdir": tmp_path / "w"}
    mixing = {"target_bpw": None, "target_size": None, "max_kl": None, "max_loss": None, "points": None}
    expected = reading | judging | trying | mixing | {"output": str(tmp_path / "q.onnx")}
    assert {name: call[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("tolerance", "has_metric", "expected"),
    [(None, True, (0.01, None)), (0.2, True, (0.2, None)), (None, False, (0.01, None)), (0.2, False, (0.01, 0.2))],
)
def test_a_tolerance_is_of_the_users_metric_or_the_limit_of_the_judge(tolerance, has_metric, expected):
    keywords = tune_keywords(TuneFlags(tolerance=tolerance), has_metric=has_metric)
    assert (keywords["tolerance"], keywords["judge_limit"]) == expected


def test_a_tolerance_that_is_not_met_is_exit_code_3(run, arguments, tuned):
    tuned.met = False
    assert strict_json(run(*arguments, "--auto", "--json", code=3).stdout) == {"metric": None}


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 1)])
def test_a_fault_of_the_program_is_exit_code_1_unless_the_limit_is_met(met, code, run, arguments, tuned):
    tuned.met, tuned.faults = met, ("a trial",)
    run(*arguments, "--auto", "--json", code=code)


def test_the_best_is_written_also_where_it_is_not_good_enough(run, arguments, metric, tmp_path):
    found = strict_json(run(*arguments, "--eval", metric, "--json", code=3).stdout)
    assert found["met"] is False
    assert (tmp_path / "q.onnx").exists()
    assert not list(tmp_path.glob(".*")), "the work folder of a finished run is removed"


def test_an_interrupted_tuning_run_says_where_its_trials_are(run, arguments, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupted)
    said = run(*arguments, "--auto", code=130).stderr
    assert said == (
        f"interrupted: finished trials are kept in {tmp_path / '.q.onnx.onnx-woq-tune'}, "
        "the same command goes on from there\n"
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--auto", "--config", "RTN_G32ASYM"], "--auto tries all predefined configurations"),
        (["--auto", "--recipe", "r.json"], "leave out --config and --recipe"),
        (["--target-bpw", "4", "--bits", "4"], "--target-bpw chooses the grid of each layer"),
        (["--dask", "tcp://x:1", "--executor", "threads"], "--dask and --executor"),
        (["--report", "page.txt"], "page.txt"),
        (["--max-memory", "3XB"], "is not a size"),
    ],
    ids=str,
)
def test_contradictions_are_named_before_the_work(flags, says, run, arguments, tmp_path):
    assert says in run(*arguments, *flags, code=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_an_unknown_executor_is_named(monkeypatch):
    with pytest.raises(RecipeError, match="threads"):
        open_executor(RunFlags(executor="thread")).__enter__()


def test_a_report_names_the_command(run, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/onnx-woq", "quantize", "a model.onnx"])
    done = run(*arguments, "--report", tmp_path / "report.json")
    assert f"report: {tmp_path / 'report.json'}" in done.stderr
    assert "onnx-woq quantize 'a model.onnx'" in (tmp_path / "report.json").read_text()
