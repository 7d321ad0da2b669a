"""Descent never raises the loss, takes the best code of every row, and fits scales by least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.methods import gptq, rtn
from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.refine import descent
from onnx_woq.core.refine.descent import descend
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from onnx_woq.recipe import Recipe
from tests.unit.core.methods.test_gptq import loss, problem


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
            if gram[i, i] == 0:  # says nothing about its weights
                continue
            for c in range(n):
                rest = values()[:, c] - W[:, c]
                rest[i] = 0
                best = W[i, c] - H[i] @ rest / H[i, i]
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


@pytest.mark.parametrize("dead", [(), (0, 7, 8, 151)], ids=["", "dead inputs"])
@pytest.mark.parametrize("group_size", [16, 32, 160, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (2, False), (3, True), (8, False)])
def test_one_pass_is_the_naive_one(bits, symmetric, group_size, dead):
    weight, stats = problem(152, 5, seed=bits, dead=dead)
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


@given(
    st.integers(1, 150),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32, 48, -1]),
    st.booleans(),
    st.sampled_from([(np.float32, 1), (np.float16, 1), (np.float16, 1e-7)]),  # the last scales are hardly told apart
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_no_half_step_raises_the_loss_of_any_column(k, bits, group_size, symmetric, stored, seed):
    scale_dtype, size = stored
    rng = np.random.default_rng(seed)
    weight, stats = problem(k, 4, seed, tokens=int(rng.integers(1, 200)), dead=rng.choice(k, k // 5, replace=False))
    weight *= np.float32(size)
    q = rtn.solve(weight, None, Spec(bits, group_size, symmetric), scale_dtype=scale_dtype)
    H = stats.gram.astype(float)
    small = 1e-9 * np.square(weight).sum(axis=0) * H.max()
    losses = [column_losses(q.dequantize() - weight, H)]
    with pytest.MonkeyPatch.context() as patch:

        def measure_after(half):
            def measured(tile, *args):
                out = half(tile, *args)
                values = tile.level * np.repeat(tile.scales, tile.g, axis=0)[:k]
                np.testing.assert_allclose(tile.delta, values - weight, atol=1e-6 * size)  # nothing has drifted
                losses.append(column_losses(tile.delta, H))
                return out

            patch.setattr(descent._Tile, half.__name__, measured)

        measure_after(descent._Tile.take)  # the rows of a group, or some of them
        measure_after(descent._Tile.refit)  # its scale
        better = descend(weight, q, stats.gram, 2, scale_dtype=scale_dtype)
    if H.any():
        assert len(losses) > 4 * len(q.scales)
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-9) + small).all()
    assert (column_losses(better.dequantize() - weight, H) <= losses[0] * (1 + 1e-5) + 1e3 * small).all()


def column_losses(delta, H):
    delta = np.asarray(delta, float)
    return np.sum(delta * (H @ delta), axis=0)


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
