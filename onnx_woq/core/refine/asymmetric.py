"""Asymmetric calibration: the weight to solve for when the inputs of a layer are no longer those of the float model.

Once earlier layers are quantized, a layer reads x̃ where the float model has x. The quantized weight Ŵ should give the
outputs of the float model all the same:

    min over Ŵ of ‖X·W − X̃·Ŵ‖²

This is the objective of GPTAQ (Li et al. 2025) and Qronos (Zhang et al. 2025). Let `G = X̃ᵀX̃` be the Gram matrix and
`C = X̃ᵀX` the cross products. Up to a constant the objective is `‖X̃·(W* − Ŵ)‖²`, where

    W* = G⁻¹·C·W = W + G⁻¹·(C − G)·W

is the float weight that gives the best outputs for x̃. Any solver can round W* with the Gram matrix G as it would round
W. G is damped as in GPTQ, in a way that pulls W* towards W and not towards 0: `W + (G + λI)⁻¹·(C − G)·W` minimises
`‖X·W − X̃·Ŵ‖² + λ‖Ŵ − W‖²` and equals W where X̃ equals X.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_woq.core.lapack import cholesky, invert_lower
from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)

F32 = NDArray[np.float32]

EXACTLY = 2048  # inputs up to which everything is computed in float64
RAISES = 4  # times that damping is raised tenfold before giving up
COLUMNS = 512  # columns of the weight at a time


def asymmetric_target(weight: F32, stats: Stats, *, percdamp: float, share: float) -> F32:
    """Returns `W + share·(W* − W)`, float32 [K, N]; W itself if no damping makes G positive definite.

    Args:
        weight: W, float32 [K, N].
        stats: statistics of the inputs x̃, with `cross [K, K]`.
        percdamp: λ as a share of the mean of G's diagonal.
        share: 0 to 1, the part of the way from W to W*; less than 1 trusts the calibration data less.

    Raises:
        ValueError: the statistics do not know the inputs of the float model.
    """
    if stats.cross is None:
        raise ValueError("the statistics do not know the inputs of the float model")
    move = _move(stats, percdamp)
    out = np.array(weight, np.float32)
    if move is None:
        logger.warning("weight of %d rows: its inputs' Gram matrix is singular; their deviation is left", len(weight))
        return out
    move *= share
    for columns in (slice(c, c + COLUMNS) for c in range(0, weight.shape[1], COLUMNS)):
        out[:, columns] += (move @ weight[:, columns].astype(move.dtype)).astype(np.float32)
    return out


def working_bytes(k: int, n: int) -> int:
    """Estimates the bytes that `asymmetric_target` holds at once, its result included.

    Not counted are the weight [k, n] and its statistics.
    """
    itemsize = 8 if k <= EXACTLY else 4
    return 4 * k * n + itemsize * (3 * k * k + 2 * k * min(COLUMNS, n))


def _move(stats: Stats, percdamp: float) -> NDArray[Any] | None:
    """Returns `(G + λI)⁻¹·(C − G)` [K, K], None if no damping makes G positive definite."""
    k = len(stats.gram)
    dtype = np.float64 if k <= EXACTLY else np.float32
    factor = np.empty((k, k), dtype, order="F")
    for attempt in range(RAISES + 1):
        factor[...] = stats.gram
        damp = percdamp * 10**attempt * float(stats.gram.diagonal().mean(dtype=np.float64))
        np.einsum("kk->k", factor)[...] += damp
        if cholesky(factor) and invert_lower(factor) and np.isfinite(factor.diagonal()).all():
            lower = np.tril(factor)
            del factor
            off: NDArray[Any] = np.array(stats.cross, dtype)
            off -= stats.gram
            off = lower @ off
            moved: NDArray[Any] = lower.T @ off
            return moved
    return None
