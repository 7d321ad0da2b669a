"""Statistics of a weight's inputs over the calibration tokens, and the output errors that follow from them.

Every solver works on one loss. Let X [T, K] be the inputs of a weight on T calibration tokens and ΔW [K, N] the error
of the weight. Then the squared error of the outputs is `‖X·ΔW‖² = Σ ΔW ∘ (H·ΔW)`, with the Gram matrix `H = XᵀX`
[K, K]. So sums over tokens are enough and no token is kept. H does not depend on bits or groups: one calibration run
serves every number format.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_woq.core.grids.integer import QuantizedTensor

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
T = TypeVar("T")

CHUNK = 1 << 21  # activations converted to float32 at a time: 8 MB
MIRRORED = 256  # rows and columns of a Gram matrix mirrored at a time, so that both blocks stay in cache
ERROR_ROWS, ERROR_COLUMNS = 144, 512  # size of one product H·ΔW that errors are summed from


class Stats:
    """Statistics of one activation with K channels, summed over tokens x [K].

    Every token counts once, or by its weight if tokens are weighted. The numbers do not depend on how the tokens were
    cut into batches.

    Attributes:
        gram: float32 [K, K], the Gram matrix `Σ x·xᵀ`.
        abs_mean: float64 [K], mean of |x| over tokens.
        abs_max: float32 [K], maximum of |x|.
        tokens: number of tokens.
        mean: float64 [K], mean of x, each token weighted as in the Gram matrix; NaN where it is not known.
        weight: sum of the weights of all tokens; the number of tokens unless they were weighted.
        cross: float32 [K, K], the cross products `Σ x̃·xᵀ` of the inputs x̃ of a partly quantized model, which all
            other statistics are of, and the inputs x of the float model for the same tokens; None where x is not known.
        float_mean: float64 [K], mean of those x.
    """

    def __init__(
        self,
        gram: F32,
        abs_mean: NDArray[Any],
        abs_max: F32,
        tokens: int,
        mean: NDArray[Any] | None = None,
        weight: float | None = None,
    ):
        # Column order is what ssyrk adds to in place; of a symmetric matrix it is the same matrix.
        self._gram: F32 = np.array(gram, np.float32, order="F")
        self._mirrored = True
        self.abs_mean: F64 = np.array(abs_mean, np.float64)
        self.abs_max: F32 = np.array(abs_max, np.float32)
        self.tokens = int(tokens)
        self.mean: F64 = np.full(len(self.abs_max), np.nan) if mean is None else np.array(mean, np.float64)
        self.weight = float(tokens if weight is None else weight)
        self.cross: F32 | None = None
        self.float_mean: F64 | None = None
        self._kept: dict[str, tuple[Any, Any]] | None = None

    def keeping(self) -> Stats:
        """Returns a view of these statistics that remembers results of `kept`.

        Solving one linear group in several ways then computes only once what all of them need, such as a factorization.
        """
        twin = copy(self)
        twin._kept = {}
        return twin

    def kept(self, what: str, key: Any, make: Callable[[], T]) -> T:
        """Returns `make()`, or the remembered result of an earlier call with the same `what` and `key`.

        Results are remembered only on a view made by `keeping`, one per `what`. The caller must not change them.

        Args:
            what: the kind of result, such as "gptq factors".
            key: everything besides these statistics that the result depends on.
            make: computes the result.
        """
        if self._kept is None:
            return make()
        known, found = self._kept.get(what, (None, None))
        if found is None or known != key:
            found = None  # free the old result before the new one takes memory
            self._kept.pop(what, None)
            found = make()
            self._kept[what] = key, found
        return found

    @classmethod
    def empty(cls, k: int) -> Stats:
        """Returns statistics of `k` input channels and no tokens yet."""
        stats = cls(np.zeros((0, 0), np.float32), np.zeros(k), np.zeros(k, np.float32), 0, np.zeros(k))
        stats._gram = np.zeros((k, k), np.float32, order="F")  # uncopied zeros take memory only once written to
        return stats

    @property
    def gram(self) -> F32:
        """Returns the Gram matrix `Σ x·xᵀ`, float32 [K, K]; not a copy, so later updates change it."""
        if not self._mirrored:
            _mirror(self._gram)
            self._mirrored = True
        return self._gram

    def update(self, x: NDArray[Any], weights: NDArray[Any] | None = None, exact: NDArray[Any] | None = None) -> None:
        """Adds the tokens of `x [..., K]`, of any float dtype.

        Args:
            x: the tokens.
            weights: one non-negative weight per token, which multiplies its `x·xᵀ` and its x in the mean. `abs_mean`
                and `abs_max` count all tokens alike.
            exact: the same shape as x, the inputs of the float model for the same tokens. They are given in every
                update or in none.

        Raises:
            FloatingPointError: x is NaN or infinite, or its square overflows float32. These statistics must not be
                used any more.
        """
        from scipy.linalg.blas import ssyrk

        x = np.asarray(x).reshape(-1, len(self.abs_max))
        roots = None if weights is None else np.sqrt(weights, dtype=np.float32).reshape(len(x), 1)
        step = max(1, CHUNK // max(1, x.shape[1]))
        for start in range(0, len(x), step):
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                chunk = np.ascontiguousarray(x[start : start + step], np.float32)
                size = np.abs(chunk)
                largest = size.max(axis=0)
                if not np.isfinite(largest).all():
                    raise FloatingPointError("the activations contain NaN or Inf")
                self.abs_max = np.maximum(self.abs_max, largest)
                self.tokens += len(chunk)
                self.abs_mean += (size.sum(axis=0, dtype=np.float64) - len(chunk) * self.abs_mean) / self.tokens
                if weights is None:
                    share, total = chunk.sum(axis=0, dtype=np.float64), float(len(chunk))
                else:
                    some = np.asarray(weights, np.float64).reshape(-1)[start : start + step]
                    share, total = some @ chunk, float(some.sum())
                self.weight += total
                self.mean += (share - total * self.mean) / (self.weight or 1)
                if roots is not None:
                    chunk = chunk * roots[start : start + step]
                # chunk.T is in column order, so BLAS adds x·xᵀ to the upper triangle in place, copying neither matrix.
                self._gram = ssyrk(1.0, chunk.T, beta=1.0, c=self._gram, overwrite_c=1)
                if exact is not None:
                    self._pair(chunk, exact.reshape(x.shape)[start : start + step], roots, start)
            self._mirrored = False
            if not np.isfinite(self._gram.diagonal()).all():
                raise FloatingPointError("the activations are too large: their squares overflow float32")

    def _pair(self, chunk: F32, exact: NDArray[Any], roots: F32 | None, start: int) -> None:
        """Adds the cross products of some tokens; `self.weight` already counts these.

        Args:
            chunk: float32 [t, K], tokens of the quantized model times the square roots of their weights.
            exact: [t, K], the tokens of the float model, not weighted.
            roots: square roots of the weights of all tokens of the update; None where they are not weighted.
            start: number of the first of these tokens within the update.
        """
        from scipy.linalg.blas import sgemm

        other = np.ascontiguousarray(exact, np.float32)
        if not np.isfinite(other).all():
            raise FloatingPointError("the activations contain NaN or Inf")
        k = len(self.abs_max)
        if self.cross is None or self.float_mean is None:
            self.cross, self.float_mean = np.zeros((k, k), np.float32, order="F"), np.zeros(k)
        total, share = float(len(other)), other.sum(axis=0, dtype=np.float64)
        if roots is not None:
            some = np.square(roots[start : start + len(other)], dtype=np.float64).reshape(-1)
            total, share = float(some.sum()), some @ other
            other = other * roots[start : start + len(other)]
        self.float_mean += (share - total * self.float_mean) / (self.weight or 1)
        self.cross = sgemm(1.0, chunk.T, other.T, beta=1.0, c=self.cross, trans_b=1, overwrite_c=1)

    def scaled(self, factor: NDArray[Any]) -> Stats:
        """Returns the statistics of the inputs multiplied by `factor [K]`, one positive factor per channel."""
        factor = np.asarray(factor, np.float32)
        other = copy(self)
        other._gram = np.array(self.gram, order="F")
        other._gram *= factor[:, None]
        other._gram *= factor
        other.abs_mean, other.abs_max = self.abs_mean * factor, self.abs_max * factor
        other.mean = self.mean * factor
        other._kept = None  # remembered results hold for the unscaled inputs only
        if self.cross is not None and self.float_mean is not None:
            other.cross = self.cross * factor[:, None] * factor
            other.float_mean = self.float_mean * factor
        return other

    def merge(self, other: Stats) -> Stats:
        """Returns the statistics of the tokens of both."""
        tokens = self.tokens + other.tokens
        share = other.tokens / max(1, tokens)
        both = Stats(
            self.gram + other.gram,
            self.abs_mean + share * (other.abs_mean - self.abs_mean),
            np.maximum(self.abs_max, other.abs_max),
            tokens,
            self.mean + other.weight / ((self.weight + other.weight) or 1) * (other.mean - self.mean),
            self.weight + other.weight,
        )
        pairs = (self.cross, other.cross, self.float_mean, other.float_mean)
        if pairs[0] is not None and pairs[1] is not None and pairs[2] is not None and pairs[3] is not None:
            part = other.weight / (both.weight or 1)
            both.cross, both.float_mean = pairs[0] + pairs[1], pairs[2] + part * (pairs[3] - pairs[2])
        return both

    def less_mean(self) -> Stats:
        """Returns the statistics of the inputs less their mean m: the Gram matrix becomes `H − w·m·mᵀ`.

        Here w is the weight of all tokens. With this matrix `Σ ΔW ∘ (H·ΔW)` is the squared output error that is left
        once a bias has removed its mean (`core.refine.bias`). No tokens may be added to the result.

        Raises:
            ValueError: the mean is not known.
        """
        root = self.known_mean() * np.sqrt(self.weight)
        gram = np.array(self.gram, order="F")
        for columns in (slice(c, c + MIRRORED) for c in range(0, len(gram), MIRRORED)):
            gram[:, columns] -= np.outer(root, root[columns])
        diagonal = np.einsum("kk->k", gram)
        np.maximum(diagonal, 0, out=diagonal)  # rounding may leave that of a constant input just below zero
        less = copy(self)
        less._gram, less.mean = gram, np.zeros_like(self.mean)
        if self.cross is not None and self.float_mean is not None:
            less.cross = self.cross - np.outer(root, self.float_mean * np.sqrt(self.weight)).astype(np.float32)
            less.float_mean = np.zeros_like(self.mean)
        return less

    def known_mean(self) -> F64:
        """Returns `mean`, float64 [K].

        Raises:
            ValueError: the mean is not known.
        """
        if np.isnan(self.mean).any():
            raise ValueError("these statistics do not say what the mean of the inputs is")
        return self.mean


def _mirror(gram: F32, block: int = MIRRORED) -> None:
    """Copies the upper triangle of `gram [K, K]` to the lower one, block by block so that both stay in cache."""
    for i in range(0, len(gram), block):
        rows = slice(i, i + block)
        corner = np.triu(gram[rows, rows])
        gram[rows, rows] = corner + np.triu(corner, 1).T
        for j in range(i + block, len(gram), block):
            gram[j : j + block, rows] = gram[rows, j : j + block].T


def column_errors(delta: F32, gram: F32) -> F64:
    """Returns the squared output error of each output channel n, `Σ_k Δ_kn (H·Δ)_kn`, float64 [N].

    Half of the symmetric H is enough: with T its upper triangle, the diagonal halved, the error is `2·Σ_k Δ_kn
    (T·Δ)_kn`. T is taken in bands of rows, which costs little more than half the work of H·Δ.

    Args:
        delta: Δ [K, N], the error of the weight.
        gram: H [K, K].
    """
    (k, n), out = delta.shape, np.zeros(delta.shape[1])
    step = max(ERROR_ROWS, -(-k // 8))
    products = np.empty((min(step, k), min(ERROR_COLUMNS, n)), np.float32)
    for start in range(0, k, step):
        rows = slice(start, min(start + step, k))
        band = np.array(gram[rows, start:], np.float32)
        band[:, : len(band)] /= 2  # the block on the diagonal holds both its triangles
        for columns in (slice(c, min(c + ERROR_COLUMNS, n)) for c in range(0, n, ERROR_COLUMNS)):
            product = products[: len(band), : columns.stop - columns.start]
            np.matmul(band, delta[start:, columns], out=product)
            out[columns] += np.einsum("kn,kn->n", delta[rows, columns], product, dtype=np.float64)
    return np.maximum(2 * out, 0)  # rounding may leave a square just below zero


def output_error(delta: F32, gram: F32) -> float:
    """Returns the squared error of the outputs over all calibration tokens, `‖X·Δ‖² = Σ Δ ∘ (H·Δ)`.

    Args:
        delta: Δ [K, N], the error of the weight.
        gram: H [K, K].
    """
    return float(column_errors(delta, gram).sum())


def quantized_error(weight: NDArray[Any], q: QuantizedTensor, gram: F32) -> float:
    """Returns `output_error(q.effective() - weight, gram)`, computed some columns at a time to save memory.

    Args:
        weight: [K, N], any float dtype, in either memory order.
        q: the quantized weight.
        gram: H [K, K].
    """
    error = 0.0
    for columns in (slice(c, c + ERROR_COLUMNS) for c in range(0, weight.shape[1], ERROR_COLUMNS)):
        delta = q.columns(columns).effective()
        delta -= np.asarray(weight[:, columns], np.float32)
        error += output_error(delta, gram)
    return error


def output_energy(weight: NDArray[Any], gram: F32) -> float:
    """Returns the energy of the outputs `‖X·W‖²`, which `quantized_error` is divided by for a relative error.

    Args:
        weight: [K, N], any float dtype, in either memory order; read some columns at a time.
        gram: H [K, K].
    """
    starts = range(0, weight.shape[1], ERROR_COLUMNS)
    return sum(output_error(np.ascontiguousarray(weight[:, c : c + ERROR_COLUMNS], np.float32), gram) for c in starts)
