"""Low-rank compensation: two thin factors that give back the part of a rounding error that matters most to the outputs.

The layer computes `y = x·Ŵ + (x·A)·B` with A [K, r] and B [r, N]. They minimise `‖X·(ΔW − A·B)‖²` with `ΔW = W − Ŵ`:
A·B is the best approximation of rank r to ΔW in the norm of the Gram matrix H. Zhang et al., "QERA: an Analytical
Framework for Quantization Error Reconstruction" (2024), theorem 1: with a square root `H = S·Sᵀ` and the singular value
decomposition `Sᵀ·ΔW = U·Σ·Vᵀ` it is `A·B = S⁻ᵀ·U_r·Σ_r·V_rᵀ`. Because `Sᵀ·ΔW·V_r = U_r·Σ_r`, that is

    A = ΔW·V_r,    B = V_rᵀ.

So no inverse is formed. For any square root, V_r are the leading eigenvectors of `ΔWᵀ·H·ΔW`. The paper divides `Σ_r`
between the factors. Here all of it is in A, whose columns get scales of their own when they are rounded; the rows of B
share scales, and without `Σ_r` they are of one size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.grids.integer import QuantizedTensor, nearest
from onnx_woq.core.lapack import cholesky, leading_eigenvectors
from onnx_woq.core.spec import Spec

logger = logging.getLogger(__name__)

Float = NDArray[np.floating[Any]]
F32 = NDArray[np.float32]

GRID = Spec(bits=8, group_size=32, symmetric=True)
"""The format of both factors: at 8 bits their own rounding error is negligible."""

DAMP = 0.01  # damping of the Gram matrix, as in GPTQ
DAMP_RAISES = 4  # times that damping is raised tenfold before giving up
EXACT_PRODUCTS = 1 << 28  # K²·N up to which products are in float64, at no cost anyone would notice
FACTOR_EXACTLY = 2048  # inputs up to which the square root is taken in float64
BAND = 256  # columns of the square root at a time


@dataclass(frozen=True)
class Factors:
    """The two factors of a low-rank compensation, rounded as they are stored.

    Attributes:
        down: A [K, r]; its `input_scale` is that of the weight, because both read the same divided input.
        up: B [r, N].
    """

    down: QuantizedTensor
    up: QuantizedTensor

    def product(self) -> F32:
        """Returns A·B [K, N], which acts on the original input."""
        product: F32 = self.down.effective() @ self.up.dequantize()
        return product

    def columns(self, columns: slice) -> Factors:
        """Returns a view of the factors for some output channels."""
        return replace(self, up=self.up.columns(columns))


def compensate(
    delta: F32, gram: F32, rank: int, *, input_scale: F32 | None = None, scale_dtype: DTypeLike = np.float32
) -> Factors:
    """Returns the factors of `delta [K, N]` rounded to `GRID`; the second is refitted to the rounded first.

    Args:
        delta: `ΔW = W − Ŵ`. Its rows for inputs that are always zero are ignored.
        gram: H [K, K] of the inputs, or of the inputs less their mean if a bias makes up for the mean error.
        rank: r; beyond min(K, N) the factors are filled up with zeros.
        input_scale: [K], the scale that the model divides the input by; None for none.
        scale_dtype: dtype that the model stores scales in.
    """
    k, n = delta.shape
    alive = gram.diagonal() > 0
    if alive.any() and not alive.all():
        delta = np.where(alive[:, None], delta, np.float32(0))
    root = square_root(gram)
    whitened = _times_transposed(root, delta, _product_dtype(k, n))
    a, _ = _leading(delta, whitened, rank)
    a = a if input_scale is None else a * input_scale[:, None]
    down = _rounded(a, scale_dtype, input_scale)
    seen = _times_transposed(root, down.effective(), np.float64)
    b = np.linalg.pinv(seen.T @ seen, hermitian=True) @ (seen.T.astype(whitened.dtype) @ whitened)
    return Factors(down, _rounded(b, scale_dtype))


def factors(delta: F32, gram: F32, rank: int) -> tuple[Float, Float]:
    """Returns A [K, r] and B [r, N] of `delta [K, N]`, not rounded; B has orthonormal rows.

    Args:
        delta: `ΔW = W − Ŵ`.
        gram: H [K, K] of the inputs.
        rank: r.
    """
    return _leading(delta, _times_transposed(square_root(gram), delta, _product_dtype(*delta.shape)), rank)


def square_root(gram: F32) -> Float | None:
    """Returns a lower triangular S [K, K] with `S·Sᵀ = H + damp·mean(diag H)·I`, or None for S = I.

    None is returned where all inputs are zero, or no damping makes H positive definite; the factors then approximate
    the weight itself. The upper triangle of S holds arbitrary numbers.
    """
    mean = float(gram.diagonal().mean(dtype=np.float64))
    for attempt in range(DAMP_RAISES + 1 if mean > 0 else 0):
        root: Float = np.array(gram, np.float64 if len(gram) <= FACTOR_EXACTLY else np.float32, order="F")
        np.einsum("kk->k", root)[...] += DAMP * 10**attempt * mean
        if cholesky(root):
            return root
    logger.warning("low-rank compensation, weight of %d rows: the inputs are of no help, all count alike", len(gram))
    return None


def working_bytes(k: int, n: int, rank: int) -> int:
    """Estimates the bytes that `compensate` holds at once beyond `delta [k, n]`, the Gram matrix and the result."""
    size, side = np.dtype(_product_dtype(k, n)).itemsize, min(k, n)
    root = (8 if k <= FACTOR_EXACTLY else 4) * k * k
    return root + size * (k * n + BAND * (k + n) + side * side + 4 * rank * (k + n)) + 4 * k * n


def _leading(delta: F32, whitened: Float, rank: int) -> tuple[Float, Float]:
    """Returns `ΔW·V_r` [K, r] and `V_rᵀ` [r, N]; zeros beyond the rank of `Sᵀ·ΔW`.

    Eigenvectors are taken of the smaller of the two products of `Sᵀ·ΔW` with itself.

    Args:
        delta: ΔW [K, N].
        whitened: `Sᵀ·ΔW` [K, N].
        rank: r.
    """
    k, n = delta.shape
    count = min(rank, k, n)
    directions = np.zeros((n, rank), whitened.dtype)
    if n <= k:
        directions[:, :count] = leading_eigenvectors((whitened.T @ whitened).T, count)
    else:
        right = whitened.T @ leading_eigenvectors((whitened @ whitened.T).T, count)
        length = np.linalg.norm(right, axis=0)
        real = length > length.max(initial=0) * np.finfo(right.dtype).eps
        directions[:, :count] = np.divide(right, length, out=np.zeros_like(right), where=real)
    return delta @ directions, directions.T


def _times_transposed(root: Float | None, delta: Float, dtype: type[np.floating[Any]]) -> Float:
    """Returns `Sᵀ·ΔW` [K, N] with half the work of a full product, S [K, K] being lower triangular (None: S = I)."""
    if root is None:
        return delta.astype(dtype)
    out: Float = np.empty(delta.shape, dtype)
    for start in range(0, len(root), BAND):
        band = np.array(root[start:, start : start + BAND], dtype)
        corner = band[: band.shape[1]]
        corner[...] = np.tril(corner)
        np.matmul(band.T, delta[start:].astype(dtype, copy=False), out=out[start : start + BAND])
    return out


def _product_dtype(k: int, n: int) -> type[np.floating[Any]]:
    """Returns the dtype that products for a weight [k, n] are computed in."""
    return np.float64 if k * k * n <= EXACT_PRODUCTS else np.float32


def _rounded(factor: Float, scale_dtype: DTypeLike, input_scale: F32 | None = None) -> QuantizedTensor:
    """Rounds a factor to nearest on `GRID`."""
    group = GRID.resolved_group(len(factor))
    codes = nearest(factor.astype(np.float32), GRID, scale_dtype=scale_dtype)
    return QuantizedTensor(*codes, GRID.bits, group, GRID.symmetric, input_scale)
