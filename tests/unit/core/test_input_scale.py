"""The search for an input scale: the paper's candidates, a loss that is the loss, and no scale that does not pay."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core import input_scale
from onnx_woq.core.grids import integer
from onnx_woq.core.grids.integer import fit, quantize
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from tests.support import reference
from tests.unit.core.methods.test_awq import problem


def test_candidates_follow_the_formula():
    weight, stats = problem(72, 10)
    share = input_scale.weight_share(weight, Spec(4, 32))
    scales = list(input_scale.candidate_scales(stats.abs_mean, share, np.float32))
    assert len(scales) == 21
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(scale, reference.awq_scale(stats.abs_mean, weight, 32, i / 20), rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 30), st.sampled_from([16, 48, -1]), st.integers(0, 99))
def test_the_share_of_a_row_is_its_part_of_the_largest_in_its_group(k, n, group, seed):
    weight = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    weight[:, ::3] *= np.random.default_rng(seed + 1).random((k, 1)) > 0.5  # columns of many zeros
    g = Spec(4, group).resolved_group(k)
    naive = np.zeros(k)
    for row in range(k):
        for column in range(n):
            largest = np.abs(weight[row // g * g : row // g * g + g, column]).max()
            naive[row] += abs(weight[row, column]) / largest / n if largest else 0
    np.testing.assert_allclose(input_scale.weight_share(weight, Spec(4, group)), naive, rtol=1e-5, atol=1e-7)


def test_the_share_of_a_wide_weight_adds_up_over_tiles(monkeypatch):
    weight = problem(40, 200)[0]
    whole = input_scale.weight_share(weight, Spec(4, 16))
    monkeypatch.setattr(input_scale, "tiles", partial(integer.tiles, rows=1, columns=64))
    np.testing.assert_allclose(input_scale.weight_share(weight, Spec(4, 16)), whole, rtol=1e-6)


@pytest.mark.parametrize(("n", "most", "kept"), [(10, 10, 10), (10, 4, 4), (11, 10, 6), (1, 512, 1), (1000, 128, 125)])
def test_a_sample_is_spread_evenly_over_all_columns(n, most, kept):
    weight = np.arange(3 * n, dtype=np.float16).reshape(3, n)
    sample = input_scale.sample_columns(weight, most)
    assert sample.shape == (3, kept)
    assert sample.dtype == np.float32
    steps = np.diff(sample[0])
    assert (steps == steps[:1]).all()
    sample[:] = -1
    assert (weight >= 0).all(), "a copy"


@pytest.mark.parametrize("nothing", ["inputs", "weights"])
def test_without_any_signal_there_is_no_candidate(nothing):
    some, none = np.ones(4), np.zeros(4)
    args = (none, some) if nothing == "inputs" else (some, none)
    assert list(input_scale.candidate_scales(*args, np.float32)) == []


SIZES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 7.0, 1e20])


@given(st.lists(st.tuples(SIZES, st.sampled_from([0.0, 1e-12, 0.1, 1.0])), min_size=2, max_size=9))
def test_candidates_are_finite_and_so_are_their_inverses_in_half_precision(pairs):
    means, shares = np.array(pairs).T
    for scale in input_scale.candidate_scales(means, shares, np.float16):
        assert np.isfinite(scale).all()
        assert np.isfinite((1 / scale).astype(np.float16)).all()
        assert (scale > 0).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tile", [7, 512])
def test_the_loss_is_that_of_the_outputs_on_the_better_grid_of_each_column(tile, scaled, monkeypatch):
    monkeypatch.setattr(input_scale, "TILE", tile)
    weight, stats = problem(40, 20)
    spec, s = Spec(3, 16), np.linspace(0.5, 3, 40, dtype=np.float32) if scaled else None
    grids = input_scale.grid_fitters(spec, (0.6, 1.0, 0.1))
    factor = np.ones((40, 1), np.float32) if s is None else s[:, None]
    losses = []
    for tried in grids:
        grid = tried(weight * factor, stats.gram.diagonal() / factor[:, 0] ** 2, None)
        delta = quantize(weight * factor, *grid, spec).dequantize() / factor - weight
        losses.append([output_error(delta[:, [c]], stats.gram) for c in range(20)])
    want = np.min(losses, axis=0).sum()
    assert input_scale.scaled_loss(weight, s, stats.gram, spec, grids) == pytest.approx(want, rel=1e-4)
    q, loss = input_scale.quantize_scaled(weight, s, stats.gram, spec, grids, map)
    assert loss == pytest.approx(want, rel=1e-4)
    assert output_error(q.effective() - weight, stats.gram) == pytest.approx(want, rel=1e-4)


def test_a_scale_that_does_not_pay_is_left_out():
    weight, stats = problem(48, 16)
    spec = Spec(4, 16)
    grids = input_scale.grid_fitters(spec)
    bad = np.where(np.arange(48) % 2, 1e3, 1e-3).astype(np.float32)
    q = input_scale.quantize_scaled_or_plain(weight, bad, stats.gram, spec, grids, map)
    assert q.input_scale is None
    np.testing.assert_array_equal(q.codes, quantize(weight, *fit(weight, spec), spec).codes)
    good = input_scale.search_scale(weight, stats, spec, grids, np.float32, map)
    assert input_scale.quantize_scaled_or_plain(weight, good, stats.gram, spec, grids, map).input_scale is good


def test_without_a_range_there_is_one_grid_and_it_is_the_plain_one():
    weight, spec = problem(32, 4)[0], Spec(4, 16, True)
    (plain,) = input_scale.grid_fitters(spec, full_range=True)
    for got, want in zip(plain(weight, np.ones(32), None), fit(weight, spec, full_range=True), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(input_scale.grid_fitters(spec, (0.8, 1.0, 0.1))) == 2
