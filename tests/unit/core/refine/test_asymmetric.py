"""The weight to aim at: the float weight that answers best to inputs that are off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.methods import gptq
from onnx_woq.core.refine import asymmetric as module
from onnx_woq.core.refine.asymmetric import asymmetric_target
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats

K, N, T = 24, 10, 200


def both(seed: int = 0, off: float = 0.2, tokens: int = T, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a float model and, by an error that depends on them, those of a quantized one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 8)) @ rng.normal(size=(8, k)) + 0.3 * rng.normal(size=(tokens, k)) + 0.5
    return x, x + off * (x @ rng.normal(size=(k, k)) / k**0.5 + rng.normal(size=(tokens, k)))


def collected(x: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None, pieces: int = 3) -> Stats:
    stats = Stats.empty(x.shape[1])
    for part in np.array_split(np.arange(len(x)), pieces):
        stats.update(other[part], None if weights is None else weights[part], x[part])
    return stats


def weight(seed: int = 0, k: int = K, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed + 50).normal(size=(k, n)).astype(np.float32)


def naive(w, x, other, damp, weights=None):
    """min ‖X·W − X̃·Ŵ‖² + λ‖Ŵ − W‖² as one least-squares problem."""
    root = np.ones((len(x), 1)) if weights is None else np.sqrt(weights)[:, None]
    lam = np.sqrt(damp * np.square(root * other).sum(axis=0).mean())
    left = np.vstack([root * other, lam * np.eye(len(w))])
    right = np.vstack([root * x @ w, lam * w])
    return np.linalg.lstsq(left, right, rcond=None)[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([1e-4, 0.01, 1.0]), st.booleans())
def test_it_is_the_least_squares_solution(seed, off, damp, weighted):
    x, other = both(seed, off)
    weights = np.random.default_rng(seed).uniform(0, 3, T) if weighted else None
    found = asymmetric_target(weight(seed), collected(x, other, weights), percdamp=damp, share=1.0)
    np.testing.assert_allclose(found, naive(weight(seed), x, other, damp, weights), atol=2e-3)


def test_in_single_precision_too(monkeypatch):
    monkeypatch.setattr(module, "EXACTLY", 0)
    monkeypatch.setattr(module, "COLUMNS", 3)
    x, other = both()
    found = asymmetric_target(weight(), collected(x, other), percdamp=0.01, share=1.0)
    np.testing.assert_allclose(found, naive(weight(), x, other, 0.01), atol=2e-3)


def test_the_weight_itself_where_the_inputs_are_the_same():
    x, _ = both()
    for damp in (1e-4, 1.0):
        np.testing.assert_allclose(
            asymmetric_target(weight(), collected(x, x), percdamp=damp, share=1.0), weight(), atol=1e-4
        )


def test_a_share_of_the_way():
    x, other = both()
    stats = collected(x, other)
    whole, half = (asymmetric_target(weight(), stats, percdamp=0.01, share=share) for share in (1.0, 0.5))
    np.testing.assert_allclose(half, (whole + weight()) / 2, atol=1e-5)


def test_gptq_comes_closer_to_the_float_outputs():
    x, other = both(3)
    stats, w = collected(x, other), weight(3)
    aimed = asymmetric_target(w, stats, percdamp=0.01, share=1.0)
    errors = [np.square(x @ w - other @ gptq.solve(what, stats, Spec(4, 16)).effective()).sum() for what in (w, aimed)]
    assert errors[1] < 0.7 * errors[0]


def test_dead_and_dependent_inputs():
    x, other = both()
    x[:, 3] = other[:, 3] = 0
    other[:, 5] = other[:, 4]
    assert np.isfinite(asymmetric_target(weight(), collected(x, other), percdamp=0.01, share=1.0)).all()


def test_no_inputs_at_all_leave_the_weight(caplog):
    nothing = np.zeros((5, K))
    np.testing.assert_array_equal(
        asymmetric_target(weight(), collected(nothing, nothing), percdamp=0.01, share=1.0), weight()
    )
    assert "singular" in caplog.text


def test_without_the_float_inputs_it_is_an_error():
    stats = Stats.empty(K)
    stats.update(both()[1])
    with pytest.raises(ValueError, match="float model"):
        asymmetric_target(weight(), stats, percdamp=0.01, share=1.0)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_cross_products_are_those_of_all_tokens(weighted):
    x, other = both()
    weights = np.random.default_rng(1).uniform(0, 2, T) if weighted else None
    w = np.ones(T) if weights is None else weights
    stats = collected(x, other, weights)
    np.testing.assert_allclose(stats.cross, (other * w[:, None]).T @ x, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(stats.float_mean, w @ x / w.sum(), atol=1e-5)
    factor = np.linspace(0.5, 2, K)
    np.testing.assert_allclose(stats.scaled(factor).cross, stats.cross * np.outer(factor, factor), rtol=1e-5)
    parts = [slice(0, 70), slice(70, None)]
    one, two = (collected(x[p], other[p], None if weights is None else w[p], 1) for p in parts)
    np.testing.assert_allclose(one.merge(two).cross, stats.cross, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(one.merge(two).float_mean, stats.float_mean, atol=1e-5)
    share = w[:, None] / w.sum()
    wanted = ((other - (share * other).sum(0)) * w[:, None]).T @ (x - (share * x).sum(0))
    np.testing.assert_allclose(stats.less_mean().cross, wanted, atol=0.05)
