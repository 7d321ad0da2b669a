"""TEQ: the gradient is the loss's, training goes below AWQ's loss, and nothing is worse than rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.methods import awq, gptq, rtn, teq
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from tests.unit.core.methods.test_gptq import loss, problem


def surrogate(weight, log, at, gram, g, top):
    """L as a function of log α with rounding passed straight through at the point `at`, from its definition alone.

    round(u) is replaced by u + (its rounding error at `at`), which is what "straight through" means.
    """
    k, n = weight.shape

    def parts(log):
        scaled = weight * np.exp(log)[:, None]
        s = np.empty((k, n))
        z = np.empty((k, n))
        for start in range(0, k, g):
            rows = slice(start, start + g)
            lo, hi = np.minimum(scaled[rows].min(0), 0), np.maximum(scaled[rows].max(0), 0)
            s[rows] = (hi - lo) / top
            z[rows] = np.round(-lo / s[rows])
        return scaled, s, z

    scaled, s, z = parts(at)
    rounding = np.clip(np.round(scaled / s), -z, top - z) - scaled / s
    scaled, s, _ = parts(log)
    delta = s * (scaled / s + rounding) / np.exp(log)[:, None] - weight
    return np.sum(delta * (gram @ delta))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_gradient_is_that_of_the_loss(bits):
    weight, stats = problem(48, 7, seed=bits)
    gram = stats.gram.astype(float)
    log = np.random.default_rng(1).normal(0, 0.3, 48)
    at = np.log(np.exp(log).astype(np.float32).astype(float))
    value, gradient = teq.loss_and_gradient(weight, np.exp(log).astype(np.float32), stats.gram, Spec(bits, 16))
    assert value == pytest.approx(surrogate(weight, at, at, gram, 16, 2**bits - 1), rel=1e-3)
    step = 1e-6
    for row in range(48):
        moved = [surrogate(weight, at + d * step * (np.arange(48) == row), at, gram, 16, 2**bits - 1) for d in (1, -1)]
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert gradient[row] == pytest.approx(numeric, rel=2e-2, abs=2e-3 * np.abs(gradient).max())


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 32)])
def test_training_goes_below_the_formula(bits, group_size):
    rng = np.random.default_rng(3)
    weight, stats = problem(256, 96, seed=3)
    massive = rng.choice(256, 6, replace=False)
    stats = stats.scaled(np.where(np.isin(np.arange(256), massive), 20.0, 1.0))
    spec = Spec(bits, group_size)
    losses = [loss(m.solve(weight, stats, spec, enable_mse_search=False), weight, stats) for m in (teq, awq)]
    assert losses[0] < 0.97 * losses[1]


@given(st.integers(2, 60), st.integers(1, 8), st.integers(2, 8), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_never_worse_than_rounding_to_nearest(k, n, bits, symmetric, seed):
    weight, stats = problem(k, n, seed, tokens=50, dead=[0])
    spec = Spec(bits, 16, symmetric)
    nearest = loss(rtn.solve(weight, None, spec), weight, stats)
    assert loss(teq.solve(weight, stats, spec, steps=5), weight, stats) <= nearest * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("scaling", ["awq", "teq"])
def test_gptq_after_scaling_is_gptq_of_the_scaled_problem(scaling):
    weight, stats = problem(96, 24, seed=8)
    stats = stats.scaled(np.where(np.arange(96) < 4, 30.0, 1.0))
    q = gptq.solve(weight, stats, Spec(4, 32), scaling=scaling)
    assert q.input_scale is not None
    alone = gptq.solve(weight * q.input_scale[:, None], stats.scaled(1 / q.input_scale), Spec(4, 32))
    np.testing.assert_array_equal(q.codes, alone.codes)
    effective = output_error(q.effective() - weight, stats.gram)
    scaled = output_error(alone.dequantize() - weight * q.input_scale[:, None], stats.scaled(1 / q.input_scale).gram)
    assert effective == pytest.approx(scaled, rel=1e-2)
    assert effective < loss(gptq.solve(weight, stats, Spec(4, 32)), weight, stats)
