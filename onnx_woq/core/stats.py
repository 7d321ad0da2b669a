"""What a solver needs to know about a weight's inputs: sums over calibration tokens, never the tokens themselves.

One loss drives every solver: for an error ΔW [K, N] of the weight and inputs X [T, K], `‖X·ΔW‖² = Σ ΔW ∘ (H·ΔW)` with
the Gram matrix `H = XᵀX` [K, K]. H knows nothing of bits, groups or schemes: one calibration serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
T = TypeVar("T")

CHUNK = 1 << 21  # elements widened or rectified at a time: 8 MB of float32
MIRRORED = 256  # rows and columns of a Gram matrix at a time
ERROR_ROWS, ERROR_COLUMNS = 144, 512  # of a product that errors are taken from


class Stats:
    """Statistics of the inputs of one tap, weighted by token: how they were cut into batches leaves no trace.

    Attributes:
        abs_mean: float64 [K], mean of |x| over tokens.
        abs_max: float32 [K].
        tokens: how many.
        mean: float64 [K], mean of x, each token weighted as in the Gram matrix; NaN where it was not given.
        weight: of all tokens together; as many as there are unless they were weighted.
        cross: float32 [K, K], `Σ x̃·xᵀ` where these are statistics of the inputs x̃ of a quantized model and the float
            model's inputs x of the same tokens are known; else None.
        float_mean: float64 [K], the mean of those x.
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
        """The same statistics, not copied, which remember what `kept` gave last: to solve one tap in several ways."""
        twin = copy(self)
        twin._kept = {}
        return twin

    def kept(self, what: str, key: Any, make: Callable[[], T]) -> T:
        """What follows from these statistics and `key`: `make()`, or the last result of its kind that is remembered.

        Nobody may change it.
        """
        if self._kept is None:
            return make()
        known, found = self._kept.get(what, (None, None))
        if found is None or known != key:
            found = None  # let go before the next one takes its memory
            self._kept.pop(what, None)
            found = make()
            self._kept[what] = key, found
        return found

    @classmethod
    def empty(cls, k: int) -> Stats:
        """No tokens yet, `k` input channels."""
        stats = cls(np.zeros((0, 0), np.float32), np.zeros(k), np.zeros(k, np.float32), 0, np.zeros(k))
        stats._gram = np.zeros((k, k), np.float32, order="F")  # not copied: memory is taken as it is written to
        return stats

    @property
    def gram(self) -> F32:
        """`Σ x·xᵀ` over tokens, float32 [K, K]. Not a copy: later updates change it."""
        if not self._mirrored:
            _mirror(self._gram)
            self._mirrored = True
        return self._gram

    def update(self, x: NDArray[Any], weights: NDArray[Any] | None = None, exact: NDArray[Any] | None = None) -> None:
        """Adds the tokens of `x [..., K]`, any float dtype.

        Args:
            x: the tokens.
            weights: one per token, what its `x·xᵀ` is multiplied by, and its x in the mean; not negative. Mean and
                largest magnitude of |x| are of all tokens alike.
            exact: what the float model has in place of x; for all tokens or for none.

        Raises:
            FloatingPointError: x is NaN or infinite, or too large for its square to be held in float32;
                the statistics are then of no further use.
        """
        from scipy.linalg.blas import ssyrk

        x = np.asarray(x).reshape(-1, len(self.abs_max))
        roots = None if weights is None else np.sqrt(weights, dtype=np.float32).reshape(len(x), 1)
        step = max(1, CHUNK // max(1, x.shape[1]))
        for start in range(0, len(x), step):
            with np.errstate(over="ignore", invalid="ignore"):  # looked at just below
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
                # chunk.T is column-ordered, so x·xᵀ is added to the upper triangle without a copy of either.
                self._gram = ssyrk(1.0, chunk.T, beta=1.0, c=self._gram, overwrite_c=1)
                if exact is not None:
                    self._pair(chunk, exact.reshape(x.shape)[start : start + step], roots, start)
            self._mirrored = False
            if not np.isfinite(self._gram.diagonal()).all():
                raise FloatingPointError("the activations are too large: their squares overflow float32")

    def _pair(self, chunk: F32, exact: NDArray[Any], roots: F32 | None, start: int) -> None:
        """Adds tokens of both models, those of `chunk` weighted already; `self.weight` counts them."""
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
        """Statistics of the same inputs, each multiplied by its `factor [K]`, positive."""
        factor = np.asarray(factor, np.float32)
        other = copy(self)
        other._gram = np.array(self.gram, order="F")
        other._gram *= factor[:, None]
        other._gram *= factor
        other.abs_mean, other.abs_max = self.abs_mean * factor, self.abs_max * factor
        other.mean = self.mean * factor
        other._kept = None  # what follows from these does not follow from those
        if self.cross is not None and self.float_mean is not None:
            other.cross = self.cross * factor[:, None] * factor
            other.float_mean = self.float_mean * factor
        return other

    def merge(self, other: Stats) -> Stats:
        """Statistics of the tokens of both."""
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
        """The same with the Gram matrix of the inputs less their mean, `H − w·m·mᵀ`, w the weight of all tokens.

        With it `Σ ΔW ∘ (H·ΔW)` is what is left of the squared output error once its mean is taken away. No tokens
        may be added to the result.

        Raises:
            ValueError: the mean is not known.
        """
        root = self.known_mean() * np.sqrt(self.weight)
        gram = np.array(self.gram, order="F")
        for columns in (slice(c, c + MIRRORED) for c in range(0, len(gram), MIRRORED)):
            gram[:, columns] -= np.outer(root, root[columns])
        diagonal = np.einsum("kk->k", gram)
        np.maximum(diagonal, 0, out=diagonal)  # of a constant input rounding may leave a hair below
        less = copy(self)
        less._gram, less.mean = gram, np.zeros_like(self.mean)
        if self.cross is not None and self.float_mean is not None:
            less.cross = self.cross - np.outer(root, self.float_mean * np.sqrt(self.weight)).astype(np.float32)
            less.float_mean = np.zeros_like(self.mean)
        return less

    def known_mean(self) -> F64:
        """`mean`; ValueError where it was not given."""
        if np.isnan(self.mean).any():
            raise ValueError("these statistics do not say what the mean of the inputs is")
        return self.mean


def _mirror(gram: F32, block: int = MIRRORED) -> None:
    """Copies the upper triangle over the lower one in place, block by block so that both stay in cache."""
    for i in range(0, len(gram), block):
        rows = slice(i, i + block)
        corner = np.triu(gram[rows, rows])
        gram[rows, rows] = corner + np.triu(corner, 1).T
        for j in range(i + block, len(gram), block):
            gram[j : j + block, rows] = gram[rows, j : j + block].T


def column_errors(delta: F32, gram: F32) -> F64:
    """`Σ_k Δ_kn (H·Δ)_kn` of each output channel, [N]; delta [K, N], gram [K, K]. Their sum is `output_error`.

    H being symmetric, half of it will do: with T its upper triangle, the diagonal halved, the sum is
    `2·Σ Δ ∘ (T·Δ)`. T is taken in bands of rows, for little more than half the work of H·Δ.
    """
    (k, n), out = delta.shape, np.zeros(delta.shape[1])
    step = max(ERROR_ROWS, -(-k // 8))
    products = np.empty((min(step, k), min(ERROR_COLUMNS, n)), np.float32)
    for start in range(0, k, step):
        rows = slice(start, min(start + step, k))
        band = np.array(gram[rows, start:], np.float32)
        band[:, : len(band)] /= 2  # this block holds both its triangles
        for columns in (slice(c, min(c + ERROR_COLUMNS, n)) for c in range(0, n, ERROR_COLUMNS)):
            product = products[: len(band), : columns.stop - columns.start]
            np.matmul(band, delta[start:, columns], out=product)
            out[columns] += np.einsum("kn,kn->n", delta[rows, columns], product, dtype=np.float64)
    return np.maximum(2 * out, 0)  # a square; rounding may leave a hair below


def output_error(delta: F32, gram: F32) -> float:
    """`‖X·Δ‖² = Σ Δ ∘ (H·Δ)`, the squared error of the output over all calibration tokens (delta [K, N])."""
    return float(column_errors(delta, gram).sum())


def quantized_error(weight: NDArray[Any], q: QuantizedTensor, gram: F32) -> float:
    """`output_error(q.effective() - weight, gram)`, some columns at a time: neither difference is ever held whole.

    Args:
        weight: [K, N], any float dtype, in either memory order.
        q: what it was quantized to.
        gram: [K, K].
    """
    error = 0.0
    for columns in (slice(c, c + ERROR_COLUMNS) for c in range(0, weight.shape[1], ERROR_COLUMNS)):
        delta = q.columns(columns).effective()
        delta -= np.asarray(weight[:, columns], np.float32)
        error += output_error(delta, gram)
    return error


def output_energy(weight: NDArray[Any], gram: F32) -> float:
    """`‖X·W‖²`, what `quantized_error` is a share of; weight [K, N] of any float dtype, some columns at a time."""
    starts = range(0, weight.shape[1], ERROR_COLUMNS)
    return sum(output_error(np.ascontiguousarray(weight[:, c : c + ERROR_COLUMNS], np.float32), gram) for c in starts)
