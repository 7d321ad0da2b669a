"""Options of `tune()`: small classes, and every keyword of version 0.1 as a field of one of them."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from onnx_woq.errors import RecipeError
from onnx_woq.tuning.options import CalibrationData, Evaluation, RunResources, Search, gather_options
from onnx_woq.tuning.tune import tune

VERSION_0_1 = (
    "configs", "tolerance", "criterion", "higher_is_better", "objective", "max_trials", "timeout", "workdir", "output",
    "judge_limit", "target_bpw", "target_size", "max_kl", "max_loss", "points", "samples", "seqlen", "tokenizer",
    "max_memory", "executor", "progress", "announce",
)  # fmt: skip


def test_every_keyword_of_version_0_1_is_still_one():
    own = set(inspect.signature(tune).parameters)
    known = {field.name for one in (CalibrationData, Evaluation, Search, RunResources) for field in fields(one)}
    assert set(VERSION_0_1) <= own | known
    assert list(inspect.signature(tune).parameters)[:3] == ["model", "eval_fn", "dataloader"]


def test_no_two_classes_share_a_name():
    names = [field.name for one in (CalibrationData, Evaluation, Search, RunResources) for field in fields(one)]
    assert len(names) == len(set(names))


def test_keywords_go_before_what_a_class_says():
    options = gather_options(None, None, Search(objective="best", max_trials=3), None, {"max_trials": 5, "samples": 7})
    assert options.search == Search(objective="best", max_trials=5)
    assert options.data == CalibrationData(samples=7)
    assert (options.evaluation, options.resources) == (Evaluation(), RunResources())


def test_a_misspelt_keyword_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="did you mean objective"):
        tune("model.onnx", objectve="best")


@pytest.mark.parametrize("make", [
    lambda: Search(objective="fastest"), lambda: Search(max_trials=0), lambda: Search(timeout=0),
    lambda: Evaluation(criterion="both"), lambda: Evaluation(tolerance=-1), lambda: Evaluation(tolerance=float("nan")),
    lambda: Evaluation(judge_limit=float("inf")),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_where_it_is_said(make):
    with pytest.raises(RecipeError):
        make()
