"""In place, right, and without Python's lock."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from onnx_woq.core.lapack import cholesky, invert_lower, leading_eigenvectors


def positive(k, dtype, seed=0):
    x = np.random.default_rng(seed).standard_normal((2 * k, k))
    return np.asfortranarray((x.T @ x / k).astype(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize("k", [1, 2, 17, 300])
def test_factor_and_inverse(k, dtype, tolerance):
    a = positive(k, dtype)
    given = a.copy()
    assert cholesky(a)
    lower = np.tril(a)
    np.testing.assert_allclose(lower @ lower.T, given, rtol=tolerance, atol=tolerance)
    assert invert_lower(a)
    np.testing.assert_allclose(np.tril(a) @ lower, np.eye(k), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 1), (17, 17), (300, 5)])
def test_leading_eigenvectors(k, count, dtype, tolerance):
    a = positive(k, dtype)
    given = a.astype(np.float64)
    vectors = leading_eigenvectors(a, count)
    assert vectors.dtype == dtype
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=tolerance)
    largest = np.linalg.eigvalsh(given)[::-1][:count]
    np.testing.assert_allclose(given @ vectors, vectors * largest, atol=tolerance * largest[0])


def test_numbers_that_are_not_finite_have_no_eigenvectors():
    with pytest.raises(ArithmeticError, match="finite"):
        leading_eigenvectors(np.full((4, 4), np.nan, order="F"), 2)


def test_what_is_not_positive_definite():
    assert not cholesky(np.asfortranarray(-np.eye(5)))
    assert not invert_lower(np.zeros((3, 3), order="F"))


@pytest.mark.parametrize("a", [np.eye(3, dtype=np.int64), np.zeros((2, 3), order="F"), np.arange(9.0).reshape(3, 3)])
def test_what_it_does_not_take(a):
    with pytest.raises(ValueError, match="column order"):
        cholesky(a)
    with pytest.raises(ValueError, match="column order"):
        leading_eigenvectors(a, 1)


def test_others_go_on_meanwhile():
    """While one thread factorizes for tenths of a second, this one is never kept from its own work for half of that."""
    a = positive(2500, np.float64)
    took: list[float] = []

    def factorize():
        start = time.perf_counter()
        cholesky(a)
        took.append(time.perf_counter() - start)

    thread = threading.Thread(target=factorize)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < took[0] / 2
