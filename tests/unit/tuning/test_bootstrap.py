"""What few sequences can decide is decided, what they cannot is not guessed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.tuning import bootstrap as racing


def sequences(mean, spread, count, seed=0):
    """[S, 2]: sums of divergence over sequences of 100 to 200 tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(100, 200, count)
    return np.stack([tokens * np.maximum(rng.normal(mean, spread, count), 0), tokens], axis=1)


def test_the_estimate_weighs_sequences_by_their_length():
    assert racing.estimate(np.array([[10.0, 100], [30.0, 100], [0.0, 200]])) == pytest.approx(0.1)


def test_the_standard_error_is_that_of_the_mean():
    pairs = np.stack([np.random.default_rng(1).normal(5, 1, 64), np.ones(64)], axis=1)
    assert racing.standard_error(pairs) == pytest.approx(pairs[:, 0].std(ddof=1) / 8, rel=0.1)
    assert racing.standard_error(pairs[:1]) is None


def test_clear_cases_are_decided_and_close_ones_are_not():
    pairs = sequences(0.05, 0.01, 8)
    assert racing.side(pairs, 0.08) == "below"
    assert racing.side(pairs, 0.02) == "above"
    assert racing.side(pairs, racing.estimate(pairs)) == "undecided"


def test_more_sequences_decide_what_few_cannot():
    many = sequences(0.05, 0.02, 128, seed=3)
    assert racing.side(many[:6], 0.055) == "undecided"
    assert racing.side(many, 0.055) == "below"


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_statement_is_rare(seed):
    """The true mean lies beyond a limit that is called safe no more often than the level says, roughly."""
    wrong = 0
    for trial in range(40):
        pairs = sequences(0.05, 0.02, 16, seed=1000 * seed + trial)
        wrong += racing.side(pairs, 0.05) != "undecided"  # the true mean is the limit: either answer is wrong
    assert wrong <= 14  # 10 % each way at most, and what a sample of 16 adds; 4 of 40 on average


def test_pairing_sees_a_difference_that_the_sequences_hide():
    rng = np.random.default_rng(5)
    hard = rng.lognormal(0, 1, 8)
    one = np.stack([hard, np.ones(8)], axis=1)
    other = np.stack([hard * rng.uniform(1.05, 1.15, 8), np.ones(8)], axis=1)
    assert racing.worse(other, one) == "above"
    assert racing.worse(one, other) == "below"
    apart = abs(racing.estimate(one) - racing.estimate(other))
    assert apart < racing.standard_error(one), "unpaired, this would be noise"


def test_only_common_sequences_are_compared():
    one = sequences(0.05, 0.01, 32)
    other = one[:8] * [1.2, 1]
    assert racing.worse(other, one) == "above"
    assert racing.worse(one, one[:1]) == "undecided"


@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_equal_models_never_drop_out_and_answers_repeat(count, seed):
    pairs = sequences(0.05, 0.02, count, seed)
    assert racing.worse(pairs, pairs) == "undecided"
    assert racing.side(pairs, 0.04) == racing.side(pairs.copy(), 0.04)


@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_looser_limit_is_never_missed_by_more(count, limit, seed):
    order = ["above", "undecided", "below"]
    pairs = sequences(0.3, 0.2, count, seed)
    sides = [order.index(racing.side(pairs, x)) for x in (limit, limit + 0.05, limit + 0.5)]
    assert sides == sorted(sides)
