"""Bias correction against means over tokens, written down token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.refine.bias import correction
from onnx_woq.core.stats import Stats


def tokens(count, k, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, k)) + rng.standard_normal(k)).astype(np.float32)


def stats_of(x, weights=None):
    stats = Stats.empty(x.shape[1])
    stats.update(x, weights)
    return stats


def corrected(delta, stats):
    return correction(lambda columns: delta[:, columns], delta.shape[1], stats)


def left(x, delta, constant, weights=None):
    """Squared error of the output with a constant added to it, token by token."""
    weights = np.ones(len(x)) if weights is None else weights
    return sum(
        w * np.square(row.astype(np.float64) @ delta - constant).sum() for w, row in zip(weights, x, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_it_is_the_mean_error_and_no_constant_leaves_less(count, k, n, seed):
    x, rng = tokens(count, k, seed), np.random.default_rng(seed + 1)
    delta = rng.standard_normal((k, n)).astype(np.float32)
    b = corrected(delta, stats_of(x))
    np.testing.assert_allclose(b, np.mean([row.astype(np.float64) @ delta for row in x], axis=0), rtol=1e-5, atol=1e-5)
    least = left(x, delta, b)
    assert least <= left(x, delta, 0) * (1 + 1e-9) + 1e-9
    for other in (b + 0.01, b - 0.01, b + 0.1 * rng.standard_normal(n)):
        assert least < left(x, delta, other)


def test_weighted_tokens_count_in_it_as_they_do_in_the_loss():
    x, weights = tokens(30, 8), np.random.default_rng(5).uniform(0, 4, 30)
    delta = np.random.default_rng(6).standard_normal((8, 5)).astype(np.float32)
    b = corrected(delta, stats_of(x, weights))
    np.testing.assert_allclose(b, np.average(x @ delta, axis=0, weights=weights), rtol=1e-4, atol=1e-5)
    for other in (0, b + 0.01, b - 0.01):
        assert left(x, delta, b, weights) < left(x, delta, other, weights)


def test_wide_weights_are_looked_at_some_columns_at_a_time():
    x, delta = tokens(30, 8), np.random.default_rng(6).standard_normal((8, 1300)).astype(np.float32)
    widths = []

    def columns(part):
        widths.append(part.stop - part.start)
        return delta[:, part]

    b = correction(columns, 1300, stats_of(x))
    assert max(widths) < sum(widths) == 1300
    np.testing.assert_allclose(b, (x @ delta).mean(axis=0), rtol=1e-4, atol=1e-5)


def test_statistics_without_a_mean_are_no_statistics_of_zero_mean():
    stats = Stats(np.eye(4), np.ones(4), np.ones(4), 4)
    with pytest.raises(ValueError, match="mean"):
        corrected(np.ones((4, 2), np.float32), stats)
    with pytest.raises(ValueError, match="mean"):
        stats.less_mean()
