"""Trials: made once, remembered in the journal, judged by the present limit, and none takes what is not its own."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.tuning import bootstrap
from onnx_woq.tuning.judge import Judge
from onnx_woq.tuning.metric import MetricFailedError
from onnx_woq.tuning.results import Trial
from onnx_woq.tuning.trials import Run, drop, each_trial, made_again, measured_further
from tests.support import hooks, measure

RECIPES = {"8 bits": Recipe(spec=Spec(8, 32)), "nothing": Recipe(exclude=("",)), "4 bits": Recipe()}


@pytest.fixture
def work(enc, tmp_path):
    """Makes a run of the encoder in a folder, with what it needs."""
    source = load(enc)
    with open_resources(make_plan(source, Recipe()), [], executor=Serial()) as resources:

        def begin(folder=tmp_path, **more):
            run = Run(source, folder, "model", "data", time.monotonic(), more.pop("timeout", None), resources, **more)
            return run, SharedStatistics(source, list(RECIPES.values()), [], resources)

        yield begin


def judge(score, limit=1.0, **more):
    return Judge("eval_fn", "key", lambda path, *_: score(path), 0.0, limit, False, **more)


def size_of(path):
    return float(sum(file.stat().st_size for file in path.parent.iterdir()))


@pytest.fixture(scope="module")
def anywhere(enc, tmp_path_factory):
    return Run(load(enc), tmp_path_factory.getbasetemp(), "model", "data", 0.0, None, None)


@given(name=st.text(max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_trial_stands_in_the_work_folder_whatever_it_is_called(anywhere, name):
    path = anywhere.trial_path(name, RECIPES["4 bits"])
    assert path.parent.parent == anywhere.folder
    assert path.name == anywhere.source.path.name
    assert ".." not in path.parts
    assert path != anywhere.trial_path(name, RECIPES["8 bits"]), "a name may come again with another recipe"
    assert path == anywhere.trial_path(name, Recipe())


def test_what_fails_is_a_trial_and_the_next_is_tried(work, tmp_path):
    run, shared = work()
    trials = list(each_trial(run, RECIPES, judge(size_of), shared))
    assert [(one.name, one.status) for one in trials] == [("8 bits", "ok"), ("nothing", "failed"), ("4 bits", "ok")]
    assert "NothingToQuantize" in trials[1].error
    for one in trials[::2]:
        assert one.metric == one.bytes == size_of(one.path)
    assert trials[2].bytes < trials[0].bytes
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", trials[0].path.parent.name,
                                                          trials[2].path.parent.name}  # fmt: skip


def test_an_earlier_run_is_remembered_and_judged_by_the_present_limit(work, tmp_path):
    run, shared = work()
    first = list(each_trial(run, RECIPES, judge(size_of, limit=0.0), shared))
    assert [one.verdict for one in first] == ["outside", "", "outside"]
    drop(first[0])
    with hooks.solver("rtn", hooks.logged(tmp_path / "log")):
        run, shared = work()
        again = list(each_trial(run, RECIPES, judge(lambda _: pytest.fail("judged again"), limit=1e9), shared))
    assert hooks.solved(tmp_path / "log") == 0
    assert all(one.resumed for one in again)
    assert [(one.status, one.metric, one.bytes) for one in again] == [(o.status, o.metric, o.bytes) for o in first]
    assert [one.verdict for one in again] == ["within", "", "within"]
    assert [one.path for one in again] == [None, None, first[2].path], "as far as models are there"
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3, "nothing is written twice"


def test_another_judge_model_or_data_is_another_trial():
    run = Run(None, None, "model", "data", 0.0, None, None)
    keys = {
        run.trial_key(Recipe(), judge(size_of)),
        run.trial_key(Recipe("gptq"), judge(size_of)),
        run.trial_key(Recipe(), Judge("kl", "kl/data", size_of, 0.0, 1.0, False)),
        Run(None, None, "model", "more", 0.0, None, None).trial_key(Recipe(), judge(size_of)),
        Run(None, None, "other", "data", 0.0, None, None).trial_key(Recipe(), judge(size_of)),
    }
    assert len(keys) == 5
    assert run.trial_key(Recipe(), judge(size_of)) == run.trial_key(Recipe(), judge(size_of, limit=9.0)), (
        "a limit is judged anew"
    )


@pytest.mark.parametrize(("metric", "status"), [(math.nan, "nan"), (math.inf, "nan"), (None, "failed")])
def test_a_model_without_a_number_is_removed(metric, status, work, tmp_path):
    def score(_):
        if metric is None:
            raise MetricFailedError("KeyError: no")
        return metric

    run, shared = work()
    [trial] = each_trial(run, {"a": Recipe()}, judge(score), shared)
    assert (trial.status, trial.metric, trial.met, trial.path) == (status, None, False, None)
    assert ("KeyError" if metric is None else f"the metric is {metric}") in trial.error
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    json.loads(
        (tmp_path / "journal.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in a journal")
    )


def test_no_trial_begins_when_the_time_is_over(work):
    run, shared = work()
    done = next(each_trial(run, RECIPES, judge(size_of), shared))
    run, shared = work(timeout=1e-9)
    assert run.out_of_time()
    assert [one.name for one in each_trial(run, RECIPES, judge(size_of), shared)] == [done.name], "it is remembered"
    run, shared = work(timeout=1e9)
    assert not run.out_of_time()
    assert len(list(each_trial(run, RECIPES, judge(size_of), shared))) == 3


def test_what_was_solved_in_time_is_not_solved_again(work, tmp_path, monkeypatch):
    log, asked = tmp_path / "log", iter([False] * 3)
    run, shared = work(tmp_path / "w")
    run.folder.mkdir()
    with hooks.solver("rtn", hooks.logged(log)):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "out_of_time", lambda _: next(asked, True))
            assert list(each_trial(run, {"a": Recipe()}, judge(size_of), shared)) == []
        before = hooks.solved(log)
        run, shared = work(tmp_path / "w")
        [trial] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
        again = hooks.solved(log) - before
        run, shared = work(tmp_path / "x")
        run.folder.mkdir()
        [whole] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
    assert 0 < again < hooks.solved(log) - before - again
    assert measure.listing(trial.path.parent) == measure.listing(whole.path.parent)


def test_a_model_that_was_dropped_is_made_again_the_same(work, tmp_path):
    run, shared = work()
    [trial] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
    before = measure.listing(trial.path.parent)
    gone = drop(trial)
    assert gone.path is None
    assert drop(gone) is gone
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    run.timeout = 1e-9
    again = made_again(run, gone, shared)
    assert again.path == trial.path
    assert measure.listing(again.path.parent) == before


def test_what_configurations_have_in_common_is_solved_once(work, tmp_path):
    """And forgotten when nobody is left that would want it."""
    recipes = {"a": Recipe(), "b": Recipe(overrides={"^first$": Spec(8, 32)}), "c": Recipe(spec=Spec(8, 32))}
    log = tmp_path / "log"
    run, shared = work(tmp_path / "w")
    run.folder.mkdir()
    known = []
    with hooks.solver("rtn", hooks.logged(log)):
        for _ in each_trial(run, recipes, judge(size_of), shared):
            known.append((hooks.solved(log), len(run.known)))  # noqa: PERF401
    weights = known[0][0]
    assert [count for count, _ in known] == [weights, weights + 1, 2 * weights + 1]
    assert [kept > 0 for _, kept in known] == [True, False, False]


def test_a_leader_that_is_seen_on_more_samples_has_another_metric():
    pairs = tuple((0.1 + 0.01 * number, 1.0) for number in range(8))
    race = Judge("kl", "kl/data", size_of, 0.0, 0.2, False, races=True)
    before = Trial("a", "ok", 0.1, True, 5, 1.0, "", Recipe(), verdict="within", pairs=pairs[:1])
    after = measured_further(race, before, pairs)
    assert after.metric == pytest.approx(np.mean([num for num, _ in pairs]))
    assert after.pairs == pairs
    assert after.standard_error == bootstrap.standard_error(np.array(pairs))
    assert (after.verdict, after.met) == ("within", True)
    worse = measured_further(race, before, tuple((9.0, 1.0) for _ in pairs))
    assert (worse.verdict, worse.met) == ("outside", False)
    assert (worse.name, worse.bytes, worse.recipe) == (before.name, before.bytes, before.recipe)


def changed(journal, **fields):
    """Writes the only entry of a journal with other fields, as version 0.1 did, without a checksum."""
    entry = json.loads(journal.read_text()) | fields
    del entry["check"]
    journal.write_text(json.dumps({name: value for name, value in entry.items() if value != "gone"}) + "\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "fault"}, {"status": "done"}, {"status": "gone"}, {"metric": None}, {"metric": "good"},
        {"metric": math.nan}, {"metric": [1.0]}, {"pairs": 7}, {"pairs": [[1, 2, 3]]}, {"pairs": [[None, 1]]},
        {"bytes": "many"}, {"bytes": 1e999}, {"seconds": {}}, {"metric": "gone"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_makes_no_sense_is_tried_again(fields, work, tmp_path, caplog):
    run, shared = work()
    [first] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
    changed(tmp_path / "journal.jsonl", **fields)
    [again] = each_trial(work()[0], {"a": Recipe()}, judge(size_of), shared)
    assert (again.resumed, again.status, again.metric) == (False, "ok", first.metric)
    assert "makes no sense" in caplog.text


def test_an_entry_of_version_0_1_counts_and_its_model_is_made_again(work, tmp_path):
    run, shared = work()
    [first] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
    changed(tmp_path / "journal.jsonl", model="gone")
    [again] = each_trial(work()[0], {"a": Recipe()}, judge(size_of), shared)
    assert (again.resumed, again.metric, again.path) == (True, first.metric, None)


@pytest.mark.parametrize("planted", ["other model", "other data", "garbage", "link"])
def test_only_the_model_that_was_judged_is_taken(planted, work, tmp_path, caplog):
    run, shared = work()
    [first, other] = each_trial(run, {"a": Recipe(), "b": Recipe(spec=Spec(8, 32))}, judge(size_of), shared)
    wanted = measure.listing(first.path.parent)
    data = first.path.with_name(first.path.name + ".data")
    if planted == "other model":
        for file in other.path.parent.iterdir():
            (first.path.parent / file.name).write_bytes(file.read_bytes())
    elif planted == "other data":
        data.write_bytes(bytes(data.stat().st_size))
    elif planted == "garbage":
        first.path.write_bytes(b"planted")
    else:
        first.path.parent.rename(tmp_path / "moved")
        first.path.parent.symlink_to(other.path.parent)
    known = measure.listing(other.path.parent)
    run, shared = work()
    [again] = each_trial(run, {"a": Recipe()}, judge(size_of), shared)
    assert (again.resumed, again.path) == (True, None)
    assert "is not the model that was judged" in caplog.text
    made = made_again(run, again, shared)
    assert measure.listing(made.path.parent) == wanted
    assert measure.listing(other.path.parent) == known
