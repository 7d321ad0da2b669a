"""The search for a mix: where along the frontier it looks, what it learns from that, and which trial it takes."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.recipe import Recipe
from onnx_woq.tuning.budget import Budget
from onnx_woq.tuning.judge import Judge
from onnx_woq.tuning.mixed import search as module
from onnx_woq.tuning.mixed.knapsack import Allocation
from onnx_woq.tuning.mixed.search import SPAN, limit_of
from onnx_woq.tuning.results import Trial


def trial(name, metric, size=100, *, met=True, recipe=None):
    return Trial(name, "ok", metric, met, size, 1.0, "", recipe or Recipe())


def lab_of(target, trials=(), predicted=(), *, judge_limit=1.0, bits=None, planned=None):
    """A search that has measured `trials`, whose mixes were predicted to lose `predicted`."""
    losses = {(index,): loss for index, loss in enumerate(predicted)}
    mixer = SimpleNamespace(
        loss=lambda picks: losses[tuple(picks)],
        planned=lambda recipe: planned[recipe.nsamples],
        layer_choices=lambda recipe: [SimpleNamespace(bytes=bits[recipe.nsamples])],
        weights=8,
    )
    judge = Judge("eval_fn", "", len, 0.0, judge_limit, False)
    lab = module._MixSearch(None, mixer, judge, None, target, math.inf)
    lab.trials = list(trials)
    lab.mixes = {one.name: (index,) for index, one in enumerate(trials) if index < len(predicted)}
    return lab


@pytest.mark.parametrize(
    ("target", "given_limit", "limit"),
    [
        (Budget("bpw", 4.0), 0.1, math.inf), (Budget("size", 9.0), None, math.inf), (Budget("kl", 0.02), 0.1, 0.02),
        (Budget("loss", 0.3), 0.1, 0.1), (Budget("pareto"), None, None),
    ],
)  # fmt: skip
def test_the_limit_of_the_judge(target, given_limit, limit):
    assert limit_of(target, given_limit) == limit


def test_without_measurements_predictions_are_taken_as_they_are():
    lab = lab_of(Budget("kl", 0.1))
    assert lab.line() == (0.0, 1.0)
    assert lab.corrected(0.25) == pytest.approx(0.25)
    assert lab.corrected(0.0) == 0.0


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=6), st.floats(-2, 2), st.floats(0.6, 1.9), st.floats(1e-3, 5))
def test_the_line_is_that_of_least_squares_in_logarithms(predicted, a, b, x):
    trials = [trial(str(i), math.exp(a + b * math.log(loss))) for i, loss in enumerate(predicted)]
    lab = lab_of(Budget("loss", 0.1), trials, predicted)
    logs = np.log(predicted)
    if ((logs - logs.mean()) ** 2).sum() > 0.011:
        assert lab.line() == pytest.approx((a, b), abs=1e-3)
    else:  # points close together say nothing of the slope
        assert lab.corrected(math.exp(logs.mean())) == pytest.approx(math.exp(a + b * logs.mean()), rel=0.1)
    assert lab.prediction_for(lab.corrected(x)) == pytest.approx(x)


def test_the_slope_stays_within_reason_and_what_is_no_number_does_not_count():
    steep = [trial("a", 1e-6), trial("b", 1.0), trial("c", math.inf), trial("d", 0.0)]
    assert lab_of(Budget("loss", 1), steep, [0.1, 0.2, 0.3, 0.4]).line()[1] == 2.0


def test_within_a_budget_of_bytes_the_least_loss_is_taken():
    recipes = [Recipe(nsamples=n) for n in (1, 2, 3)]
    trials = [trial(str(i), metric, recipe=recipes[i]) for i, metric in enumerate((0.5, 0.2, 0.1))]
    planned = {1: 90, 2: 100, 3: 101}
    assert lab_of(Budget("size", 100), trials, planned=planned).best.name == "1"
    assert lab_of(Budget("size", 89), trials, planned=planned).best is None
    lab = lab_of(Budget("bpw", 4.0), trials, bits={1: 3, 2: 4, 3: 5})
    assert lab.best.name == "1"
    assert [lab.fits(recipe) for recipe in recipes] == [True, True, False]


def test_of_those_that_keep_a_loss_the_smallest_is_taken_and_else_the_one_that_loses_least():
    small, large, out = trial("small", 0.4, 50), trial("large", 0.1, 90), trial("out", 0.9, 10, met=False)
    assert lab_of(Budget("loss", 0.5), [large, out, small]).best is small
    worse = replace(out, name="worse", metric=2.0)
    assert lab_of(Budget("loss", 0.5), [worse, out]).best is out
    assert lab_of(Budget("loss", 0.5), [replace(out, metric=None)]).best is None


def points_of(losses):
    return [Allocation(index, loss, (index,)) for index, loss in enumerate(losses)]


def test_points_along_the_frontier_are_evenly_spaced_in_logarithms():
    mixer = SimpleNamespace(points=points_of([*(1000 / 10**i for i in range(7)), 0.0]))
    assert module._along(mixer, 4) == [(0,), (1,), (2,), (3,)], f"from the first to one that loses {SPAN} times less"
    assert module._along(mixer, 2) == [(0,), (3,)]
    assert module._along(mixer, 0) == []
    assert module._along(SimpleNamespace(points=points_of([0.0])), 3) == [(0,)]


@given(st.integers(1, 300), st.integers(2, 60))
def test_a_thinned_curve_keeps_its_ends(count, most):
    points = points_of(range(count, 0, -1))
    kept = module._thinned(points, most)
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert [p.bytes for p in kept] == sorted({p.bytes for p in kept})
