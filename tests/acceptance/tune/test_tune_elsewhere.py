"""Trials judged in other processes: the same result bit for bit, whatever happens to the process that judges."""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from onnx_woq import Recipe, Spec, TuneResult, tune
from onnx_woq.errors import EvaluationError
from onnx_woq.tuning import trials
from tests.support import evaluations, measure
from tests.support.commands import spawning
from tests.support.evaluations import Distance, Recorded

RTNS = {f"b{bits}": Recipe("rtn", Spec(bits, 32)) for bits in (2, 3, 4, 8)}
METRICS = {0: 1.0, 2: 0.2, 3: 0.991, 4: 0.995, 8: 1.5}
CONFIGS = {
    "coarse": Recipe("rtn", Spec(3, 64)),
    "gptq": Recipe("gptq", Spec(4, 32)),
    "awq": Recipe("awq", Spec(4, 32)),
    "fine": Recipe("gptq", Spec(8, 32)),
}

Elsewhere = Callable[[], Executor]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where work folders are that nobody has given: without an output, the best model stays there."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=["processes", "dask"])
def elsewhere(request) -> Executor:
    """An executor whose tasks run in other processes."""
    if request.param == "processes":
        return request.getfixturevalue("processes")
    return request.getfixturevalue("cluster").get_executor()


def outline(result: TuneResult) -> dict[str, Any]:
    """All of a result that may not depend on where and when something ran."""
    found = result.to_dict()
    for part in (found, *found["trials"]):
        del part["seconds"], part["path"]
    return found


def lines(work: Path) -> list[dict[str, Any]]:
    """The trials in the journal."""
    entries = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "path", "check")} for e in entries if "name" in e]


# The same result


@pytest.mark.parametrize("objective", ["smallest", "best"])
def test_the_result_is_that_of_a_run_in_one_process(objective, elsewhere, lm, lm_data, tmp_path):
    outlines, files, logs, journals = [], [], [], []
    for number, executor in enumerate((None, elsewhere)):
        folder, log = tmp_path / str(number), tmp_path / f"log{number}"
        result = tune(
            lm, Distance(lm, log), lm_data, configs=CONFIGS, objective=objective, tolerance=0.8,
            workdir=folder / "work", output=folder / "out" / "q.onnx", executor=executor,
        )  # fmt: skip
        outlines.append(outline(result))
        files.append(measure.listing(folder / "out"))
        journals.append(lines(folder / "work"))
        logs.append(log.read_text().split())
    assert outlines[1] == outlines[0]
    assert files[1] == files[0]
    assert journals[1] == journals[0]
    assert [entry["name"] for entry in journals[1]] == list(CONFIGS)
    here = str(os.getpid())
    assert logs[0] == [here] * 5
    assert logs[1][0] == here, "the float model"
    assert len(logs[1]) == 5
    assert here not in logs[1][1:]


def test_the_built_in_judge_elsewhere(elsewhere, lm, lm_data, forwards, tmp_path):
    found, runs = [], []
    for folder, executor in (("a", None), ("b", elsewhere)):
        before = len(forwards)
        result = tune(
            lm, None, lm_data, configs=CONFIGS, objective="best", judge_limit=0.05,
            workdir=tmp_path / f"work {folder}", output=tmp_path / folder / "q.onnx", executor=executor,
        )  # fmt: skip
        found.append((outline(result), measure.listing(tmp_path / folder)))
        runs.append(len(forwards) - before)
    assert found[0] == found[1]
    assert found[0][0]["met"]
    assert runs[1] < runs[0], "nothing but the calibration has run here"


def test_another_models_judge_elsewhere(processes, enc, enc_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a work folder that a worker would look for in a folder of its own
    results = [
        tune(enc, None, enc_data, configs=RTNS, objective="best", workdir=work, executor=executor)
        for work, executor in (("a", None), ("b", processes))
    ]
    assert results[0].metric_name == "sqnr_db"
    assert outline(results[0]) == outline(results[1])


# What is judged where and when


def recorded(tmp_path: Path, metrics: dict[int, Any] = METRICS, **options: Any) -> Recorded:
    return Recorded(tmp_path / "log", metrics, **options)


def test_the_next_is_solved_while_one_is_judged(elsewhere, enc, tmp_path):
    evaluate = recorded(tmp_path, work=tmp_path / "w")
    result = tune(enc, evaluate, configs=RTNS, objective="best", workdir=tmp_path / "w", executor=elsewhere)
    calls = evaluations.calls(evaluate.log)
    assert [call.bits for call in calls] == [2, 3, 4, 8]
    assert os.getpid() not in {call.pid for call in calls}
    assert [call.overlapped for call in calls] == [True, True, True, False]
    assert [call.journal for call in calls] == [[], ["b2"], ["b2", "b3"], ["b2", "b3", "b4"]]
    assert [line["name"] for line in lines(tmp_path / "w")] == list(RTNS)
    largest = max(trial.bytes for trial in result.trials)
    assert max(call.bytes for call in calls) < 3.3 * largest, "two models and the one being judged"
    assert [path.name for path in (tmp_path / "w").glob("b*/*.onnx")] == ["enc.onnx"]
    assert outline(result) == outline(tune(enc, recorded(tmp_path), configs=RTNS, objective="best"))


class Main:
    """An evaluation that must run in the main thread of this process, as it would with a GUI, a GPU or a database."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, path: Path) -> float:
        assert threading.current_thread() is threading.main_thread()
        self.seen += 1
        return METRICS[measure.recipe_of(path).get("spec", {"bits": 0})["bits"]]


def test_threads_judge_nothing(enc, tmp_path):
    for objective in ("first", "smallest", "best"):
        evaluate = Main()
        with ThreadPoolExecutor(2) as pool:
            result = tune(enc, evaluate, configs=RTNS, objective=objective, executor=pool)
        assert [trial.status for trial in result.trials] == ["ok"] * len(result.trials)
        assert evaluate.seen == len(result.trials) + 1


def test_the_first_that_will_do_is_judged_here(processes, enc, tmp_path):
    """There is no next one to be solved before it is known whether there is to be one."""
    evaluate = recorded(tmp_path)
    result = tune(enc, evaluate, configs=RTNS, executor=processes)
    assert [trial.name for trial in result.trials] == ["b2", "b3"]
    assert {call.pid for call in evaluations.calls(evaluate.log)} == {os.getpid()}


# What goes wrong


def same_here_and_there(enc: Path, tmp_path: Path, metrics: dict[int, Any], executor: Executor) -> TuneResult:
    found = []
    for name, where in (("here", None), ("there", executor)):
        evaluate = Recorded(tmp_path / f"{name}.log", metrics)
        found.append(tune(enc, evaluate, configs=RTNS, objective="best", workdir=tmp_path / name, executor=where))
    assert outline(found[1]) == outline(found[0])
    assert lines(tmp_path / "there") == lines(tmp_path / "here")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(
        p.name for p in (tmp_path / "here").iterdir()
    )
    return found[1]


@pytest.mark.parametrize(
    ("metric", "status", "error"),
    [
        ("raise", "failed", "ValueError: out of cheese"),
        ("odd", "failed", "OddError: 1 and 2"),
        (math.nan, "nan", "the metric is nan"),
        (math.inf, "nan", "the metric is inf"),
        (None, "failed", "TypeError"),
        ({}, "failed", "TypeError"),
    ],
    ids=str,
)
def test_a_metric_that_is_none(metric, status, error, processes, enc, tmp_path):
    result = same_here_and_there(enc, tmp_path, METRICS | {3: metric}, processes)
    assert [trial.status for trial in result.trials] == ["ok", status, "ok", "ok"]
    assert result.trials[1].error.startswith(error)
    assert result.best.name == "b8"
    assert processes.submit(int, "7").result() == 7, "the pool still works"


def test_a_metric_that_is_none_on_a_cluster(cluster, enc, tmp_path):
    result = same_here_and_there(enc, tmp_path, METRICS | {2: math.nan, 3: "odd"}, cluster.get_executor())
    assert [trial.status for trial in result.trials] == ["nan", "failed", "ok", "ok"]


def test_other_processes_print_nothing(enc, tmp_path, capfd):
    with spawning(1) as pool:
        same_here_and_there(enc, tmp_path, METRICS | {2: "raise", 3: "odd", 4: math.nan}, pool)
        tune(enc, evaluations.OnlyHere(), configs=RTNS, objective="best", executor=pool)
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_sees_another_file_of_that_name(processes, enc, tmp_path, monkeypatch, caplog):
    """Another machine's, or what an earlier run has left there."""
    stamp = trials.stamp_files
    later = lambda files: {f: (size, time + 1) for f, (size, time) in stamp(files).items()}  # noqa: E731
    monkeypatch.setattr(trials, "stamp_files", later)
    same_here_and_there(enc, tmp_path, METRICS, processes)
    assert caplog.text.count("another file than this process") == len(RTNS)
    assert {call.pid for call in evaluations.calls(tmp_path / "there.log")} == {os.getpid()}


def test_an_evaluation_that_ends_the_program_is_an_error_here_too(elsewhere, enc, tmp_path):
    evaluate = recorded(tmp_path, METRICS | {3: "exit"})
    with pytest.raises(EvaluationError, match=r"ends the program .SystemExit: enough"):
        tune(enc, evaluate, configs=RTNS, objective="best", workdir=tmp_path / "w", executor=elsewhere)
    assert [line["name"] for line in lines(tmp_path / "w")] == ["b2"]
    assert elsewhere.submit(int, "7").result() == 7


def test_a_worker_that_lacks_what_the_evaluation_needs(elsewhere, enc, tmp_path, caplog):
    result = same_here_and_there(enc, tmp_path, METRICS | {3: "missing"}, elsewhere)
    assert result.trials[1].metric == 0.5
    assert os.getpid() in {c.pid for c in evaluations.calls(tmp_path / "there.log") if c.bits == 3}
    assert "b3 was not judged by the executor" in caplog.text
    assert "no such file on this machine" in caplog.text


def test_a_worker_killed_while_it_judges(enc, tmp_path, caplog):
    with spawning() as pool:
        result = same_here_and_there(enc, tmp_path, METRICS | {2: "kill"}, pool)
    assert result.trials[0].metric == 0.5
    first, *others = evaluations.calls(tmp_path / "there.log")
    assert first.pid != os.getpid()
    assert {call.pid for call in others} == {os.getpid()}, "a broken pool takes nothing any more"
    assert "b2 was not judged by the executor" in caplog.text


def test_a_dask_worker_killed_while_it_judges(cluster, enc, tmp_path):
    result = same_here_and_there(enc, tmp_path, METRICS | {2: "kill"}, cluster.get_executor())
    assert result.trials[0].metric == 0.5
    calls = [call for call in evaluations.calls(tmp_path / "there.log") if call.bits == 2]
    assert len(calls) == 2, "once more, on the other worker"
    assert os.getpid() not in {call.pid for call in calls}


def test_a_pool_that_is_shut_down_already(enc, tmp_path):
    pool = spawning(1)
    pool.shutdown()
    same_here_and_there(enc, tmp_path, METRICS, pool)


def test_what_cannot_be_sent_is_judged_here(elsewhere, enc, tmp_path, caplog):
    seen, lock = [], threading.Lock()

    def locked(path: Path) -> float:
        with lock:
            seen.append(path)
            return METRICS[measure.recipe_of(path).get("spec", {"bits": 0})["bits"]]

    result = tune(enc, locked, configs=RTNS, objective="best", executor=elsewhere)
    assert result.best.name == "b8"
    assert len(seen) == 5
    assert caplog.text.count("cannot be sent to another process") == 1


def test_a_lambda_stays_here_and_goes_to_a_cluster(processes, cluster, enc, tmp_path):
    """Only Dask can send it."""
    log = tmp_path / "log"
    for executor in (processes, cluster.get_executor()):
        log.unlink(missing_ok=True)
        evaluate = lambda _: evaluations.note(log)  # noqa: E731
        result = tune(enc, evaluate, configs=RTNS, objective="best", executor=executor)
        assert [trial.metric for trial in result.trials] == [1.0] * 4
        pids = log.read_text().split()[1:]
        assert len(pids) == 4
        assert (str(os.getpid()) in pids) == (executor is processes)


def test_what_a_worker_cannot_unpickle_is_judged_here(elsewhere, enc, caplog):
    result = tune(enc, evaluations.OnlyHere(), configs=RTNS, objective="best", executor=elsewhere)
    assert [trial.metric for trial in result.trials] == [1.0] * 4
    assert "this module is not installed here" in caplog.text
    assert elsewhere.submit(int, "7").result() == 7, "the pool still works"


# Ends


def test_max_trials(processes, enc, tmp_path):
    for objective in ("smallest", "best"):
        evaluate = recorded(tmp_path / objective)
        evaluate.log.parent.mkdir()
        result = tune(enc, evaluate, configs=RTNS, objective=objective, max_trials=3, executor=processes)
        assert ([trial.name for trial in result.trials], result.stopped) == (["b2", "b3", "b4"], "max_trials")
        assert [call.bits for call in evaluations.calls(evaluate.log)] == [2, 3, 4]


def test_no_trial_starts_after_the_timeout(processes, enc, tmp_path):
    """A verdict that is on its way is waited for."""
    configs = {f"c{i}": Recipe("rtn", Spec(4, 32), exclude=(f"nothing{i}",)) for i in range(40)}
    start = time.monotonic()
    result = tune(enc, _slow, configs=configs, objective="best", timeout=2, workdir=tmp_path, executor=processes)
    assert time.monotonic() - start < 8
    assert 1 <= len(result.trials) < 12
    assert result.stopped == "timeout"
    assert {trial.metric for trial in result.trials} == {0.5}
    assert [line["name"] for line in lines(tmp_path)] == [trial.name for trial in result.trials]
    assert result.path.exists()


def _slow(_: Path) -> float:
    time.sleep(0.25)
    return 0.5


@pytest.mark.parametrize("given", [True, False], ids=["work folder", "temporary"])
def test_an_interrupt_leaves_no_stray_files(given, processes, enc, temporary, tmp_path):
    work = tmp_path / "w"
    evaluate = recorded(tmp_path, work=work) if given else recorded(tmp_path)

    def progress(stage: str, done: int, _: int) -> None:
        if stage == "b4":  # b3 is being judged
            raise KeyboardInterrupt

    options = {"configs": RTNS, "objective": "best", "executor": processes, "workdir": work if given else None}
    with pytest.raises(KeyboardInterrupt):
        tune(enc, evaluate, progress=progress, **options)
    assert list(temporary.iterdir()) == []
    if given:
        assert [line["name"] for line in lines(work)] == ["b2"]
        assert {path.name[:2] for path in work.iterdir()} == {"b2", "b3", "jo"}
    evaluate.log.unlink()
    resumed = tune(enc, evaluate, **options)
    assert [trial.resumed for trial in resumed.trials] == [given, False, False, False]
    assert [call.bits for call in evaluations.calls(evaluate.log)][-3:] == [3, 4, 8]
    again = tune(enc, recorded(tmp_path), configs=RTNS, objective="best")
    assert [t.metric for t in again.trials] == [t.metric for t in resumed.trials]
