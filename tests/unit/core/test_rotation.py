"""Rotations are orthogonal, spread what is concentrated, and are applied as the matrix they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core import rotation as module
from onnx_woq.core.rotation import rotation, turn

HADAMARD = (1, 4, 12, 20, 28, 36, 64, 160, 576, 640, 896, 960, 1152, 1536, 2048)
OTHERS = (3, 6, 9, 10, 37, 65, 90)


@pytest.mark.parametrize("d", [*HADAMARD, *OTHERS])
def test_orthogonal(d):
    r = rotation(d).matrix().astype(np.float64)
    np.testing.assert_allclose(r @ r.T, np.eye(d), atol=2e-6)


@pytest.mark.parametrize("d", HADAMARD)
def test_all_entries_are_of_one_size_where_a_hadamard_matrix_can_be_made(d):
    np.testing.assert_allclose(np.abs(rotation(d).matrix()), d**-0.5, rtol=1e-5)


def test_a_spike_is_spread_over_all_channels():
    spike = np.zeros((1, 576), np.float32)
    spike[0, 17] = 100
    turn(spike, rotation(576), 1)
    assert np.abs(spike).max() < 4.2  # 100 / sqrt(576)


@settings(deadline=None, max_examples=30)
@given(
    d=st.sampled_from([1, 3, 6, 12, 40, 160, 128]),
    other=st.integers(1, 50),
    axis=st.integers(0, 1),
    seed=st.integers(0, 9),
)
def test_turning_is_the_product_with_the_matrix(d, other, axis, seed):
    by = rotation(d, seed)
    x = np.random.default_rng(seed).normal(size=(d, other)[:: 1 if axis == 0 else -1]).astype(np.float32)
    r = by.matrix().astype(np.float64)
    wanted = r.T @ x if axis == 0 else x @ r
    turn(x, by, axis)
    np.testing.assert_allclose(x, wanted, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_in_tiles_as_in_one(axis, monkeypatch):
    x = np.random.default_rng(1).normal(size=(160, 160)).astype(np.float32)
    whole = x.copy()
    turn(whole, rotation(160), axis)
    monkeypatch.setattr(module, "TILE", 160 * 7)
    turn(x, rotation(160), axis)
    np.testing.assert_allclose(x, whole, atol=1e-6)


def test_there_and_back_again():
    """(x·R)·(Rᵀ·W) is x·W."""
    rng, by = np.random.default_rng(2), rotation(96)
    x, w = rng.normal(size=(5, 96)).astype(np.float32), rng.normal(size=(96, 7)).astype(np.float32)
    wanted = x @ w
    turn(x, by, 1)
    turn(w, by, 0)
    np.testing.assert_allclose(x @ w, wanted, atol=1e-4)


def test_the_seed_decides():
    a, b, c = (rotation(90, seed).matrix() for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.05
