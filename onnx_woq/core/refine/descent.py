"""Coordinate descent on the codes of a quantized weight, and least squares on its scales.

Let H̃ = H + λI be the damped Gram matrix and ΔW = Ŵ − W. The loss `L = Σ ΔW ∘ (H̃·ΔW)` is a parabola in every single
weight. With all others held, it is least in row k at `ŵ_k − (H̃·ΔW)_k / H̃_kk`. The level nearest to that is the best
one, and choosing it never raises L. In the scale s of a group with levels c (code − zero point) L is a parabola too,
least at

    s − (cᵀ·(H̃·ΔW)_g) / (cᵀ·H̃_gg·c).

GPTQ makes up for an error in later rows only; here every row reacts to all others. Sources: Behdin et al., "QuantEase"
(2023), equation 7, for the codes (Chee et al., "QuIP" (2023), call them greedy updates); linear least squares for the
scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.integer import Float, QuantizedTensor, storable

ROWS = 64  # rows improved after one product with all others, where groups are larger than twice this


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
    """Returns `q`, a quantized `weight [K, N]`, with better codes and scales for inputs of Gram matrix `gram [K, K]`.

    No step raises the damped loss. Zero points and the input scale stay.

    Args:
        weight: the weight that the codes approximate. Where q has an input scale, it is multiplied by that already, and
            `gram` divided by it.
        q: the quantized weight to improve.
        gram: H [K, K].
        passes: passes over all rows; q is returned as it is for 0.
        damp: λ as a share of the mean diagonal of `gram`.
        tiles: columns worked on together; None for all at once.
        dtype: dtype to compute in.
        scale_dtype: dtype that the model stores scales in.
        parallel_map: maps a function over tiles.
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
    """Estimates the bytes that `descend` holds at once.

    Not counted are the weight [k, n], a float32 Gram matrix and the quantized weight before and after.

    Args:
        k, n: input and output channels of the weight.
        group_size: rows per group.
        width: columns of a tile.
        itemsize: bytes of a number of the dtype that is computed in.
    """
    converted = k * k * itemsize if itemsize != np.dtype(np.float32).itemsize else 0
    groups, some = -(-k // group_size), max(2 * group_size, 3 * min(group_size, 2 * ROWS))  # residuals and products
    return converted + k * n + 4 * groups * n + (2 * k + some + 4 * groups) * width * itemsize


class _Tile:
    """Coordinate descent on some columns.

    Attributes:
        H: the Gram matrix [K, K], without damping.
        added: λ, which damping adds to its diagonal.
        level: [K, n], code − zero point.
        floor, ceiling: [G, n], the lowest and the highest level of each group.
        delta: ΔW [K, n]; takes the memory of the weight.
        scales: [G, n].
    """

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
        """Returns the rows of a group."""
        return slice(group * self.g, min((group + 1) * self.g, len(self.level)))

    def codes(self) -> NDArray[np.uint8]:
        """Returns the codes [K, n]; the levels are lost."""
        for group in range(len(self.scales)):
            self.level[self.rows(group)] -= self.floor[group]
        return self.level.astype(np.uint8)

    def run(self) -> None:
        """Does one pass: improves the codes of each group row by row, then its scale."""
        for group in range(len(self.scales)):
            rows = self.rows(group)
            size = self.g if self.g <= 2 * ROWS else ROWS
            for start in range(rows.start, rows.stop, size):
                residual = self.take(group, slice(start, min(start + size, rows.stop)))
            if size < self.g:
                residual = self.residual(rows)
            self.refit(group, rows, residual)

    def residual(self, rows: slice) -> Float:
        """Returns `H̃·ΔW` of some rows, [rows, n]."""
        out: Float = self.H[rows] @ self.delta
        out += self.added * self.delta[rows]
        return out

    def take(self, group: int, rows: slice) -> Float:
        """Gives each of some rows of a group its best code in turn; returns their residual `H̃·ΔW` afterwards."""
        residual, corner = self.residual(rows), self.H[rows, rows].copy()
        corner.flat[:: len(corner) + 1] += self.added
        moved = np.zeros_like(residual)
        scale, floor, ceiling = self.scales[group], self.floor[group], self.ceiling[group]
        for i, row in enumerate(range(rows.start, rows.stop)):
            if self.H[row, row] <= 0:
                continue  # an input that is always zero; GPTQ has given it zero weights
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
        """Refits the scale of a group to its levels, in the columns where the scale as stored lowers the loss.

        Args:
            group: number of the group.
            rows: its rows.
            residual: `H̃·ΔW` of these, [rows, n].
        """
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
