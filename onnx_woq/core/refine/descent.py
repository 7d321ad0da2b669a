"""Coordinate descent on the codes of a solved weight, and least squares on its scales.

With H̃ = H + λI and ΔW = Ŵ − W the loss `L = Σ ΔW ∘ (H̃·ΔW)` is a parabola in any single weight. Of row k, everything
else held, it is least at `ŵ_k − (H̃·ΔW)_k / H̃_kk`; the nearest level of the grid to that is the best code there is, and
taking it never raises L. In the scale s of a group with levels c (code − zero) it is a parabola too, least at

    s − (cᵀ·(H̃·ΔW)_g) / (cᵀ·H̃_gg·c).

GPTQ makes up for an error only in the rows that come later; here every row answers to all others. (Coordinate descent:
Behdin et al., "QuantEase" (2023), eq. 7; Chee et al., "QuIP" (2023), call it greedy updates. The scale step is linear
least squares.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.integer import Float, QuantizedTensor, storable

ROWS = 64  # taken together after one product with all others, where a group does not say


def descend(
    weight: NDArray[Any],
    q: QuantizedTensor,
    gram: NDArray[Any],
    passes: int,
    *,
    damp: float = 0.0,
    tiles: list[slice] | None = None,
    dtype: DTypeLike = np.float64,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
) -> QuantizedTensor:
    """Improves `q`, a quantization of `weight [K, N]`, for the inputs with Gram matrix `gram [K, K]`.

    The damped loss never rises, in any step; zero points and input scale stay.

    Args:
        weight: what the codes stand for; where q has an input scale, already multiplied by it, and `gram` divided.
        q: as solved.
        gram: of the inputs.
        passes: over all rows.
        damp: λ as a share of the mean diagonal of `gram`.
        tiles: columns worked on together; all of them by default.
        dtype: what to compute in.
        scale_dtype: what the model stores scales in.
        each: how to go through tiles.
    """
    if passes < 1 or not gram.any():
        return q
    codes, scales = q.codes.copy(), q.scales.copy()
    added = damp * float(gram.diagonal().mean(dtype=np.float64))
    H = np.asarray(gram, dtype)

    def finish(columns: slice) -> None:
        tile = _Tile(np.array(weight[:, columns], dtype, order="C"), q.columns(columns), H, added, scale_dtype)
        for _ in range(passes):
            tile.run()
        codes[:, columns], scales[:, columns] = tile.codes(), tile.scales

    for _ in parallel_map(finish, tiles or [slice(0, weight.shape[1])]):
        pass
    return replace(q, codes=codes, scales=scales)


def working_bytes(k: int, n: int, group_size: int, width: int, itemsize: int) -> int:
    """About the most that `descend` holds at once beyond the weight [k, n], a float32 Gram matrix and both results.

    Args:
        k, n, group_size: of the weight.
        width: columns of a tile.
        itemsize: bytes of a number that is computed with.
    """
    converted = k * k * itemsize if itemsize != np.dtype(np.float32).itemsize else 0
    groups, some = -(-k // group_size), max(2 * group_size, 3 * min(group_size, 2 * ROWS))  # residuals and the like
    return converted + k * n + 4 * groups * n + (2 * k + some + 4 * groups) * width * itemsize


class _Tile:
    """Some columns: `level [K, n]` (code − zero), `delta [K, n]` (ΔW), `scales [G, n]`."""

    def __init__(self, weight: Float, q: QuantizedTensor, H: Float, added: float, scale_dtype: DTypeLike):
        self.H, self.added, self.g, self.scale_dtype = H, added, q.group_size, scale_dtype
        self.scales, self.zeros = q.scales.copy(), q.zeros
        self.floor = -q.zeros.astype(weight.dtype)
        self.ceiling = self.floor + (2**q.bits - 1)
        self.level = q.codes.astype(weight.dtype)
        self.delta = weight
        for group in range(len(self.scales)):
            rows = self.rows(group)
            self.level[rows] += self.floor[group]
            np.subtract(self.level[rows] * self.scales[group], weight[rows], out=weight[rows])

    def rows(self, group: int) -> slice:
        return slice(group * self.g, min((group + 1) * self.g, len(self.level)))

    def codes(self) -> NDArray[np.uint8]:
        for group in range(len(self.scales)):
            self.level[self.rows(group)] -= self.floor[group]
        return self.level.astype(np.uint8)

    def run(self) -> None:
        """One pass: the rows of each group, then its scale."""
        for group in range(len(self.scales)):
            rows = self.rows(group)
            size = self.g if self.g <= 2 * ROWS else ROWS
            for start in range(rows.start, rows.stop, size):
                residual = self.take(group, slice(start, min(start + size, rows.stop)))
            if size < self.g:
                residual = self.residual(rows)
            self.refit(group, rows, residual)

    def residual(self, rows: slice) -> Float:
        """`(H̃·ΔW)` of some rows."""
        out: Float = self.H[rows] @ self.delta
        out += self.added * self.delta[rows]
        return out

    def take(self, group: int, rows: slice) -> Float:
        """The best code of each row in turn; returns their residual as it is then."""
        residual, corner = self.residual(rows), self.H[rows, rows].copy()
        corner.flat[:: len(corner) + 1] += self.added
        moved = np.zeros_like(residual)
        scale, floor, ceiling = self.scales[group], self.floor[group], self.ceiling[group]
        for i, row in enumerate(range(rows.start, rows.stop)):
            if self.H[row, row] <= 0:
                continue  # an input that is always zero: GPTQ has given it zero weights
            level = self.level[row]
            step = residual[i] + corner[i, :i] @ moved[:i]
            step /= -corner[i, i] * scale
            step += level
            np.rint(step, out=step)
            np.maximum(step, floor, out=step)
            np.minimum(step, ceiling, out=step)
            np.multiply(step - level, scale, out=moved[i])
            level[...] = step
        self.delta[rows] += moved
        residual += corner @ moved
        return residual

    def refit(self, group: int, rows: slice, residual: Float) -> None:
        """The scale of least loss for the levels there are, where what can be stored of it is an improvement."""
        level = self.level[rows]
        corner = self.H[rows, rows]
        slope = np.einsum("kn,kn->n", level, residual)
        bend = np.einsum("kn,kn->n", level, corner @ level) + self.added * np.einsum("kn,kn->n", level, level)
        old = self.scales[group]
        wanted = old - np.divide(slope, bend, out=np.zeros_like(slope), where=bend > 0)
        reach = np.maximum(-self.floor[group], self.ceiling[group]).astype(np.uint8)
        new = storable(np.where(wanted == 0, old, wanted), self.scale_dtype, reach)
        step = new.astype(level.dtype) - old
        better = (step * (2 * slope + step * bend) < 0) & (np.sign(new) == np.sign(old))
        step = np.where(better, step, 0)
        self.scales[group] = np.where(better, new, old)
        self.delta[rows] += level * step
