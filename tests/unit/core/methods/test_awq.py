from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core import input_scale
from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import fit, quantize
from onnx_woq.core.methods import awq, rtn
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats, column_errors, output_error
from tests.support import reference


def problem(k, n, seed=0, outliers=20.0):
    """Correlated inputs, a few channels much larger than the others: what AWQ is for."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k)) @ (np.eye(k) + rng.standard_normal((k, k)) / np.sqrt(k) / 2)
    x[:, rng.choice(k, max(1, k // 25), replace=False)] *= outliers
    stats = Stats.empty(k)
    stats.update(x.astype(np.float32))
    return rng.standard_normal((k, n), dtype=np.float32), stats


def loss(q, weight, stats):
    return output_error(q.effective() - weight, stats.gram)


def nearest_loss(weight, stats, spec, **options):
    return loss(rtn.solve(weight, None, spec, **options), weight, stats)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_the_best_candidate_is_found(bits, group_size):
    weight, stats = problem(64, 24, seed=bits)
    spec = Spec(bits, group_size)
    q = awq.solve(weight, stats, spec, enable_mse_search=False)
    losses = [nearest_loss(weight, stats, spec)]
    for ratio in np.arange(21) / 20:
        s = reference.awq_scale(stats.abs_mean, weight, spec.resolved_group(64), ratio).astype(np.float32)[:, None]
        delta = rtn.solve(weight * s, None, spec).dequantize() / s - weight
        losses.append(output_error(delta, stats.gram))
    assert loss(q, weight, stats) == pytest.approx(min(losses), rel=1e-3)
    assert q.input_scale is not None
    # The codes are those of the scaled weight, by the same definitions as ever.
    same = rtn.solve(weight * q.input_scale[:, None], None, spec)
    np.testing.assert_array_equal(q.codes, same.codes)
    np.testing.assert_array_equal(q.scales, same.scales)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(0, 999), st.sampled_from([1.0, 30.0, 1e4]),
    st.builds(Spec, bits=st.integers(1, 8), group_size=st.sampled_from([16, 32, -1]), symmetric=st.booleans()),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([np.float32, np.float16]),
)  # fmt: skip
def test_never_worse_than_rounding_to_nearest(k, n, seed, outliers, spec, scaled, searched, full_range, scale_dtype):
    weight, stats = problem(k, n, seed, outliers)
    kinds = {"scale_dtype": scale_dtype, "enable_full_range": full_range}
    q = awq.solve(weight, stats, spec, enable_auto_scale=scaled, enable_mse_search=searched, **kinds)
    before = nearest_loss(weight, stats, spec, **kinds)
    floor = 1e-9 * output_error(weight, stats.gram)  # float32 rounding of the loss itself
    assert loss(q, weight, stats) <= before * (1 + 1e-4) + floor


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outlying_inputs_are_what_it_gains_on(bits, symmetric):
    weight, stats = problem(128, 60)
    spec = Spec(bits, 32, symmetric)
    nearest = nearest_loss(weight, stats, spec)
    scaled, both = (loss(awq.solve(weight, stats, spec, enable_mse_search=s), weight, stats) for s in (False, True))
    assert scaled < 0.6 * nearest
    assert both < scaled


def test_each_option_works_without_the_other():
    weight, stats = problem(64, 20)
    spec = Spec(3, 32)
    neither = awq.solve(weight, stats, spec, enable_auto_scale=False, enable_mse_search=False)
    np.testing.assert_array_equal(neither.codes, rtn.solve(weight, None, spec).codes)
    assert neither.input_scale is None
    clipped = awq.solve(weight, stats, spec, enable_auto_scale=False)
    assert clipped.input_scale is None
    nearest = column_errors(neither.dequantize() - weight, stats.gram)
    errors = column_errors(clipped.dequantize() - weight, stats.gram)
    assert (errors <= nearest * (1 + 1e-5)).all()  # in every output channel
    assert errors.sum() < 0.95 * nearest.sum()
    scaled = awq.solve(weight, stats, spec, enable_mse_search=False)
    assert scaled.input_scale is not None
    np.testing.assert_array_equal(scaled.scales, fit(weight * scaled.input_scale[:, None], spec)[0])
    folded, default = (awq.solve(weight, stats, spec, **options) for options in ({"folding": True}, {}))
    np.testing.assert_array_equal(folded.codes, default.codes)


def test_the_clip_range_is_the_one_asked_for():
    weight, stats = problem(64, 20)
    wide, narrow, none = (
        loss(awq.solve(weight, stats, Spec(2, 32), **options), weight, stats)
        for options in ({"mse_range": [0.5, 1, 0.05]}, {"mse_range": (0.95, 1, 0.05)}, {"enable_mse_search": False})
    )
    assert wide < narrow < none


def test_clipping_weighs_rows_by_the_scaled_inputs():
    weight, stats = problem(64, 40)
    q = awq.solve(weight, stats, Spec(3, 32))
    scaled = weight * q.input_scale[:, None]
    found, _ = search(scaled, Spec(3, 32), (0.91, 1, 0.01), row_weights=stats.gram.diagonal() / q.input_scale**2)
    plain, _ = fit(scaled, Spec(3, 32))
    clipped = np.isclose(q.scales, found, rtol=1e-5).all(axis=0)
    assert clipped.mean() > 0.5
    np.testing.assert_array_equal(q.scales[:, ~clipped], plain[:, ~clipped])


def test_weights_already_on_a_grid_are_left_unscaled():
    _, stats = problem(64, 1)
    codes = np.random.default_rng(0).integers(0, 16, (64, 30))
    codes[::16], codes[1::16] = 0, 15
    weight = ((codes - 6) * np.float32(0.375)).astype(np.float32)
    q = awq.solve(weight, stats, Spec(4, 16))
    assert q.input_scale is None
    np.testing.assert_array_equal(q.dequantize(), weight)


def test_the_input_divided_by_the_scale_gives_the_output():
    weight, stats = problem(64, 20)
    x = np.random.default_rng(1).standard_normal((7, 64), dtype=np.float32)
    q = awq.solve(weight, stats, Spec(8, 32))
    assert q.input_scale is not None
    np.testing.assert_allclose((x / q.input_scale) @ q.dequantize(), x @ q.effective(), rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(x @ q.effective() - x @ weight) < 0.01 * np.linalg.norm(x @ weight)


def test_siblings_share_the_scale_that_serves_them_together():
    weight, stats = problem(64, 20)
    other = weight[:, :5] * np.linspace(0.1, 3, 64, dtype=np.float32)[:, None]
    together = np.concatenate([weight, other], axis=1)
    q = awq.solve(together, stats, Spec(4, 32), enable_mse_search=False)
    alone = awq.solve(weight, stats, Spec(4, 32), enable_mse_search=False)
    s = alone.input_scale[:, None]
    grid = fit(together * s, Spec(4, 32))
    imposed = quantize(together * s, *grid, Spec(4, 32), input_scale=alone.input_scale)
    assert loss(q, together, stats) <= loss(imposed, together, stats) * (1 + 1e-5)
    np.testing.assert_array_equal(q.columns(slice(20, 25)).input_scale, q.input_scale)


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_scales_fit_their_dtype_whatever_the_inputs(scale_dtype, size):
    weight, stats = problem(64, 20, outliers=1e5)
    dead, silent = [3, 40], [7, 8]
    gram = stats.gram * np.float32(size**2)
    gram[dead] = gram[:, dead] = 0
    abs_mean = stats.abs_mean * size
    abs_mean[dead] = 0
    weight[silent] = 0
    weight[16:32, :] = 0  # a whole group of nothing
    stats = Stats(gram, abs_mean, stats.abs_max, stats.tokens)
    for spec in (Spec(4, 16), Spec(4, -1)):
        q = awq.solve(weight, stats, spec, scale_dtype=scale_dtype)
        s = q.input_scale
        assert s is not None
        assert s.dtype == np.float32
        assert np.isfinite(s).all()
        assert (s > 0).all()
        np.testing.assert_array_equal(s, s.astype(scale_dtype))
        assert (1 / s).astype(np.float16).min() > np.finfo(np.float16).tiny
        assert np.isfinite((1 / s).astype(np.float16)).all()
        np.testing.assert_array_equal(q.dequantize()[silent], 0)


@pytest.mark.parametrize("size", [1e-12, 1e5])
def test_the_unit_of_the_inputs_does_not_matter(size):
    weight, stats = problem(64, 20)
    scaled = Stats(stats.gram * np.float32(size**2), stats.abs_mean * size, stats.abs_max, stats.tokens)
    q, again = (awq.solve(weight, s, Spec(4, 32)) for s in (stats, scaled))
    np.testing.assert_allclose(again.input_scale, q.input_scale, rtol=1e-5)
    assert (again.codes == q.codes).mean() > 0.999


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_any_signal_it_rounds_to_nearest(tokens):
    weight, _ = problem(48, 10)
    stats = Stats.empty(48)
    stats.update(np.zeros((tokens, 48), np.float32))
    q = awq.solve(weight, stats, Spec(4, 16))
    assert q.input_scale is None
    np.testing.assert_array_equal(q.codes, rtn.solve(weight, None, Spec(4, 16)).codes)
    q = awq.solve(np.zeros((48, 10), np.float32), problem(48, 1)[1], Spec(4, 16))
    np.testing.assert_array_equal(q.effective(), 0)


def test_wide_weights_are_judged_by_a_sample_and_scored_in_tiles(monkeypatch):
    weight, stats = problem(64, 90)
    whole = awq.solve(weight, stats, Spec(4, 32))
    monkeypatch.setattr(input_scale, "TILE", 7)
    np.testing.assert_array_equal(awq.solve(weight, stats, Spec(4, 32)).codes, whole.codes)
    monkeypatch.setattr(input_scale, "SAMPLE", 20)
    sampled = awq.solve(weight, stats, Spec(4, 32))
    assert loss(sampled, weight, stats) < 1.1 * loss(whole, weight, stats) < nearest_loss(weight, stats, Spec(4, 32))


def test_a_scale_good_for_the_sample_only_is_not_used(monkeypatch):
    """The sample chooses the exponent; all output channels decide whether scaling is any good."""
    weight, stats = problem(64, 40)
    codes = np.random.default_rng(0).integers(0, 16, (64, 40))
    codes[::16], codes[1::16] = 0, 15
    weight[:, 1::2] = 100 * ((codes - 6) * np.float32(0.375))[:, 1::2]  # exact without scaling, ruined by it
    monkeypatch.setattr(input_scale, "SAMPLE", 20)  # every other column: the first kind alone
    q = awq.solve(weight, stats, Spec(4, 16), enable_mse_search=False)
    assert q.input_scale is None


def test_the_sample_is_drawn_from_all_siblings(monkeypatch):
    weight, stats = problem(64, 80)
    codes = np.random.default_rng(0).integers(0, 16, (64, 40))
    codes[::16], codes[1::16] = 0, 15
    weight[:, :40] = 0.01 * ((codes - 6) * np.float32(0.375))  # the first half wants no scale, and hardly matters
    monkeypatch.setattr(input_scale, "SAMPLE", 20)
    assert awq.solve(weight, stats, Spec(4, 16)).input_scale is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("outliers", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("bits", [2, 4])
def test_choosing_on_a_sample_costs_at_most_one_percent(seed, outliers, bits, monkeypatch):
    weight, stats = problem(96, 1500, seed, outliers)
    quick = loss(awq.solve(weight, stats, Spec(bits, 32)), weight, stats)
    for name in ("SCREEN", "SAMPLE"):
        monkeypatch.setattr(input_scale, name, 10000)
    assert quick <= 1.01 * loss(awq.solve(weight, stats, Spec(bits, 32)), weight, stats)
    assert quick <= nearest_loss(weight, stats, Spec(bits, 32)) * (1 + 1e-5)


def test_few_columns_are_measured_before_all_are(monkeypatch):
    weight, stats = problem(96, 1500)
    seen, loss_of = [], input_scale.scaled_loss
    spied = lambda w, *rest, **kinds: seen.append(w.shape[1]) or loss_of(w, *rest, **kinds)  # noqa: E731
    monkeypatch.setattr(input_scale, "scaled_loss", spied)
    awq.solve(weight, stats, Spec(4, 32))
    assert sorted(seen)[:21] == [125] * 21
    assert sorted(seen)[21:] == [500] * (input_scale.FINALISTS + 1) + [1500]
