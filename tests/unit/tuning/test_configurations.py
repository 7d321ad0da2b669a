"""Configurations have names, are tried in order, and the model that is given back is the one that was asked for."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import NothingToQuantize, RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.presets import TUNED, preset
from onnx_woq.recipe import Recipe
from onnx_woq.tuning import configurations
from onnx_woq.tuning.configurations import choose, named_recipes, plan_of_all, require_work, try_all
from onnx_woq.tuning.judge import Judge
from onnx_woq.tuning.options import CalibrationData, Search
from onnx_woq.tuning.results import Trial

NO_DATA = CalibrationData()


def test_names_are_those_of_presets_or_say_what_a_recipe_is():
    mine = Recipe("gptq", Spec(3, 64))
    assert list(named_recipes(None, NO_DATA)) == list(TUNED)
    assert named_recipes("best_4bit", NO_DATA) == {"BEST_4BIT": preset("BEST_4BIT")}
    assert named_recipes([mine, "RTN_G32ASYM"], NO_DATA) == {
        f"gptq-{mine.fingerprint()}": mine, "RTN_G32ASYM": preset("RTN_G32ASYM"),
    }  # fmt: skip
    assert list(named_recipes({"b": mine, "a": Recipe()}, NO_DATA)) == ["b", "a"]
    for nothing in ([], {}):
        with pytest.raises(RecipeError, match="configs is empty"):
            named_recipes(nothing, NO_DATA)
    with pytest.raises(RecipeError, match="did you mean BEST_4BIT"):
        named_recipes("BEST_4BITS", NO_DATA)


def test_the_amount_of_data_that_is_asked_for_holds_for_all():
    found = named_recipes([Recipe("gptq", nsamples=3), "BEST_4BIT"], CalibrationData(samples=7, seqlen=33))
    assert {(one.nsamples, one.pad_max_length) for one in found.values()} == {(7, 33)}


def test_work_is_needed_for_one_of_them(enc):
    source, none = load(enc), Recipe(exclude=("",))
    require_work(source, {"a": none, "b": Recipe()})
    with pytest.raises(NothingToQuantize, match="excluded by ''"):
        require_work(source, {"a": none, "b": Recipe(include=("no such name",))})


def test_the_plan_of_all_has_every_group_of_each_at_its_largest(enc):
    """The memory of a run is that of the largest of what it may solve."""
    source = load(enc)
    recipes = [
        Recipe("gptq", exclude=("first",)),
        Recipe("gptq", lowrank=32, exclude=("right",)),
        Recipe("awq", exclude=("left",), embedding=Spec()),
    ]
    whole = plan_of_all(source, recipes, recipes[1])
    found = {group.source.sources: group for group in whole.groups}
    every = [group for recipe in recipes for group in make_plan(source, recipe).groups]
    assert found.keys() == {group.source.sources for group in every}
    for group in every:
        largest = found[group.source.sources]
        assert (largest.n, largest.rank) >= (group.n, group.rank)
    assert whole.embeddings == ()
    assert whole.recipe == recipes[1]


def judge(*, higher=False):
    return Judge("eval_fn", "key", lambda *_: 0.0, 0.0, 0.5, higher)


def trial(name, metric, size=1, *, met=None, dropped=False, path=None):
    met = metric is not None and metric <= 0.5 if met is None else met
    return Trial(name, "ok", metric, met, size, 0.0, "", Recipe(), dropped=dropped, path=path)


TRIALS = st.lists(
    st.tuples(st.none() | st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.integers(1, 4), st.booleans()), max_size=6
)


@given(made=TRIALS, objective=st.sampled_from(["first", "smallest", "best"]), higher=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_trial_that_is_chosen_is_beaten_by_no_other(made, objective, higher):
    """Within the limit before outside of it; then by the objective."""
    who = judge(higher=higher)
    trials = [
        trial(str(number), metric, size, met=metric is not None and who.met(metric), dropped=dropped)
        for number, (metric, size, dropped) in enumerate(made)
    ]
    chosen = choose(trials, who, objective)
    running = [one for one in trials if one.metric is not None and not one.dropped]
    assert (chosen is None) == (not running)
    for other in running:
        assert chosen.met >= other.met
        if chosen.met and other.met:
            better = {
                "first": int(other.name) < int(chosen.name),
                "smallest": other.bytes < chosen.bytes,
                "best": who.rank(other.metric) < who.rank(chosen.metric),
            }
            assert not better[objective]
        elif not chosen.met:
            assert who.rank(other.metric) >= who.rank(chosen.metric)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Trials without models: metrics by name, None for a trial that never began; and what the disk has after each."""
    seen = []

    def run(metrics, **search):
        def each_trial(_, recipes, *__):
            for name in recipes:
                if metrics[name] is None:
                    return
                folder = tmp_path / name
                folder.mkdir()
                (folder / "m.onnx").touch()
                yield trial(name, metrics[name], path=folder / "m.onnx")
                seen.append(sorted(one.name for one in tmp_path.iterdir()))

        monkeypatch.setattr(configurations, "each_trial", each_trial)
        recipes = dict.fromkeys(metrics, Recipe())
        return try_all(SimpleNamespace(leader=None), recipes, judge(), None, Search(**search)), seen

    return run


def test_the_first_within_the_limit_ends_the_search(tried):
    found, _ = tried({"a": 0.9, "b": 0.4, "c": 0.1})
    assert (found.best.name, found.stopped, [one.name for one in found.trials]) == ("b", "met", ["a", "b"])


def test_only_the_best_keeps_its_model(tried):
    found, seen = tried({"a": 0.4, "b": 0.9, "c": 0.1, "d": 0.2}, objective="best")
    assert (found.best.name, found.stopped) == ("c", "all tried")
    assert [one.name for one in found.trials if one.path] == ["c"]
    assert seen == [["a"], ["a"], ["c"], ["c"]]


@pytest.mark.parametrize(
    ("metrics", "most", "stopped"),
    [({"a": 0.9, "b": 0.8, "c": 0.7}, 2, "max_trials"), ({"a": 0.9, "b": 0.8, "c": None}, None, "timeout"),
     ({"a": 0.9, "b": None, "c": 0.7}, 2, "timeout"), ({"a": 0.9, "b": 0.8}, 2, "all tried")],
)  # fmt: skip
def test_why_no_more_were_tried(metrics, most, stopped, tried):
    found, _ = tried(metrics, max_trials=most)
    assert found.stopped == stopped
    assert found.best.name == found.trials[-1].name, "nobody was within the limit: the best so far"
    assert math.isclose(found.best.metric, min(one.metric for one in found.trials))
    assert isinstance(found.best.path, Path)
