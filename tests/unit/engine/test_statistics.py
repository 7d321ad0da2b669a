"""Statistics are collected once for all recipes, are those of each alone, and leave no files behind."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine import statistics
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.memory import MemoryPlan
from onnx_woq.engine.plan import make_plan, prepared_plan
from onnx_woq.engine.resources import Resources
from onnx_woq.engine.statistics import SharedStatistics, collect
from onnx_woq.graph.io.model import clone, load
from onnx_woq.recipe import Recipe
from tests.zoo import small as zoo

RECIPES = [Recipe("gptq"), Recipe("awq", Spec(3, 64), exclude=("left",)), Recipe("rtn")]


def resources(*, window=1 << 30, scarce=False, progress=None):
    return Resources(Serial(), MemoryPlan(window, 1 << 30, 1, 0, 0, ""), scarce, progress)


@pytest.fixture
def counted(monkeypatch):
    """The weights of each calibration."""
    calls, real = [], statistics.collect

    def collect_and_count(plan, left, batches, *more):
        if batches:
            calls.append([weight.name for weight in left])
        return real(plan, left, batches, *more)

    monkeypatch.setattr(statistics, "collect", collect_and_count)
    return calls


def arrays(stats):
    return [stats.gram, stats.mean, stats.abs_mean, stats.abs_max, np.array([stats.tokens, stats.weight])]


def assert_same(found, wanted):
    assert [group.name for group, _ in found] == [group.name for group, _ in wanted]
    for (_, one), (_, other) in zip(found, wanted, strict=True):
        for a, b in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("window", "scarce"), [(1 << 30, False), (1, False), (1 << 30, True)])
def test_one_calibration_is_that_of_each_recipe_alone(window, scarce, enc, enc_data, counted, tmp_path, monkeypatch):
    """Also where Gram matrices go to files, which go with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source, means = load(enc), resources(window=window, scarce=scarce)
    with SharedStatistics(source, RECIPES, enc_data, means) as shared:
        for recipe in RECIPES[:2]:
            plan = make_plan(source, recipe)
            found = list(shared.of(plan, plan.groups))
            assert_same(found, list(collect(make_plan(load(enc), recipe), plan.groups, enc_data, resources())))
        assert len(counted) == 1
        assert any(tmp_path.rglob("stats.npz")) == (window == 1 or scarce)
    assert list(tmp_path.iterdir()) == []


def test_groups_of_one_name_and_other_linears_have_their_own_statistics(lm_data, counted, tmp_path):
    """[k, v, q] and, where attention weights its tokens, [k, v]; all are collected on one way through the graph."""
    source = load(zoo.language_model(tmp_path / "kvq.onnx", projections="kvq"))
    recipes = [Recipe("gptq"), Recipe("gptq", attention_weighted=True)]
    with SharedStatistics(source, recipes, lm_data[:2], resources(window=1)) as shared:
        for recipe in recipes:
            plan = make_plan(source, recipe)
            wanted = list(collect(make_plan(clone(source), recipe), plan.groups, lm_data[:2], resources()))
            assert_same(list(shared.of(plan, plan.groups)), wanted)
    order = [node.outputs[0].name for node in source.ir.graph]
    [names] = counted[:1]
    assert names == sorted(names, key=order.index)
    assert len(names) > len(set(names)), "two groups are called alike"


def test_nothing_is_calibrated_before_it_is_asked_for(enc, enc_data, counted):
    source = load(enc)
    with SharedStatistics(source, RECIPES, enc_data, resources()) as shared:
        plan = make_plan(source, Recipe("rtn"))
        assert [stats for _, stats in shared.of(plan, plan.groups)] == [None] * len(plan.groups)
        assert counted == []


def test_a_recipe_gets_what_is_left_of_it_in_order(enc, enc_data, counted):
    source = load(enc)
    with SharedStatistics(source, RECIPES, enc_data, resources()) as shared:
        plan = make_plan(source, RECIPES[0])
        some = plan.groups[1:][::-1]
        assert [group for group, _ in shared.of(plan, some)] == [weight.source for weight in some]


def test_a_sequential_recipe_sees_its_own_model(enc, enc_data, counted):
    """It calibrates for itself each time, and what was changed in its model shows."""
    recipe = replace(RECIPES[0], true_sequential=True)
    source = load(enc)
    with SharedStatistics(source, [recipe], enc_data, resources()) as shared:
        plain = make_plan(clone(source), recipe)
        wanted = list(shared.of(plain, plain.groups))
        edited = make_plan(clone(source), recipe)
        found = []
        for group, stats in shared.of(edited, edited.groups):
            if not found:
                value = edited.model.ir.graph.initializers["W_first"]
                value.const_value = ir.Tensor(2 * value.const_value.numpy(), name="W_first")
            found.append((group, stats))
    assert len(counted) == 2
    np.testing.assert_array_equal(found[0][1].gram, wanted[0][1].gram)
    assert not np.array_equal(found[1][1].gram, wanted[1][1].gram)


def test_rotated_models_have_statistics_of_their_own(lm, lm_data, counted):
    recipes = [Recipe("gptq"), Recipe("gptq", rotation=True)]
    source = load(lm)
    with SharedStatistics(source, recipes, lm_data[:2], resources()) as shared:
        grams = []
        for recipe in recipes:
            plan = prepared_plan(source, recipe)
            found = list(shared.of(plan, plan.groups))
            grams.append(found[0][1].gram)
            assert_same(found, list(collect(prepared_plan(load(lm), recipe), plan.groups, lm_data[:2], resources())))
    assert len(counted) == 2
    assert not np.allclose(*grams)
    tokens = sum(feed["input_ids"].size for feed in lm_data[:2])
    assert np.trace(grams[1]) == pytest.approx(tokens * len(grams[1]), rel=1e-3), "of length 1 once gamma is elsewhere"


def test_progress_and_hidden_states(enc, enc_data, tmp_path):
    said = []
    plan = make_plan(load(enc), Recipe("gptq", true_sequential=True))
    means = resources(progress=lambda *what: said.append(what))
    assert len(list(collect(plan, plan.groups, enc_data[:2], means, tmp_path))) == len(plan.groups)
    assert {stage for stage, _, _ in said} == {"calibrate"}
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    assert said[-1][1] == said[-1][2]
