from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.core.grid import fit, search
from onnx_woq.core.methods import rtn
from onnx_woq.recipe import Spec

from . import reference
from .measure import peak_bytes

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
        np.testing.assert_array_equal(together.columns(columns).scales, alone.scales)


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
