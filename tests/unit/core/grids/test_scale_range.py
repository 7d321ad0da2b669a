"""Which scales a number type holds, by brute force; and units that keep squares in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_woq.core.grids.scale_range import holds, in_unit, large_unit
from onnx_woq.core.methods import rtn
from onnx_woq.core.spec import Spec
from tests.zoo.nodes import random

W = np.clip(random(64, 5), -2, 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_must_not_vanish_or_overflow(bits, symmetric):
    spec = Spec(bits, 32, symmetric=symmetric)
    scale = np.abs(rtn.solve(W, None, spec).scales).min()
    largest = np.abs(rtn.solve(W, None, spec).dequantize()).max()
    for magnitude, fits in (
        (1, True),
        (2**-23.9 / scale, True),
        (2**-24.1 / scale, False),
        (0.4 * 65504 / largest, True),
    ):
        assert holds((W * magnitude).astype(np.float32), spec, np.float16) == fits, magnitude
    assert not holds((W * 1e6).astype(np.float32), spec, np.float16)
    assert holds((W * 1e6).astype(np.float32), spec, np.float32)


def test_one_group_is_enough_and_zeros_need_no_scale():
    spec, w = Spec(4, 32, symmetric=False), W.copy()
    w[32:, 3] = 0
    assert holds(w, spec, np.float16)
    w[40, 3] = 1e-9
    assert not holds(w, spec, np.float16)
    assert holds(w, replace(spec, group_size=-1), np.float16), "the group has larger ones too"
    assert not holds(w.T, replace(spec, group_dim=0), np.float16)
    w[40, 3] = np.nan
    assert holds(w, spec, np.float16), "not for this to say"


def test_scales_that_are_divided_before_they_are_stored():
    spec = Spec(3, 32)
    scale = rtn.solve(W, None, spec).scales.min()
    w = (W * 2**-20.5 / scale).astype(np.float32)
    assert holds(w, spec, np.float16)
    assert not holds(w, spec, np.float16, 0.5)
    assert holds(2 * w, spec, np.float16, 0.5)


def test_units():
    assert [large_unit(x) for x in (0.0, 1e-44, 1.0, 1e12, 1e13, 3e38)] == [0, 0, 0, 0, 44, 128]
    q = rtn.solve(W, None, Spec(4, 32))
    assert in_unit(q, 0, np.float32) is q
    np.testing.assert_array_equal(in_unit(q, 100, np.float32).dequantize(), np.ldexp(q.dequantize(), 100))
    assert np.isfinite(in_unit(q, 128, np.float32).dequantize()).all()
