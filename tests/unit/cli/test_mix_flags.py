"""Flags of mixed precision: what asks for a mix, and contradictions that name the flags."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.cli.mix_flags import BUDGETS, wants_mix
from onnx_woq.cli.options import RecipeFlags, TuneFlags
from onnx_woq.errors import RecipeError
from onnx_woq.tuning.budget import budget_of
from onnx_woq.tuning.options import Search


@pytest.mark.parametrize(
    ("flags", "mix"),
    [
        ({}, False),
        ({"objective": "smallest"}, False),
        ({"evaluation": "m:f"}, False),
        ({"objective": "pareto"}, True),
        ({"objective": "pareto", "points": 0, "frontier": "x.png"}, True),
        ({"target_bpw": 4.25}, True),
        ({"target_size": 10**6, "points": 3}, True),
        ({"max_kl": 0.1}, True),
        ({"max_loss": 0.1, "evaluation": "m:f"}, True),
    ],
    ids=str,
)
def test_a_budget_or_the_frontier_asks_for_a_mix(flags, mix):
    assert wants_mix(TuneFlags(**flags), RecipeFlags()) is mix


@pytest.mark.parametrize(
    ("tuning", "recipe", "says"),
    [
        (
            {"target_bpw": 4, "max_kl": 0.1},
            {},
            "--target-bpw and --max-kl are different targets: give one of them",
        ),
        (
            {"target_size": 9, "objective": "pareto"},
            {},
            "--target-size and --objective pareto are different targets: give one of them",
        ),
        (
            {"max_kl": 0.1, "evaluation": "m:f"},
            {},
            "--max-kl is judged without --eval: leave one of them out, or use --max-loss",
        ),
        ({"max_loss": 0.1}, {}, "--max-loss is a loss of --eval's metric: add --eval, or use --max-kl"),
        (
            {"frontier": "x.png", "points": 2},
            {},
            "--frontier is about mixed precision: add --objective pareto, or a target such as --target-bpw 4.25",
        ),
        (
            {"points": 0},
            {},
            "--points is about mixed precision: add --objective pareto, or a target such as --target-bpw 4.25",
        ),
        ({"target_bpw": 4}, {"bits": 4}, "--target-bpw chooses the grid of each layer: leave out --bits"),
        (
            {"objective": "pareto"},
            {"embedding_group": 16},
            "--objective pareto chooses the grid of each layer: leave out --embedding-group",
        ),
        (
            {"target_bpw": 4, "objective": "best"},
            {},
            "--target-bpw and --objective best are different ways to choose: give one",
        ),
    ],
    ids=str,
)
def test_a_contradiction_names_its_flags(tuning, recipe, says):
    with pytest.raises(RecipeError) as raised:
        wants_mix(TuneFlags(**tuning), RecipeFlags(**recipe))
    assert str(raised.value) == says


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(BUDGETS), st.integers(1, 9)),
    st.sampled_from(["first", "pareto"]),
    st.sampled_from([None, "m:f"]),
)
def test_flags_are_refused_where_the_keywords_of_tune_are(budgets, objective, evaluation):
    tuning = TuneFlags(**budgets, objective=objective, evaluation=evaluation)
    search = Search(objective=objective, **{name: budgets.get(name) for name in BUDGETS})
    try:
        budget = budget_of(search, has_metric=evaluation is not None)
    except RecipeError:
        with pytest.raises(RecipeError, match="--"):
            wants_mix(tuning, RecipeFlags())
    else:
        assert wants_mix(tuning, RecipeFlags()) is (budget is not None)
