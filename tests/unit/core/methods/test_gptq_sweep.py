"""The sweep and its factorization, against inverses that are inverses and feedback given row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.grids.integer import fit
from onnx_woq.core.methods import gptq_sweep
from onnx_woq.core.methods.gptq_sweep import Sweep, factor_dtype, factorize
from onnx_woq.core.spec import Spec
from tests.unit.core.methods.test_gptq import naive_factor, problem


def test_importance_adds_up_to_the_loss():
    weight, stats = problem(60, 5)
    order = np.random.default_rng(0).permutation(60)
    feedback, importance = factorize(stats.gram, 1e-6, order)
    U = naive_factor(stats.gram, 1e-6, order)
    np.testing.assert_allclose(importance, 1 / np.diag(U) ** 2, rtol=1e-4)
    lower = np.tril_indices(60, -1)
    np.testing.assert_allclose(feedback[lower], (U / np.diag(U)[:, None]).T[lower], rtol=1e-4, atol=1e-7)
    # Whatever the errors e, what they and their feedback add up to is ΔW = (I + F)·e, and its loss is Σ importance·e².
    error = weight.astype(float)
    delta = error + np.tril(feedback, -1) @ error
    gram = stats.gram[np.ix_(order, order)] + 1e-6 * stats.gram.diagonal().mean() * np.eye(60)
    assert np.sum(importance[:, None] * error**2) == pytest.approx(np.sum(delta * (gram @ delta)), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 5), st.integers(1, 8), st.sampled_from([16, 24, 80]), st.integers(1, 4),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_blocks_and_halves_add_what_rows_add_one_by_one(k, n, bits, group, blocks, moving, seed):
    """Fixed grids, or each fitted when the feedback of all earlier rows is in."""
    weight, stats = problem(k, n, seed)
    spec, g = Spec(bits, group), min(group, k)
    feedback, _ = factorize(stats.gram, 0.01, np.arange(k))
    groups = np.arange(k) // g
    sweep = Sweep(weight.astype(np.float64), feedback, groups, spec)
    if not moving:
        sweep.set_grid(slice(None), fit(weight, spec))
    sweep.run(blocks * g, g, (lambda rows, _: fit(rows, Spec(bits, -1))) if moving else None)
    work, left = weight.astype(np.float64), np.zeros((k, n))
    scales, zeros = (part.astype(np.float64) for part in fit(weight, spec))
    for row in range(k):
        if moving and row % g == 0:
            scales[row // g], zeros[row // g] = (part[0] for part in fit(work[row : row + g], Spec(bits, -1)))
        s, z = scales[row // g], zeros[row // g]
        level = np.clip(np.rint(sweep.work[row]), -z, 2**bits - 1 - z)
        exact = np.clip(work[row] / s, -z, 2**bits - 1 - z)
        assert (np.abs(level - exact) <= 0.5 + 1e-4).all(), "the nearest level, but for ties"
        left[row] = work[row] - level * s
        work[row + 1 :] -= np.outer(feedback[row + 1 :, row], left[row])
    np.testing.assert_allclose(sweep.error, left, rtol=1e-3, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(sweep.scales, scales, rtol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_the_order_of_rows_permutes_the_factor(exact, monkeypatch):
    monkeypatch.setattr(gptq_sweep, "FACTOR_EXACTLY", 2048 if exact else 0)
    monkeypatch.setattr(gptq_sweep, "COPIED", 7)
    _, stats = problem(33, 1)
    order = np.random.default_rng(1).permutation(33)
    one, other = factorize(stats.gram, 0.1, order), factorize(stats.gram[np.ix_(order, order)], 0.1, np.arange(33))
    assert one[0].dtype == factor_dtype(33) == (np.float64 if exact else np.float32)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4)
    lower = np.tril_indices(33, -1)
    np.testing.assert_allclose(one[0][lower], other[0][lower], rtol=1e-3, atol=1e-5)


def test_damping_is_raised_tenfold_at_a_time():
    gram = -1e-3 * np.eye(3, dtype=np.float32)
    gram[0, 0] = 1.0  # the mean of the diagonal is 0.998 / 3
    feedback, importance = factorize(gram, 1e-5, np.arange(3))
    damped = 1e-2 * 0.998 / 3  # 1e-5 and 1e-4 and 1e-3 of it are not enough
    np.testing.assert_allclose(importance, gram.diagonal() + damped, rtol=1e-4)
    np.testing.assert_allclose(np.tril(feedback, -1), 0)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_what_no_damping_makes_positive_definite_has_no_factor(bad):
    assert factorize(np.full((2, 2), bad, np.float32), 0.01, np.arange(2)) is None


def test_the_gram_matrix_is_left_as_it_was():
    _, stats = problem(20, 1)
    before = stats.gram.copy()
    factorize(stats.gram, 0.01, np.arange(20)[::-1])
    np.testing.assert_array_equal(stats.gram, before)
