"""Descent never raises the loss, takes the best code of every row, and fits scales by least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.descent import descend
from onnx_woq.core.methods import METHODS, gptq, rtn
from onnx_woq.core.stats import output_error
from onnx_woq.recipe import Recipe, Spec

from .test_gptq import loss, problem


def damped(q, weight, gram, damp):
    delta = q.dequantize().astype(float) - weight
    H = gram.astype(float) + damp * np.diag(gram).mean() * np.eye(len(gram))
    return float(np.sum(delta * (H @ delta)))


def naive(weight, q, gram, damp):
    """One pass, a row at a time: every level tried, then every group's scale by a normal equation."""
    k, n = weight.shape
    H = gram.astype(float) + damp * np.diag(gram).mean() * np.eye(k)
    W, scales = weight.astype(float), q.scales.astype(float)
    zeros, codes, g, top = q.zeros.astype(int), q.codes.astype(int), q.group_size, 2**q.bits - 1
    for group in range(len(scales)):
        rows = range(group * g, min(k, group * g + g))
        values = lambda: (codes - np.repeat(zeros, g, 0)[:k]) * np.repeat(scales, g, 0)[:k]  # noqa: E731
        for i in rows:
            for c in range(n):
                rest = values()[:, c] - W[:, c]
                rest[i] = 0
                best = W[i, c] - H[i] @ rest / H[i, i] if H[i, i] > 0 else values()[i, c]
                codes[i, c] = np.clip(np.round(best / scales[group, c]) + zeros[group, c], 0, top)
        for c in range(n):
            level = np.zeros(k)
            level[list(rows)] = codes[list(rows), c] - zeros[group, c]
            rest = values()[:, c] - level * scales[group, c] - W[:, c]
            if level @ H @ level > 0:
                wanted = np.float32(-(level @ H @ rest) / (level @ H @ level))
                if wanted * scales[group, c] > 0:
                    scales[group, c] = wanted
    return codes, scales


@pytest.mark.parametrize("group_size", [16, 32, 160, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (2, False)])
def test_one_pass_is_the_naive_one(bits, symmetric, group_size):
    weight, stats = problem(152, 5, seed=bits)
    q = gptq.solve(weight, stats, Spec(bits, group_size, symmetric))
    better = descend(weight, q, stats.gram, 1, damp=0.01)
    codes, scales = naive(weight, q, stats.gram, 0.01)
    assert (better.codes != q.codes).any()
    np.testing.assert_array_equal(better.codes, codes)
    np.testing.assert_allclose(better.scales, scales, rtol=1e-5)
    np.testing.assert_array_equal(better.zeros, q.zeros)


@given(
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from([16, 32, 48, -1]),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_loss_never_rises(k, n, bits, group_size, symmetric, scale_dtype, seed):
    rng = np.random.default_rng(seed)
    dead = rng.choice(k, k // 5, replace=False)
    weight, stats = problem(k, n, seed, tokens=int(rng.integers(1, 200)), dead=dead)
    damp = float(rng.choice([0.0, 0.01, 0.1]))
    q = rtn.solve(weight, None, Spec(bits, group_size, symmetric), scale_dtype=scale_dtype)
    before = damped(q, weight, stats.gram, damp)
    for _ in range(3):
        q = descend(weight, q, stats.gram, 1, damp=damp, scale_dtype=scale_dtype)
        after = damped(q, weight, stats.gram, damp)
        assert after <= before * (1 + 1e-6) + 1e-9 * np.square(weight).sum() * stats.gram.max(initial=0)
        before = after
        assert (q.scales != 0).all()
        np.testing.assert_array_equal(q.scales.astype(scale_dtype).astype(np.float32), q.scales)
        assert q.codes.max(initial=0) < 2**bits


def test_passes_add_up_and_tiles_leave_no_trace():
    weight, stats = problem(96, 40)
    q = gptq.solve(weight, stats, Spec(3, 32))
    once = descend(weight, descend(weight, q, stats.gram, 1), stats.gram, 1)
    twice = descend(weight, q, stats.gram, 2, tiles=[slice(0, 7), slice(7, 40)])
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_array_equal(once.scales, twice.scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_gains_by_it_on_data_it_has_not_seen(bits):
    weight, stats = problem(128, 64, tokens=3000)
    _, fresh = problem(128, 64, tokens=3000)
    mixed = stats.merge(fresh)
    plain, better = (gptq.solve(weight, stats, Spec(bits, 32), descent_passes=p) for p in (0, 2))
    assert loss(better, weight, stats) < loss(plain, weight, stats)
    assert output_error(better.dequantize() - weight, mixed.gram) < output_error(
        plain.dequantize() - weight, mixed.gram
    )


def test_the_option_may_be_zero():
    assert METHODS["gptq"].options["descent_passes"] == 0
    assert Recipe("gptq", options={"descent_passes": 0}).options["descent_passes"] == 0
