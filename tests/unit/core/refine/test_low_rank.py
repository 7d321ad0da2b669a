"""Low-rank compensation against a dense SVD in the norm of the Gram matrix, one line of numpy each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.refine import low_rank as low_rank
from onnx_woq.core.refine.low_rank import DAMP, compensate, factors
from onnx_woq.core.stats import Stats, output_error
from tests.support.memory import peak_bytes

RNG = np.random.default_rng


def problem(k, n, tokens=300, seed=0):
    """An error of a weight, and the Gram matrix of correlated inputs of very different sizes."""
    rng = RNG(seed)
    x = rng.standard_normal((tokens, k)) @ rng.standard_normal((k, k)) * np.geomspace(0.1, 5, k)
    return rng.standard_normal((k, n)).astype(np.float32), (x.T @ x).astype(np.float32)


def damped(gram):
    gram = np.asarray(gram, np.float64)
    return gram + DAMP * np.diag(gram).mean() * np.eye(len(gram))


def loss(delta, gram):
    delta = np.asarray(delta, np.float64)
    return float(np.sum(delta * (np.asarray(gram, np.float64) @ delta)))


def least(delta, gram, rank):
    """What the best approximation of rank r leaves: the squares of the other singular values of H^½·ΔW."""
    values, vectors = np.linalg.eigh(gram)
    half = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return float(np.square(np.linalg.svd(half @ delta, compute_uv=False)[rank:]).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 40), st.integers(1, 60), st.integers(1, 24), st.integers(0, 99))
def test_no_factors_of_that_rank_are_better(k, n, rank, seed):
    delta, gram = problem(k, n, seed=seed)
    a, b = factors(delta, gram, rank)
    assert (a.shape, b.shape) == ((k, rank), (rank, n))
    left, best = loss(delta - a @ b, damped(gram)), least(delta, damped(gram), rank)
    assert left == pytest.approx(best, rel=1e-6, abs=1e-9 * loss(delta, damped(gram)))


@pytest.mark.parametrize("shape", [(48, 30), (48, 70)], ids=["tall", "wide"])
def test_any_square_root_has_the_same_optimum(shape):
    """QERA takes the symmetric one and divides by it again."""
    delta, gram = problem(*shape)
    values, vectors = np.linalg.eigh(damped(gram))
    half, back = vectors * np.sqrt(values) @ vectors.T, vectors / np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(half @ delta)
    a, b = factors(delta, gram, 5)
    np.testing.assert_allclose(a @ b, (back @ u[:, :5] * s[:5]) @ v[:5], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(48, 30), (48, 70)], ids=["tall", "wide"])
def test_every_further_rank_helps_until_nothing_is_left(shape):
    delta, gram = problem(*shape)
    left = [loss(delta - np.matmul(*factors(delta, gram, rank)), damped(gram)) for rank in range(1, min(shape) + 1)]
    assert all(more < fewer for fewer, more in pairwise(left))
    assert left[-1] < 1e-9 * left[0]
    a, b = factors(delta, gram, min(shape) + 16)  # what is too many are zeros
    np.testing.assert_allclose(a @ b, delta, atol=1e-5)


def test_float32_gives_the_same_product(monkeypatch):
    delta, gram = problem(64, 100)
    exact = factors(delta, gram, 6)
    monkeypatch.setattr(low_rank, "EXACT_PRODUCTS", 0)
    monkeypatch.setattr(low_rank, "FACTOR_EXACTLY", 0)
    monkeypatch.setattr(low_rank, "BAND", 48)  # more than one band, a short one last
    quick = factors(delta, gram, 6)
    assert quick[0].dtype == np.float32
    np.testing.assert_allclose(np.matmul(*quick), np.matmul(*exact), atol=2e-3)


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(96, 60), (96, 200), (100, 8)])
def test_eight_bits_take_next_to_nothing_of_it(shape, scale_dtype):
    delta, gram = problem(*shape)
    stored = compensate(delta, gram, 16, scale_dtype=scale_dtype)
    whole, left = loss(delta, damped(gram)), loss(delta - stored.product(), damped(gram))
    best = least(delta, damped(gram), 16)
    assert best <= left * (1 + 1e-6)
    assert left - best < 1e-3 * (whole - best)
    for factor in (stored.down, stored.up):
        np.testing.assert_array_equal(factor.scales, factor.scales.astype(scale_dtype).astype(np.float32))


def test_the_second_factor_is_fitted_to_the_rounded_first():
    """Taken as it was, it leaves more."""
    delta, gram = problem(96, 60)
    stored = compensate(delta, gram, 16)
    _, b = factors(delta, gram, 16)
    rounded = stored.down.effective().astype(np.float64)
    assert loss(delta - rounded @ stored.up.dequantize(), damped(gram)) < loss(delta - rounded @ b, damped(gram))


def test_a_divided_input_is_made_up_for():
    """The first factor is stored for x / s; what both make of x is the same but for rounding."""
    delta, gram = problem(64, 40)
    scale = np.geomspace(0.2, 4, 64).astype(np.float32)
    plain, divided = compensate(delta, gram, 16), compensate(delta, gram, 16, input_scale=scale)
    x = RNG(3).standard_normal((9, 64))
    seen = (x / scale) @ divided.down.dequantize() @ divided.up.dequantize()
    np.testing.assert_allclose(seen, x @ divided.product(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(divided.product(), plain.product(), atol=0.02 * np.abs(plain.product()).max())


def test_inputs_that_are_never_nonzero_take_no_rank():
    """GPTQ gives them zero weights: large errors that no output has."""
    delta, gram = problem(64, 40)
    dead = [3, 20, 41]
    gram[dead], gram[:, dead], delta[dead] = 0, 0, 1000
    stored = compensate(delta, gram, 16)
    assert np.abs(stored.product()[dead]).max() < 1
    alive = np.delete(np.arange(64), dead)
    there = np.ix_(alive, alive)
    best = least(delta[alive], gram[there] + DAMP * np.diag(gram).mean() * np.eye(61), 16)
    assert loss((delta - stored.product())[alive], gram[there]) < 1.01 * best


def test_without_any_input_the_error_itself_is_approximated(caplog):
    delta, _ = problem(48, 30)
    a, b = factors(delta, np.zeros((48, 48), np.float32), 7)
    u, s, v = np.linalg.svd(delta.astype(np.float64))
    np.testing.assert_allclose(a @ b, (u[:, :7] * s[:7]) @ v[:7], atol=1e-5)
    assert "all count alike" in caplog.text


def test_no_error_needs_no_compensation():
    _, gram = problem(48, 80)
    stored = compensate(np.zeros((48, 80), np.float32), gram, 16)
    assert not stored.product().any()


def test_less_their_mean_the_inputs_want_other_factors():
    """Where a constant takes the mean, the factors need not: together they leave less."""
    rng = RNG(0)
    x = (rng.standard_normal((300, 48)) + 4 * rng.standard_normal(48)).astype(np.float32)
    stats, delta = Stats.empty(48), rng.standard_normal((48, 40)).astype(np.float32)
    stats.update(x)

    def left(gram):
        error = x.astype(np.float64) @ (delta - compensate(delta, gram, 16).product())
        return np.square(error - error.mean(axis=0)).sum()

    assert left(stats.less_mean().gram) < left(stats.gram)
    assert output_error(delta, stats.less_mean().gram) < output_error(delta, stats.gram)


@pytest.mark.parametrize(("k", "n"), [(600, 200), (200, 900), (700, 700)])
def test_memory_is_what_was_announced(k, n):
    delta, gram = problem(k, n, tokens=20)
    compensate(delta[:32, :32], gram[:32, :32], 16)  # libraries are loaded
    taken = peak_bytes(lambda: compensate(delta, gram, 32))
    announced = low_rank.working_bytes(k, n, 32)
    assert 0.4 * announced < taken < 1.1 * announced
