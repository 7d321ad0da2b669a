"""A search has one budget at most, it is a number above 0, and it is said in words."""

from __future__ import annotations

import itertools
import math

import pytest

from onnx_woq.errors import RecipeError
from onnx_woq.tuning.budget import Budget, budget_of
from onnx_woq.tuning.options import Search

GIVEN = {
    "target_bpw": (4.25, Budget("bpw", 4.25), "at most 4.25 bits per weight"),
    "target_size": (1_234_567, Budget("size", 1_234_567), "at most 1,234,567 bytes"),
    "max_kl": (0.03, Budget("kl", 0.03), "a mean KL divergence of at most 0.03 nats per token"),
    "max_loss": (0.5, Budget("loss", 0.5), "at most 0.5 lost of the metric"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_each_is_a_budget_of_its_kind(name):
    value, budget, text = GIVEN[name]
    assert budget_of(Search(**{name: value}), has_metric=name == "max_loss") == budget
    assert str(budget) == text


def test_a_frontier_is_a_budget_without_a_number_and_other_objectives_are_none():
    found = budget_of(Search(objective="pareto"), has_metric=False)
    assert (found.kind, str(found)) == ("pareto", "the frontier")
    assert math.isnan(found.value)
    assert [budget_of(Search(objective=one), has_metric=True) for one in ("first", "smallest", "best")] == [None] * 3


@pytest.mark.parametrize("names", [*itertools.combinations([*GIVEN, "pareto"], 2), tuple(GIVEN)], ids=" ".join)
def test_several_are_refused_by_their_names(names):
    given = {name: GIVEN[name][0] for name in names if name in GIVEN}
    search = Search(**given, objective="pareto" if "pareto" in names else "first")
    with pytest.raises(RecipeError, match="choose one of them") as refused:
        budget_of(search, has_metric=True)
    assert all(name in str(refused.value) for name in names)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_number_above_0_is_refused(name, value):
    with pytest.raises(RecipeError, match=f"{name}=.*must be a number above 0"):
        budget_of(Search(**{name: value}), has_metric=name == "max_loss")


def test_a_loss_goes_with_the_judge_that_measures_it():
    with pytest.raises(RecipeError, match="leave out eval_fn, or give max_loss"):
        budget_of(Search(max_kl=0.1), has_metric=True)
    with pytest.raises(RecipeError, match="give eval_fn, or max_kl"):
        budget_of(Search(max_loss=0.1), has_metric=False)
