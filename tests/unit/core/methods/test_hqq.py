"""HQQ: the best zero point is kept, no group is worse than rounding to nearest, the paper's loop is followed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.methods import hqq, rtn
from onnx_woq.core.spec import Spec


def naive_zeros(w, s, z, top, iterations=20):
    """The paper's loop for one group, every zero point and its error on the way."""
    met, beta = [], 10.0
    for _ in range(iterations):
        codes = np.clip(np.round(w / s + z), 0, top)
        error = w - (codes - z) * s
        met.append((np.abs(error).mean(), z))
        shrunk = np.array([np.sign(e) * max(abs(e) - abs(e) ** -0.3 / beta, 0) if e else 0.0 for e in error])
        z = np.mean(codes - (w - shrunk) / s)
        beta *= 1.01
    return met


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_zero_point_is_the_best_the_loop_meets(bits, seed):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((1, 32, 1)) + 0.3).astype(np.float64)
    top = 2**bits - 1
    s = np.full((1, 1), np.ptp(w) / top)
    z = np.full((1, 1), np.round(-w.min() / s[0, 0]))
    found = hqq.zero_point(w, s, z, top)[0, 0]
    met = naive_zeros(w[0, :, 0], s[0, 0], z[0, 0], top)
    until = next((i for i in range(1, len(met)) if met[i][0] >= met[i - 1][0]), len(met))  # it stops when it gets worse
    assert found == pytest.approx(min(met[:until])[1], rel=1e-9)


@given(
    st.integers(1, 80),
    st.integers(1, 9),
    st.integers(1, 8),
    st.sampled_from([16, 32, -1]),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_no_group_is_worse_than_rounding_to_nearest(k, n, bits, group_size, symmetric, scale_dtype, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((k, n)) * np.exp(rng.normal(0, 2, n))).astype(np.float32)
    weight[rng.random((k, n)) < 0.2] = 0
    spec = Spec(bits, group_size, symmetric)
    plain, found = (m.solve(weight, None, spec, scale_dtype=scale_dtype) for m in (rtn, hqq))
    g = plain.group_size
    for start in range(0, k, g):
        rows = slice(start, start + g)
        errors = [np.square(q.dequantize()[rows].astype(float) - weight[rows]).sum(axis=0) for q in (found, plain)]
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all()


def test_it_gains_on_rounding_to_nearest():
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    plain, found = (np.square(m.solve(weight, None, Spec(4, 32)).dequantize() - weight).sum() for m in (rtn, hqq))
    assert found < 0.99 * plain
