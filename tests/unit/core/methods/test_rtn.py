from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import TILE_COLUMNS, TILE_ROWS, encode, fit
from onnx_woq.core.methods import rtn
from onnx_woq.core.spec import Spec
from tests.support import reference
from tests.support.memory import peak_bytes

WEIGHT = np.random.default_rng(3).standard_normal((72, 20), dtype=np.float32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("symmetric", "enable_full_range"), [(False, False), (True, False), (True, True)])
def test_codes_are_those_of_the_formulas(bits, symmetric, enable_full_range):
    q = rtn.solve(WEIGHT, None, Spec(bits, 32, symmetric), enable_full_range=enable_full_range)
    codes, scales, zeros = reference.rtn(WEIGHT, bits, 32, symmetric=symmetric, full_range=enable_full_range)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scales, scales.astype(np.float32))
    np.testing.assert_array_equal(q.zeros, zeros)
    assert q.input_scale is None


def test_siblings_side_by_side_are_siblings_alone():
    together = rtn.solve(WEIGHT, None, Spec(), enable_mse_search=True)
    for columns in (slice(0, 13), slice(13, 20)):
        alone = rtn.solve(WEIGHT[:, columns], None, Spec(), enable_mse_search=True)
        np.testing.assert_array_equal(together.columns(columns).codes, alone.codes)
        # BLAS adds up columns in another order where there are fewer of them
        np.testing.assert_allclose(together.columns(columns).scales, alone.scales, rtol=1e-6)


def test_search_is_on_request_and_over_the_range_asked_for():
    spec = Spec(3, 32)
    np.testing.assert_array_equal(rtn.solve(WEIGHT, None, spec).scales, fit(WEIGHT, spec)[0])
    for mse_range in ((0.805, 1.0, 0.005), [0.5, 0.7, 0.1]):
        q = rtn.solve(WEIGHT, None, spec, enable_mse_search=True, mse_range=mse_range)
        np.testing.assert_array_equal(q.scales, search(WEIGHT, spec, mse_range)[0])
    plain = rtn.solve(WEIGHT, None, spec)
    assert np.square(q.dequantize() - WEIGHT).sum() < np.square(plain.dequantize() - WEIGHT).sum()


@pytest.mark.parametrize("enable_mse_search", [False, True])
def test_no_second_copy_of_the_weight_is_made(enable_mse_search):
    weight = np.random.default_rng(0).standard_normal((2048, 4096), dtype=np.float32)
    options = {"enable_mse_search": enable_mse_search, "mse_range": [1, 1, 1]}
    peak = peak_bytes(lambda: rtn.solve(weight, None, Spec(4, 128), **options))
    assert peak < 0.5 * weight.nbytes  # the codes are a quarter of it


def stored(weight, dtype, order, folder=None):
    """A weight as models hold it: of any dtype, in either order, perhaps mapped from a read-only file."""
    array = np.array(weight.astype(dtype), order=order)
    if folder is not None:
        path = folder / "weight.bin"
        path.write_bytes(array.tobytes(order))
        array = np.memmap(path, np.uint8, "r").view(dtype).reshape(weight.shape, order=order)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("enable_mse_search", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_weights_are_taken_as_they_are_stored(dtype, order, mapped, enable_mse_search, group_size, tmp_path):
    weight = stored(np.random.default_rng(1).standard_normal((600, 70)), dtype, order, tmp_path if mapped else None)
    spec, options = Spec(4, group_size), {"enable_mse_search": enable_mse_search, "mse_range": (0.9, 1, 0.05)}
    q = rtn.solve(weight, None, spec, **options)
    same = rtn.solve(np.ascontiguousarray(weight, np.float32), None, spec, **options)
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(q, name), getattr(same, name))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 40), st.integers(1, 8), st.sampled_from([16, 48, 288, -1]), st.booleans(),
    st.booleans(), st.sampled_from([1e-9, 1.0, 1e6]), st.sampled_from([np.float32, np.float16]), st.integers(0, 99),
)  # fmt: skip
def test_in_one_pass_as_in_two(k, n, bits, group_size, symmetric, enable_full_range, size, scale_dtype, seed):
    weight = np.random.default_rng(seed).standard_t(2, (k, n)).astype(np.float32) * np.float32(size)
    weight[:, seed % n] *= seed % 3  # a column of zeros now and then
    spec = Spec(bits, group_size, symmetric)
    q = rtn.solve(weight, None, spec, scale_dtype=scale_dtype, enable_full_range=enable_full_range)
    scales, zeros = fit(weight, spec, full_range=enable_full_range, scale_dtype=scale_dtype)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(q.zeros, zeros)
    np.testing.assert_array_equal(q.codes, encode(weight, scales, zeros, bits, q.group_size))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_nan_and_inf_are_refused_wherever_they_are(bad, dtype, order, group_size):
    weight = np.array(np.ones((600, 9)), dtype, order=order)
    weight[599, 8] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        rtn.solve(weight, None, Spec(4, group_size))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_beyond_the_result_a_tile_is_all_it_holds(dtype, order, group_size):
    weight = stored(np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32), dtype, order)
    q = rtn.solve(weight, None, Spec(4, group_size))
    result = q.codes.nbytes + q.scales.nbytes + q.zeros.nbytes
    assert peak_bytes(lambda: rtn.solve(weight, None, Spec(4, group_size))) < result + 3 * 4 * TILE_ROWS * TILE_COLUMNS
