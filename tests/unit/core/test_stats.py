from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core import stats as stats_module
from onnx_woq.core.grids.integer import fit, quantize
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats, column_errors, output_energy, output_error, quantized_error
from tests.support import reference
from tests.support.memory import peak_bytes


def inputs(tokens, k, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, k), dtype=np.float32)


def collect(*batches):
    stats = Stats.empty(batches[0].shape[-1])
    for batch in batches:
        stats.update(batch)
    return stats


def assert_describes(stats, x):
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    np.testing.assert_allclose(stats.gram, x.T @ x, rtol=1e-4, atol=1e-4 * len(x))
    np.testing.assert_allclose(stats.abs_mean, np.abs(x).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(stats.abs_max, np.abs(x).max(axis=0).astype(np.float32))
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-6, atol=1e-6)
    centred = x - x.mean(axis=0)
    less = stats.less_mean()
    np.testing.assert_allclose(less.gram, centred.T @ centred, rtol=1e-4, atol=1e-4 * len(x))
    assert less.gram.diagonal().min() >= 0
    assert not less.mean.any()
    np.testing.assert_array_equal(less.abs_mean, stats.abs_mean)
    assert stats.tokens == stats.weight == len(x)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 1, 4, 5), (5,), (400, 300)])
def test_every_leading_dimension_is_tokens(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_describes(collect(x), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "bfloat16"])
def test_any_float_dtype(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = inputs(50, 12).astype(dtype)
    assert_describes(collect(x), x)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(1, 20))
def test_batches_leave_no_trace(lengths, k):
    """Ragged batches count by their tokens, empty ones not at all."""
    x = inputs(sum(lengths), k)
    parts = np.split(x, np.cumsum(lengths)[:-1])
    assert_describes(collect(*parts), x)
    halves = [collect(*some) if some else Stats.empty(k) for some in (parts[::2], parts[1::2])]
    assert_describes(halves[0].merge(halves[1]), x)


def test_merging_leaves_the_parts_alone():
    x = inputs(30, 4)
    one, two = collect(x[:10]), collect(x[10:])
    both = one.merge(two)
    both.update(x)
    assert_describes(one, x[:10])
    assert_describes(two, x[10:])
    assert_describes(both, np.concatenate([x, x]))
    assert Stats.empty(3).merge(Stats.empty(3)).tokens == 0


def test_made_from_arrays_it_goes_on_from_there():
    x = inputs(30, 4)
    half = collect(x[:10])
    again = Stats(half.gram, half.abs_mean, half.abs_max, half.tokens, half.mean)
    again.update(x[10:])
    assert_describes(again, x)
    assert_describes(half, x[:10])


def test_strided_activations():
    x = inputs(60, 30)
    assert_describes(collect(x[::2, ::3]), x[::2, ::3])
    assert_describes(collect(np.asfortranarray(x)), x)


def test_gram_is_symmetric_between_and_after_updates():
    stats = Stats.empty(600)  # more than one block of the mirror
    for seed in range(3):
        stats.update(inputs(20, 600, seed))
        np.testing.assert_array_equal(stats.gram, stats.gram.T)
        assert stats.gram.dtype == np.float32
        assert np.linalg.eigvalsh(stats.gram.astype(float)).min() > -1e-2


def test_gram_is_added_to_in_place():
    """[K, K] is the largest thing calibration holds: no update may make a second one."""
    x, stats = inputs(16, 1500), Stats.empty(1500)
    stats.update(x)  # scipy is imported by now

    def work():
        for _ in range(3):
            stats.update(x)
            stats.gram  # noqa: B018

    assert peak_bytes(work) < stats.gram.nbytes / 4


def test_widening_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(stats_module, "CHUNK", 1 << 16)
    x = inputs(20000, 64).astype(np.float16)
    stats = collect(x[:10])
    assert peak_bytes(lambda: stats.update(x[10:])) < x.nbytes
    assert_describes(stats, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_inf_are_refused(bad, dtype):
    x = inputs(10, 4).astype(dtype)
    x[7, 2] = bad
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        collect(x)


def test_activations_whose_squares_overflow_are_refused():
    with pytest.raises(FloatingPointError, match="too large"):
        collect(np.full((2, 3), 1e20, np.float32))
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        collect(np.full((2, 3), 1e200))


def test_output_error_is_the_error_of_the_output():
    x, delta = inputs(40, 12), inputs(12, 9, seed=1)
    gram = collect(x).gram
    assert output_error(delta, gram) == pytest.approx(reference.loss(delta, x), rel=1e-4)
    for column, error in enumerate(column_errors(delta, gram)):
        assert error == pytest.approx(reference.loss(delta[:, [column]], x), rel=1e-4)
    assert output_error(0 * delta, gram) == 0


def test_output_error_of_wide_weights(monkeypatch):
    delta, gram = inputs(12, 50), collect(inputs(40, 12)).gram
    whole = column_errors(delta, gram)
    monkeypatch.setattr(stats_module, "ERROR_COLUMNS", 7)
    np.testing.assert_allclose(column_errors(delta, gram), whole, rtol=1e-5)
    assert (column_errors(delta, np.ones((12, 12), np.float32)) >= 0).all()


def test_scipy_is_loaded_only_when_statistics_are_collected():
    import subprocess

    code = "import sys, onnx_woq.core.methods.registry, onnx_woq.core.stats; sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("k", [1, 143, 144, 145, 700, 1300])  # one band, several, more rows to a band
def test_half_of_the_gram_matrix_gives_all_of_the_error(k):
    x, delta = inputs(k + 50, k) * np.linspace(0.01, 3, k, dtype=np.float32), inputs(k, 5, seed=1)
    want = np.square(x.astype(np.float64) @ delta).sum(axis=0)
    np.testing.assert_allclose(column_errors(delta, collect(x).gram), want, rtol=1e-4)
    np.testing.assert_allclose(column_errors(delta, np.ascontiguousarray(collect(x).gram)), want, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_error_of_a_quantized_weight_without_its_difference(dtype, scaled, monkeypatch):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    weight, gram = np.asfortranarray(inputs(64, 50).astype(dtype)), collect(inputs(90, 64, seed=1)).gram
    wide = weight.astype(np.float32)
    q = quantize(
        wide, *fit(wide, Spec(3, 16)), Spec(3, 16), input_scale=np.full(64, 1.5, np.float32) if scaled else None
    )
    monkeypatch.setattr(stats_module, "ERROR_COLUMNS", 7)
    assert quantized_error(weight, q, gram) == pytest.approx(output_error(q.effective() - wide, gram), rel=1e-5)
    assert output_energy(weight, gram) == pytest.approx(output_error(wide, gram), rel=1e-5)


def test_neither_difference_nor_decoded_weight_is_held_whole():
    weight, gram = inputs(256, 16384), collect(inputs(300, 256, seed=1)).gram
    q = quantize(weight, *fit(weight, Spec(4, 32)), Spec(4, 32))
    assert peak_bytes(lambda: quantized_error(weight, q, gram)) < weight.nbytes / 5


def test_what_is_kept_is_made_once_for_a_key_and_never_for_other_statistics():
    stats, made = Stats.empty(3), []

    def make():
        made.append(len(made))
        return made[-1]

    assert [stats.kept("a", 1, make) for _ in range(2)] == [0, 1]  # nothing is remembered unless asked for
    twin = stats.keeping()
    assert [twin.kept("a", key, make) for key in (1, 1, 2, 2, 1)] == [2, 2, 3, 3, 4]
    assert twin.kept("b", 1, make) == 5
    assert twin.kept("a", 1, make) == 4
    assert twin.scaled(np.ones(3)).kept("a", 1, make) == 6
    assert stats.kept("a", 1, make) == 7
    assert twin.gram is stats.gram
