"""The clip search: no group worse than plain rounding, and as good as every range tried by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.grids.clip_search import fitter, search, shrinks
from onnx_woq.core.grids.integer import fit, quantize
from onnx_woq.core.spec import Spec
from tests.unit.core.grids.test_integer import BITS, KINDS, gaussian, group_errors, shapes, specs


def test_shrinks_hold_both_ends_and_the_whole_range():
    assert shrinks((0.805, 1.0, 0.005)) == pytest.approx([1 - i * 0.005 for i in range(40)])
    assert shrinks((0.5, 0.7, 0.1)) == pytest.approx([1, 0.7, 0.6, 0.5])
    assert shrinks((1, 1, 0.1)) == [1]
    assert shrinks([0.9, 1, 0.04]) == pytest.approx([1, 0.98, 0.94, 0.9])


@settings(max_examples=120, deadline=None)
@given(
    shapes, specs, st.booleans(), st.sampled_from([np.float32, np.float16]), st.booleans(),
    st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 99),
)  # fmt: skip
def test_search_never_leaves_a_group_worse_off(shape, spec, full_range, scale_dtype, weighted, size, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(3, shape) * size).astype(np.float32)
    h = np.exp(2 * rng.standard_normal(shape[0])) * (rng.random(shape[0]) > 0.2) if weighted else None
    kinds = {"full_range": full_range, "scale_dtype": scale_dtype}
    plain = quantize(weight, *fit(weight, spec, **kinds), spec)
    found = quantize(weight, *search(weight, spec, (0.8, 1.0, 0.05), row_weights=h, **kinds), spec)
    before, after = group_errors(weight, plain, h), group_errors(weight, found, h)
    assert (after <= before * (1 + 1e-5) + 1e-12 * size**2).all()
    np.testing.assert_array_equal(found.scales, found.scales.astype(scale_dtype))
    if spec.symmetric:
        np.testing.assert_array_equal(found.zeros, 2 ** (spec.bits - 1))


@pytest.mark.parametrize(("symmetric", "full_range"), KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_search_is_at_least_as_good_as_every_shrink_tried_by_hand(bits, symmetric, full_range):
    rng = np.random.default_rng(bits)
    weight, h = gaussian(48, 60, bits), np.exp(rng.standard_normal(48))
    spec = Spec(bits, 16, symmetric)
    scales, zeros = fit(weight, spec, full_range=full_range)
    by_hand = [
        group_errors(weight, quantize(weight, (scales * np.float32(p)), zeros, spec), h)
        for p in shrinks((0.8, 1, 0.02))
    ]
    found = quantize(weight, *search(weight, spec, (0.8, 1, 0.02), row_weights=h, full_range=full_range), spec)
    # Least-squares scales make candidates better and may make another one win, never a worse one.
    assert (group_errors(weight, found, h) <= np.min(by_hand, axis=0) * (1 + 1e-5)).all()
    if bits < 8:
        assert group_errors(weight, found, h).sum() < 0.98 * np.min(by_hand, axis=0).sum()


def test_search_serves_the_rows_that_weigh_most():
    weight = gaussian(32, 400)
    h = np.where(np.arange(32) < 4, 100.0, 1.0)
    spec = Spec(3, 32)
    flat = quantize(weight, *search(weight, spec, (0.5, 1, 0.05)), spec)
    served = quantize(weight, *search(weight, spec, (0.5, 1, 0.05), row_weights=h), spec)
    heavy = [np.square(q.dequantize() - weight)[:4].sum() for q in (flat, served)]
    assert heavy[1] < 0.7 * heavy[0]
    tiny = search(weight, spec, (0.5, 1, 0.05), row_weights=h * 1e-37)
    np.testing.assert_array_equal(tiny[0], served.scales)  # only the proportions of row weights count


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_stays_a_code_where_a_range_far_from_it_would_fit_better(sign):
    weight = sign * (10 + gaussian(32, 50))
    scales, zeros = search(weight, Spec(4, 16), (0.8, 1, 0.05))
    np.testing.assert_array_equal(zeros, 0 if sign > 0 else 15)
    np.testing.assert_allclose(quantize(weight, scales, zeros, Spec(4, 16)).dequantize(), weight, atol=0.6)


def test_search_of_a_tile_is_search_of_its_groups():
    """Tiles, short groups and neighbours leave no trace."""
    weight = gaussian(200, 3000)
    h = np.exp(gaussian(200, 1)[:, 0])
    spec = Spec(4, 48)
    scales, zeros = search(weight, spec, (0.8, 1, 0.04), row_weights=h)
    for group, columns in ((0, slice(0, 7)), (2, slice(2000, 2003)), (4, slice(2990, 3000))):
        rows = slice(group * 48, min(200, group * 48 + 48))
        s, z = search(weight[rows, columns], Spec(4, -1), (0.8, 1, 0.04), row_weights=h[rows])
        np.testing.assert_allclose(scales[group, columns], s[0], rtol=1e-5)
        np.testing.assert_array_equal(zeros[group, columns], z[0])


@pytest.mark.parametrize("mse_range", [None, (0.7, 1.0, 0.1)])
def test_a_fitter_keeps_what_it_was_made_with(mse_range):
    weight, h, spec = gaussian(40, 6), np.exp(gaussian(40, 1, 3)[:, 0]), Spec(3, 16, True)
    kinds = {"full_range": True, "scale_dtype": np.float16}
    scales, zeros = fitter(spec, mse_range, **kinds)(weight, h)
    want = search(weight, spec, mse_range, row_weights=h, **kinds) if mse_range else fit(weight, spec, **kinds)
    np.testing.assert_array_equal(scales, want[0])
    np.testing.assert_array_equal(zeros, want[1])
