from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import QuantizedTensor, encode, fit, grid_of, project, quantize, tiles
from onnx_woq.core.spec import Spec
from tests.support import reference

BITS = range(1, 9)
KINDS = [  # symmetric, full range
    pytest.param(False, False, id="asym"),
    pytest.param(True, False, id="sym"),
    pytest.param(True, True, id="full"),
]
shapes = st.tuples(st.integers(1, 70), st.integers(1, 9))
specs = st.builds(Spec, bits=st.integers(1, 8), group_size=st.sampled_from([16, 32, 48, -1]), symmetric=st.booleans())


def gaussian(k, n, seed=0):
    return np.random.default_rng(seed).standard_normal((k, n), dtype=np.float32)


def group_errors(weight, q, row_weights=None):
    h = np.ones(len(weight)) if row_weights is None else row_weights
    square = h[:, None] * (q.dequantize().astype(float) - weight) ** 2
    return np.add.reduceat(square, range(0, len(weight), q.group_size), axis=0)


# --- against the definitions


@pytest.mark.parametrize(("symmetric", "full_range"), KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_fit_and_encode_follow_the_formulas(bits, group_size, symmetric, full_range):
    weight = gaussian(70, 11, bits)  # the last group is short
    spec = Spec(bits, group_size, symmetric)
    scales, zeros = fit(weight, spec, full_range=full_range)
    g = spec.resolved_group(70)
    want_codes, want_scales, want_zeros = reference.rtn(weight, bits, g, symmetric=symmetric, full_range=full_range)
    np.testing.assert_array_equal(scales, want_scales.astype(np.float32))
    np.testing.assert_array_equal(zeros, want_zeros)
    np.testing.assert_array_equal(encode(weight, scales, zeros, bits, g), want_codes)


@settings(max_examples=60, deadline=None)
@given(shapes, specs, st.booleans(), st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from([np.float32, np.float16]))
def test_any_shape_follows_the_formulas(shape, spec, full_range, size, scale_dtype):
    weight = gaussian(*shape) * np.float32(size)
    q = quantize(weight, *fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype), spec)
    kinds = {"symmetric": spec.symmetric, "full_range": full_range, "scale_dtype": scale_dtype}
    codes, scales, zeros = reference.rtn(weight, spec.bits, q.group_size, **kinds)
    assume(scale_dtype == np.float32 or np.abs(scales).min() > 2.0**-14)  # the coarse end of float16 has its own test
    np.testing.assert_array_equal(q.scales, scales.astype(np.float32))
    np.testing.assert_array_equal(q.zeros, zeros)
    np.testing.assert_array_equal(q.codes, codes)
    wanted = (codes - np.repeat(zeros, q.group_size, 0)[: shape[0]]) * np.repeat(scales, q.group_size, 0)[: shape[0]]
    np.testing.assert_allclose(q.dequantize(), wanted, rtol=1e-6)


def test_pieces_of_large_groups_and_wide_weights_meet_without_a_seam():
    weight = gaussian(300, 5000)
    for group_size in (16, 128, 256, -1):
        spec = Spec(4, group_size)
        g = spec.resolved_group(300)
        scales, zeros = fit(weight, spec)
        starts = range(0, 300, g)
        lo = np.minimum(np.minimum.reduceat(weight, starts, axis=0), 0)
        hi = np.maximum(np.maximum.reduceat(weight, starts, axis=0), 0)
        np.testing.assert_allclose(scales, (hi - lo) / 15, rtol=1e-6)
        s, z = (np.repeat(part, g, axis=0)[:300] for part in (scales, zeros))
        np.testing.assert_array_equal(encode(weight, scales, zeros, 4, g), np.clip(np.rint(weight / s) + z, 0, 15))


@given(st.integers(1, 700), st.integers(1, 5000), st.integers(1, 700), st.booleans())
def test_tiles_cover_everything_once(k, n, group_size, whole):
    seen = np.zeros((k, n), np.uint8)
    for rows, groups, g, columns in tiles(k, n, group_size, whole=whole):
        seen[rows, columns] += 1
        assert (rows.stop - rows.start) == (groups.stop - groups.start) * g
        assert all(r // group_size == groups.start + (r - rows.start) // g for r in range(rows.start, rows.stop))
        assert not whole or g == min(group_size, k - rows.start)
    assert seen.min() == seen.max() == 1


def test_transposed_and_strided_weights_are_read_as_they_are():
    weight = gaussian(40, 64)
    spec = Spec(4, 16)
    for view in (np.asfortranarray(weight), np.repeat(weight, 2, axis=1)[:, ::2]):
        q, same = quantize(view, *fit(view, spec), spec), quantize(weight, *fit(weight, spec), spec)
        np.testing.assert_array_equal(q.codes, same.codes)
        np.testing.assert_array_equal(q.scales, same.scales)


# --- what survives exactly


@settings(max_examples=150, deadline=None)
@given(
    st.data(), st.integers(1, 8), st.sampled_from(["asym", "sym", "full"]), st.integers(-10, 4), st.integers(1, 15),
    st.sampled_from([np.float32, np.float16]),
)  # fmt: skip
def test_weights_on_a_grid_come_back_exactly(data, bits, kind, exponent, odd, scale_dtype):
    """Any scale of few significant bits, as long as the group holds the codes that span the range."""
    scale = np.float32(np.ldexp(odd, exponent - 4))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    if kind == "asym":
        zero = data.draw(st.integers(0, top) if bits > 1 else st.just(0))
        spanning, codes = [0, top], st.integers(0, top)
    elif kind == "sym" and bits > 1:
        zero, spanning, codes = half, [data.draw(st.sampled_from([1, top]))], st.integers(1, top)
    else:
        zero, spanning, codes = half, [0], st.integers(0, top)
        scale *= data.draw(st.sampled_from([-1, 1]))
    group = np.array([spanning + data.draw(st.lists(codes, min_size=16 - len(spanning), max_size=16 - len(spanning)))])
    weight = ((group.T - zero) * scale).astype(np.float32)
    spec = Spec(bits, 16, symmetric=kind != "asym")
    for grid in (fit, lambda *a, **k: search(*a, (0.8, 1.0, 0.05), **k)):
        scales, zeros = grid(weight, spec, full_range=kind == "full", scale_dtype=scale_dtype)
        q = quantize(weight, scales, zeros, spec)
        np.testing.assert_array_equal(q.dequantize(), weight)
        if bits > 1 or kind == "full":
            np.testing.assert_array_equal(np.abs(scales), abs(scale))
            mirrored = 2 * half - q.codes.astype(int)  # a tie in magnitude may be spanned from its other end
            np.testing.assert_array_equal(np.where(scales * scale > 0, q.codes, mirrored), group.T)


@pytest.mark.parametrize(("symmetric", "full_range"), KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantizing_again_changes_nothing(bits, symmetric, full_range):
    spec = Spec(bits, 16, symmetric)
    # A rounded scale may leave an end of an asymmetric range unused, and the next range is then a step shorter.
    kinds = {"full_range": full_range, "scale_dtype": np.float16 if symmetric else np.float32}
    weight = gaussian(64, 50, bits)
    once = quantize(weight, *fit(weight, spec, **kinds), spec)
    dequantized = once.dequantize()
    twice = quantize(dequantized, *fit(dequantized, spec, **kinds), spec)
    np.testing.assert_allclose(twice.dequantize(), dequantized, rtol=0 if symmetric else 1e-6)


# --- the conventions


def test_halves_are_rounded_to_even():
    weight = np.array([[0], [15], [0.5], [1.5], [2.5], [7.5]], np.float32)
    q = quantize(weight, *fit(weight, Spec(4, -1)), Spec(4, -1))
    np.testing.assert_array_equal(q.codes, [[0], [15], [0], [2], [2], [8]])


def test_asymmetric_range_always_holds_zero():
    weight = np.array([[3.0, -3.0], [4.5, -4.5]], np.float32)
    scales, zeros = fit(weight, Spec(4, -1))
    np.testing.assert_array_equal(scales, np.float32([[0.3, 0.3]]))
    np.testing.assert_array_equal(zeros, [[0, 15]])


def test_full_range_puts_the_extreme_on_code_zero():
    weight = np.array([[1.0, -8.0, 6.0], [8.0, 1.0, -6.0]], np.float32)
    spec = Spec(4, -1, symmetric=True)
    scales, zeros = fit(weight, spec, full_range=True)
    np.testing.assert_array_equal(scales, [[-1, 1, 0.75]])
    np.testing.assert_array_equal(encode(weight, scales, zeros, 4, 2), [[7, 0, 15], [0, 9, 0]])  # 6 / .75 is cut to 7


def test_plain_symmetric_treats_both_signs_alike_and_leaves_code_zero_unused():
    weight = gaussian(64, 200)
    spec = Spec(4, 16, symmetric=True)
    q, mirrored = (quantize(w, *fit(w, spec), spec) for w in (weight, -weight))
    assert q.codes.min() == 1
    assert q.codes.max() == 15
    np.testing.assert_array_equal(q.scales, mirrored.scales)
    np.testing.assert_array_equal(q.codes, 16 - mirrored.codes)


@pytest.mark.parametrize(("symmetric", "full_range"), KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_bit_keeps_the_extreme_and_zero(symmetric, full_range, sign):
    weight = sign * np.array([[0.9], [0.1], [-0.2], [0.8], [0.0]], np.float32)
    spec = Spec(1, -1, symmetric)
    q = quantize(weight, *fit(weight, spec, full_range=full_range), spec)
    np.testing.assert_array_equal(q.dequantize(), sign * np.float32([[0.9], [0], [0], [0.9], [0]]))
    assert q.codes.max() == 1
    assert (q.zeros == 1).all() or not symmetric


@pytest.mark.parametrize("bits", BITS)
def test_more_of_the_range_is_less_error(bits):
    """The signed scale uses one code more than the plain one: least of all at few bits can it do worse."""
    weight = gaussian(32, 2000)
    errors = {}
    for symmetric, full_range in ((False, False), (True, False), (True, True)):
        spec = Spec(bits, 32, symmetric)
        q = quantize(weight, *fit(weight, spec, full_range=full_range), spec)
        errors[symmetric, full_range] = group_errors(weight, q).sum()
    assert errors[True, True] <= errors[True, False]
    if bits == 2:  # the two signed levels on one side serve a Gaussian group better than a range from end to end
        assert errors[True, True] < errors[False, False]


# --- degenerate groups

EXTREMES = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-7, 0.3, 65504.0, 1e6, 1e30, 3.4e38]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([s * v for v in EXTREMES for s in (1, -1)]), min_size=1, max_size=20),
    specs, st.booleans(), st.booleans(), st.sampled_from([np.float32, np.float16]),
)  # fmt: skip
def test_nothing_finite_makes_nan_inf_or_a_warning(values, spec, full_range, searched, scale_dtype):
    weight = np.array(values, np.float32)[:, None]
    kinds = {"full_range": full_range, "scale_dtype": scale_dtype}
    grid = search(weight, spec, (0.8, 1.0, 0.1), **kinds) if searched else fit(weight, spec, **kinds)
    q = quantize(weight, *grid, spec)  # warnings are errors here
    assert np.isfinite(q.scales).all()
    assert (q.scales != 0).all()
    np.testing.assert_array_equal(q.scales, q.scales.astype(scale_dtype))
    assert q.zeros.max() <= 2**spec.bits - 1
    out = q.dequantize()
    assert np.isfinite(out).all()
    assert np.isfinite(out.astype(scale_dtype)).all()  # what a float16 kernel unpacks is finite as well
    assert (np.sign(out) * np.sign(weight) >= 0).all()
    assert (np.abs(out.astype(float)) <= 2 * float(np.abs(weight).max()) + 2.0**-14).all()


@pytest.mark.parametrize(("symmetric", "full_range"), KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits, symmetric, full_range):
    spec = Spec(bits, 16, symmetric)
    weight = np.zeros((40, 3), np.float32)
    for scales, zeros in (fit(weight, spec, full_range=full_range), search(weight, spec, (0.8, 1, 0.1))):
        q = quantize(weight, scales, zeros, spec)
        np.testing.assert_array_equal(q.dequantize(), 0)
        np.testing.assert_array_equal(q.scales, 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [5.0, -0.1, 1e-30])
def test_a_constant_group_is_kept_to_rounding(bits, value):
    weight = np.full((32, 2), value, np.float32)
    for symmetric, full_range in ((False, False), (True, False), (True, True)):
        spec = Spec(bits, 16, symmetric)
        q = quantize(weight, *fit(weight, spec, full_range=full_range), spec)
        np.testing.assert_allclose(q.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(bad):
    weight = gaussian(32, 4)
    weight[17, 2] = bad
    for spec in (Spec(4, 16), Spec(4, 16, symmetric=True)):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            fit(weight, spec)


def test_the_coarse_end_of_float16_does_not_cut_ranges_off():
    step = 2.0**-24  # the smallest float16
    for size, stored in ((0.01, 1), (0.7, 1), (1.4, 2), (2.3, 3), (2.7, 3), (20.4, 20), (900.4, 900)):
        weight = np.linspace(0, 15 * size * step, 16, dtype=np.float32)[:, None]
        scales, zeros = fit(weight, Spec(4, -1), scale_dtype=np.float16)
        assert scales[0, 0] == stored * step
        error = np.abs(quantize(weight, scales, zeros, Spec(4, -1)).dequantize() - weight)
        assert error.max() <= scales.max() / 2 * (1 + 1e-6)


def test_scales_beyond_float16_are_the_largest_it_can_unpack():
    weight = np.array([[1e7], [-1e7]], np.float32)
    scales, zeros = fit(weight, Spec(4, -1), scale_dtype=np.float16)
    out = quantize(weight, scales, zeros, Spec(4, -1)).dequantize()
    assert np.abs(out).max() > 60000
    assert np.isfinite(out.astype(np.float16)).all()


def test_float32_scales_are_as_large_as_the_range():
    """hi − lo does not fit float32, the scale does."""
    weight = np.array([[3e38], [-3e38]], np.float32)
    scales, zeros = fit(weight, Spec(4, -1))
    np.testing.assert_allclose(scales, 4e37, rtol=1e-6)
    np.testing.assert_allclose(quantize(weight, scales, zeros, Spec(4, -1)).dequantize(), weight, rtol=0.07)


def test_grid_of_takes_any_shape():
    hi = np.abs(gaussian(5, 6)).reshape(5, 2, 3)
    scales, zeros = grid_of(-hi, hi, Spec(4, 16))
    assert scales.shape == zeros.shape == (5, 2, 3)


# --- QuantizedTensor


def test_columns_and_input_scale():
    weight, spec = gaussian(40, 12), Spec(4, 16)
    s = np.linspace(0.5, 2, 40, dtype=np.float32)
    q = quantize(weight * s[:, None], *fit(weight * s[:, None], spec), spec, input_scale=s)
    np.testing.assert_array_equal(q.effective(), q.dequantize() / s[:, None])
    part = q.columns(slice(3, 9))
    assert isinstance(part, QuantizedTensor)
    np.testing.assert_array_equal(part.dequantize(), q.dequantize()[:, 3:9])
    np.testing.assert_array_equal(part.input_scale, s)
    assert (part.bits, part.group_size, part.symmetric) == (4, 16, False)


@settings(max_examples=60, deadline=None)
@given(shapes, specs, st.sampled_from([np.float32, np.float16]), st.booleans())
def test_projecting_is_encoding_and_decoding(shape, spec, dtype, by_columns):
    weight = np.array(gaussian(*shape), dtype, order="F" if by_columns else "C")
    scales, zeros = fit(weight, spec)
    scales *= np.float32(0.8)  # some levels are clipped
    q = quantize(weight, scales, zeros, spec)
    np.testing.assert_array_equal(project(weight, scales, zeros, spec.bits, q.group_size), q.dequantize())
