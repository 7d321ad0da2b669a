"""Clip search: shrinks the range of each group to where its weighted squared error is least.

Letters are those of `core.grids.integer`: `weight [K, N]`, G groups of g rows, scales and zero points `[G, N]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from onnx_woq.core.grids.integer import F32, U8, Float, fit, grouped, row, scratch_of, storable, tiles
from onnx_woq.core.spec import Spec

ROUNDS = 3  # times that codes are rounded and the scale refitted after the search; a fourth gains nothing measurable


def shrinks(mse_range: Sequence[float]) -> list[float]:
    """Returns the shrink factors that a clip search tries, the largest first.

    Args:
        mse_range: start, stop and step; 1, the whole range, is tried too.
    """
    start, stop, step = map(float, mse_range)
    count = int((stop - start) / step + 1e-6) + 1
    return sorted({start + i * step for i in range(count)} | {1.0}, reverse=True)


def search(
    weight: F32,
    spec: Spec,
    mse_range: Sequence[float],
    *,
    row_weights: Float | None = None,
    full_range: bool = False,
    scale_dtype: DTypeLike = np.float32,
    plain: tuple[F32, U8] | None = None,
) -> tuple[F32, U8]:
    """Fits a grid to each group of `weight [K, N]` with the least squared error `Σ_k h_k (ŵ_k − w_k)²`.

    A shrink factor p gives levels `l = clip(round(w / ps), −z, 2^b − 1 − z)`. Their best scale is the least-squares
    one, `s* = Σ h·w·l / Σ h·l²`, which leaves the error `Σ h·w² − (Σ h·w·l)² / Σ h·l²`; rounding to nearest on the grid
    of s* can only lower it. So candidates are compared by `(Σ h·w·l)² / Σ h·l²` alone. Starting from the best factor, a
    few rounds round and refit again, with the zero point as it is, one lower and one higher (asymmetric only). The
    result replaces the plain grid of a group only where its error, with the scale as stored, is smaller: no group ever
    gets worse.

    Args:
        weight: any float dtype, in any memory order.
        spec: bits, group size and scheme.
        mse_range: shrink factors (start, stop, step); 1 is always tried.
        row_weights: [K], the importance h of each row; None for plain squared error.
        full_range: use code 0 of symmetric grids by a signed scale, see `core.grids.integer`.
        scale_dtype: dtype that the model stores scales in.
        plain: the grid that `fit` gives, if it is known.

    Returns:
        Scales float32 [G, N] and zero points uint8 [G, N].

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if plain is None:
        plain = fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype)
    scales, zeros = plain[0].copy(), plain[1].copy()
    k, n = weight.shape
    g, top = spec.resolved_group(k), 2**spec.bits - 1
    h = np.ones(k, np.float32) if row_weights is None else _relative(row_weights)
    moves = (0,) if spec.symmetric else (-1, 0, 1)
    factors = shrinks(mse_range)
    dtype = scratch_of(weight[:0], g).dtype
    with np.errstate(over="ignore", invalid="ignore"):  # of weights far outside a float16 grid; they keep the plain one
        for rows, groups, size, columns in tiles(k, n, g, whole=True):
            at = (groups, columns)
            level = grouped(np.array(weight[rows, columns], dtype, order="C"), size)
            level /= row(scales, groups, columns)
            problem = _Levels(level, h[rows].reshape(-1, 1, size), top)
            factor, zero = problem.best(factors, moves, zeros[at].astype(dtype))
            found = storable(scales[at] * factor, scale_dtype, np.maximum(zero, top - zero))
            before = problem.error(np.ones_like(factor), zeros[at].astype(dtype))
            better = problem.error(found / scales[at], zero) < before
            np.copyto(scales[at], found, where=better)
            np.copyto(zeros[at], zero, where=better, casting="unsafe")
    return scales, zeros


def _relative(row_weights: Float) -> F32:
    """Scales row weights [K] to at most 1, so that no sum of them overflows float32."""
    largest = float(np.max(row_weights, initial=0))
    return np.asarray(row_weights / (largest or 1.0), np.float32)


class _Levels:
    """One tile of a clip search, in units of the plain scale s; candidates are factors of s.

    Attributes:
        level: [groups, g, n], w / s.
        h: [groups, 1, g], row weights.
        top: the largest code.
    """

    def __init__(self, level: Float, h: F32, top: int):
        self.level, self.h, self.top = level, h, top
        self.rounded, self.product = np.empty_like(level), np.empty_like(level)

    def best(self, factors: list[float], moves: tuple[int, ...], zero: Float) -> tuple[Float, Float]:
        """Returns the least-squares factor and the zero point of the best candidate, [groups, n] each.

        Args:
            factors: shrink factors to try.
            moves: changes of the zero point to try.
            zero: zero points of the plain grid, [groups, n].
        """
        best = np.zeros_like(zero)
        factor, chosen = np.ones_like(zero), zero.copy()

        def keep_better(candidate: float | Float, zero: Float) -> None:
            cross, square = self.fit(candidate, zero)
            gain = cross * cross / square
            better = gain > best
            for kept, new in ((best, gain), (factor, cross / square), (chosen, zero)):
                np.copyto(kept, new, where=better)

        for shrink in factors:
            keep_better(shrink, zero)
        for _ in range(ROUNDS):
            start, centre = factor.copy(), chosen.copy()
            for move in moves:
                keep_better(start, np.clip(centre + move, 0, self.top))
        return factor, chosen

    def fit(self, factor: float | Float, zero: Float) -> tuple[Float, Float]:
        """Returns `Σ h·level·l` and `Σ h·l²` for the levels l that the scaled grid rounds to, [groups, n] each."""
        self.round(factor, zero)
        np.multiply(self.rounded, self.level, out=self.product)
        self.rounded *= self.rounded
        cross, square = (self.h @ self.product)[:, 0], (self.h @ self.rounded)[:, 0]
        square[square == 0] = np.inf  # all weights round to zero: the gain is 0
        return cross, square

    def error(self, factor: Float, zero: Float) -> Float:
        """Returns the error `Σ h·(l·factor − level)²` of each group, [groups, n]."""
        self.round(factor, zero)
        self.rounded *= factor[:, None]
        self.rounded -= self.level
        self.rounded *= self.rounded
        return (self.h @ self.rounded)[:, 0]

    def round(self, factor: float | Float, zero: Float) -> None:
        """Writes the levels that the grid scaled by `factor` rounds to into `rounded`."""
        inverse = 1 / factor if isinstance(factor, float) else (1 / factor)[:, None]
        np.multiply(self.level, inverse, out=self.rounded)
        np.rint(self.rounded, out=self.rounded)
        np.maximum(self.rounded, -zero[:, None], out=self.rounded)
        np.minimum(self.rounded, (self.top - zero)[:, None], out=self.rounded)


def fitter(
    spec: Spec, mse_range: Sequence[float] | None, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> Callable[..., tuple[F32, U8]]:
    """Returns a function `(weight [K, N], row_weights=None) -> (scales [G, N], zeros [G, N])`.

    It is `search` over `mse_range`, or plain `fit` if that is None.
    """

    def grid(weight: F32, row_weights: Float | None = None) -> tuple[F32, U8]:
        if mse_range is None:
            return fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype)
        return search(weight, spec, mse_range, row_weights=row_weights, full_range=full_range, scale_dtype=scale_dtype)

    return grid
