"""The integer grid of a weight: fit it, encode onto it, decode from it, search for a better one.

Letters: weight `[K, N]` (y = x @ W), group size g, G = ceil(K / g) groups of consecutive rows (the last may be
short). Group and column share one scale s and one zero point z; a code c in 0 … 2^b − 1 stands for `(c − z)·s`.

Asymmetric: the range `lo = min(w, 0)`, `hi = max(w, 0)` always holds zero, so that zero is always exact;
`s = (hi − lo) / (2^b − 1)`, `z = clip(round(−lo / s), 0, 2^b − 1)`.

Symmetric: `z = 2^(b−1)`. Plain, `s = max|w| / (2^(b−1) − 1)`: both signs alike, code 0 is left unused.
Full range, `s = −w_ext / 2^(b−1)` with w_ext the entry of largest magnitude (the negative one at a tie), so that the
extreme lands exactly on code 0 and every code is used; s carries the sign.

One bit leaves two levels, of which zero is one, since z is a code itself: both schemes then take `{0, w_ext}`,
asymmetric with a positive scale and z = 0 or 1, symmetric with z = 1 and a signed scale.

Codes are `clip(round(w / s) + z, 0, 2^b − 1)`, halves rounded to even. Scales are rounded to the dtype the model will
store them in *before* anything is computed from them. A group that lies on its grid comes back exactly when it
holds both extremes (codes 0 and 2^b − 1 asymmetric, ±(2^(b−1) − 1) from zero symmetric, code 0 full range), its scale
is representable and the products `(c − z)·s` are (a scale of at most 16 significant bits is enough in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.recipe import Spec

Float = NDArray[np.floating[Any]]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

TILE_ROWS, TILE_COLUMNS = 64, 2048  # 512 KB of float32: a tile and its scratch stay in the second-level cache
ROUNDS = 3  # of round-and-refit after the clip search; a fourth gains nothing measurable


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes on a grid: what a solver returns and what a lowering stores.

    Attributes:
        codes: uint8 [K, N], 0 … 2^bits − 1.
        scales: float32 [G, N], never zero; negative ones occur (symmetric, full range).
        zeros: uint8 [G, N].
        bits: 1 to 8.
        group_size: rows per group, resolved (never −1).
        symmetric: all zeros are 2^(bits−1).
        input_scale: float32 [K] when the codes describe `diag(input_scale) @ W`; the input is to be divided by it.
    """

    codes: U8
    scales: F32
    zeros: U8
    bits: int
    group_size: int
    symmetric: bool
    input_scale: F32 | None = None

    def dequantize(self) -> F32:
        """What the codes describe, float32 [K, N]: `(codes − zeros)·scales`."""
        out: F32 = np.empty(self.codes.shape, np.float32)
        k, n = self.codes.shape
        for rows, groups, g, columns in tiles(k, n, self.group_size):
            tile = _grouped(out[rows, columns], g)
            tile[...] = _grouped(self.codes[rows, columns], g)
            tile -= _row(self.zeros, groups, columns)
            tile *= _row(self.scales, groups, columns)
        return out

    def effective(self) -> F32:
        """The weight [K, N] that acts on the original input: `dequantize() / input_scale[:, None]`."""
        out = self.dequantize()
        if self.input_scale is not None:
            out /= self.input_scale[:, None]
        return out

    def columns(self, columns: slice) -> QuantizedTensor:
        """The part that belongs to one of several weights solved side by side; a view."""
        part = {name: getattr(self, name)[:, columns] for name in ("codes", "scales", "zeros")}
        return replace(self, **part)


def tiles(k: int, n: int, group_size: int, *, whole: bool = False) -> Iterator[tuple[slice, slice, int, slice]]:
    """Cuts [k, n] into cache-sized pieces: (rows, groups, rows per group, columns).

    A piece holds several groups, or one, or, unless `whole`, a part of one; the short last group comes by itself.
    """
    aligned = k // group_size * group_size
    step = max(1, TILE_ROWS // group_size) * group_size
    if group_size > TILE_ROWS and not whole:
        spans = [
            (row, min(row + TILE_ROWS, end), min(TILE_ROWS, end - row))
            for start in range(0, k, group_size)
            for end in [min(start + group_size, k)]
            for row in range(start, end, TILE_ROWS)
        ]
    else:
        spans = [(row, min(row + step, aligned), group_size) for row in range(0, aligned, step)]
        spans += [(aligned, k, k - aligned)] if aligned < k else []
    for start, stop, g in spans:
        groups = slice(start // group_size, start // group_size + (stop - start) // g)
        width = max(64, TILE_ROWS * TILE_COLUMNS // (stop - start))
        for column in range(0, n, width):
            yield slice(start, stop), groups, g, slice(column, min(column + width, n))


def _grouped(tile: NDArray[Any], g: int) -> NDArray[Any]:
    """[groups·g, n] seen as [groups, g, n]; splitting the first axis never copies."""
    return tile.reshape(tile.shape[0] // g, g, tile.shape[1])


def _row(parameters: NDArray[Any], groups: slice, columns: slice) -> NDArray[Any]:
    """[G, N] parameters of one tile as [groups, 1, n], ready to broadcast over the rows of each group."""
    return parameters[groups, None, columns]


def grid_of(
    lo: Float, hi: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> tuple[F32, U8]:
    """The grid that spans `lo <= 0 <= hi` (arrays of one shape): scales and zero points of that shape.

    Raises:
        FloatingPointError: a bound is NaN or infinite.
    """
    lo, hi = lo.astype(np.float64), hi.astype(np.float64)  # hi − lo may leave float32
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
        raise FloatingPointError("cannot fit a grid to weights that are NaN or infinite")
    top, half = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    negative = -lo >= hi
    if spec.symmetric:
        signed = full_range or spec.bits == 1
        raw = np.where(negative, -lo, -hi) / half if signed else np.maximum(-lo, hi) / (half - 1)
        return _storable(raw, scale_dtype, half), np.full(lo.shape, half, np.uint8)
    if spec.bits == 1:
        return _storable(np.where(negative, -lo, hi), scale_dtype, top), (negative & (lo < 0)).astype(np.uint8)
    scales = _storable((hi - lo) / top, scale_dtype, 1, steps=top)
    zeros = np.clip(np.rint(-lo / scales), 0, top).astype(np.uint8)
    return _storable(scales, scale_dtype, np.maximum(zeros, top - zeros)), zeros


def _storable(raw: Float, dtype: DTypeLike, reach: int | NDArray[Any], *, steps: int = 0) -> F32:
    """Rounds scales to what `dtype` holds, as float32: never zero, never so large that `reach·s` overflows.

    Below its normal numbers float16 is coarse. Where rounding down would cut half a step or more off a range of
    `steps` (by default, reach), the next larger scale is taken, which costs at most one step of resolution.
    """
    info = np.finfo(np.dtype(dtype))
    size = np.abs(np.asarray(raw, np.float64))
    least = float(info.tiny if info.dtype == np.float32 else info.smallest_subnormal)
    largest = np.float64(info.max) / reach * (1 - np.float64(info.eps))
    stored = np.clip(size, least, largest).astype(info.dtype)
    cut = (size - stored.astype(np.float64)) * (steps or reach)
    short = (cut >= stored.astype(np.float64) / 2) & (size < float(info.tiny))
    stored = np.where(short, np.nextafter(stored, info.max, dtype=info.dtype), stored)
    signed = np.copysign(stored, raw).astype(np.float32)
    return np.where(size > 0, signed, np.float32(1))  # an all-zero group: any scale does


def fit(weight: F32, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32) -> tuple[F32, U8]:
    """The grid spanning each group of `weight [K, N]`: scales float32 [G, N], zeros uint8 [G, N].

    Args:
        weight: float, finite.
        spec: bits, group size and scheme.
        full_range: symmetric only: the signed scale that uses code 0 (see the module's first lines).
        scale_dtype: what the model stores scales in; they are rounded to it here.
    """
    k, n = weight.shape
    g = spec.resolved_group(k)
    lo, hi = (np.zeros((-(-k // g), n), weight.dtype) for _ in range(2))  # the range always holds zero
    for rows, groups, size, columns in tiles(k, n, g):
        tile, at = _grouped(weight[rows, columns], size), (groups, columns)
        np.minimum(lo[at], tile.min(axis=1), out=lo[at])
        np.maximum(hi[at], tile.max(axis=1), out=hi[at])
    return grid_of(lo, hi, spec, full_range=full_range, scale_dtype=scale_dtype)


def encode(weight: F32, scales: F32, zeros: U8, bits: int, group_size: int) -> U8:
    """The nearest code of every weight: `clip(round(w / s) + z, 0, 2^bits − 1)`, uint8 [K, N]."""
    k, n = weight.shape
    codes = np.empty((k, n), np.uint8)
    scratch = np.empty(_largest_tile(k, n, group_size), weight.dtype)
    with np.errstate(over="ignore"):  # a quotient beyond float32 is clipped like any other
        for rows, groups, g, columns in tiles(k, n, group_size):
            tile = _grouped(weight[rows, columns], g)
            level = scratch[: tile.size].reshape(tile.shape)
            np.divide(tile, _row(scales, groups, columns), out=level)
            np.rint(level, out=level)
            level += _row(zeros, groups, columns)
            np.clip(level, 0, 2**bits - 1, out=level)
            _grouped(codes[rows, columns], g)[...] = level
    return codes


def _largest_tile(k: int, n: int, group_size: int) -> int:
    return max((r.stop - r.start) * (c.stop - c.start) for r, _, _, c in tiles(k, n, group_size)) if k * n else 0


def shrinks(mse_range: Sequence[float]) -> list[float]:
    """The candidates `start, start + step, … stop` of a clip search, and 1, the whole range."""
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
) -> tuple[F32, U8]:
    """Like `fit`, with the range of each group chosen for the least squared error `Σ_k h_k (ŵ_k − w_k)²`.

    A shrink p gives levels `l = clip(round(w / ps), −z, 2^b − 1 − z)`. For these the best scale is the least-squares
    one, `s* = Σ h·w·l / Σ h·l²`, which leaves `Σ h·w² − (Σ h·w·l)² / Σ h·l²`; rounding to nearest on the grid of s*
    can only lower that. So candidates are compared by `(Σ h·w·l)² / Σ h·l²` alone. From the best shrink a few rounds
    repeat the step (round, refit) with z left, one lower and one higher (asymmetric only). The result replaces the
    plain grid only where its error, measured as it will be stored, is smaller: no group is ever worse off.

    Args:
        weight: as in `fit`.
        spec: as in `fit`.
        mse_range: shrink factors (start, stop, step); 1 is always tried.
        row_weights: [K], the importance h of each row; None for plain squared error.
        full_range: as in `fit`.
        scale_dtype: as in `fit`.
    """
    scales, zeros = fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype)
    k, n = weight.shape
    g, top = spec.resolved_group(k), 2**spec.bits - 1
    h = np.ones(k, np.float32) if row_weights is None else _relative(row_weights)
    moves = (0,) if spec.symmetric else (-1, 0, 1)
    factors = shrinks(mse_range)
    with np.errstate(over="ignore", invalid="ignore"):  # weights far outside a float16 grid; the plain one stays
        for rows, groups, size, columns in tiles(k, n, g, whole=True):
            at = (groups, columns)
            level = _grouped(weight[rows, columns], size) / _row(scales, groups, columns)
            problem = _Levels(level, h[rows].reshape(-1, 1, size), top)
            factor, zero = problem.best(factors, moves, zeros[at].astype(weight.dtype))
            found = _storable(scales[at] * factor, scale_dtype, np.maximum(zero, top - zero))
            before = problem.error(np.ones_like(factor), zeros[at].astype(weight.dtype))
            better = problem.error(found / scales[at], zero) < before
            np.copyto(scales[at], found, where=better)
            np.copyto(zeros[at], zero, where=better, casting="unsafe")
    return scales, zeros


def _relative(row_weights: Float) -> F32:
    """Row weights scaled to at most 1, so that no sum of them leaves float32."""
    largest = float(np.max(row_weights, initial=0))
    return np.asarray(row_weights / (largest or 1.0), np.float32)


class _Levels:
    """One tile of a search: `level [groups, g, n]` is w / s, `h [groups, 1, g]`; factors multiply s."""

    def __init__(self, level: Float, h: F32, top: int):
        self.level, self.h, self.top = level, h, top
        self.rounded, self.product = np.empty_like(level), np.empty_like(level)

    def best(self, factors: list[float], moves: tuple[int, ...], zero: Float) -> tuple[Float, Float]:
        """The least-squares factor and the zero point of the best candidate, [groups, n] each."""
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
        """`Σ h·level·l` and `Σ h·l²` for the levels l that the scaled grid rounds to, [groups, n] each."""
        self.round(factor, zero)
        np.multiply(self.rounded, self.level, out=self.product)
        self.rounded *= self.rounded
        cross, square = (self.h @ self.product)[:, 0], (self.h @ self.rounded)[:, 0]
        square[square == 0] = np.inf  # everything rounds to zero: nothing gained
        return cross, square

    def error(self, factor: Float, zero: Float) -> Float:
        """`Σ h·(l·factor − level)²` of each group, [groups, n]."""
        self.round(factor, zero)
        self.rounded *= factor[:, None]
        self.rounded -= self.level
        self.rounded *= self.rounded
        return (self.h @ self.rounded)[:, 0]

    def round(self, factor: float | Float, zero: Float) -> None:
        inverse = 1 / factor if isinstance(factor, float) else (1 / factor)[:, None]
        np.multiply(self.level, inverse, out=self.rounded)
        np.rint(self.rounded, out=self.rounded)
        np.maximum(self.rounded, -zero[:, None], out=self.rounded)
        np.minimum(self.rounded, (self.top - zero)[:, None], out=self.rounded)


def fitter(
    spec: Spec, mse_range: Sequence[float] | None, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> Callable[..., tuple[F32, U8]]:
    """`(weight, row_weights=None) -> (scales, zeros)`: `search` over `mse_range`, or plain `fit` when it is None."""

    def grid(weight: F32, row_weights: Float | None = None) -> tuple[F32, U8]:
        if mse_range is None:
            return fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype)
        return search(weight, spec, mse_range, row_weights=row_weights, full_range=full_range, scale_dtype=scale_dtype)

    return grid


def quantize(weight: F32, scales: F32, zeros: U8, spec: Spec, *, input_scale: F32 | None = None) -> QuantizedTensor:
    """`weight [K, N]` rounded to the nearest on the grid given."""
    g = spec.resolved_group(len(weight))
    codes = encode(weight, scales, zeros, spec.bits, g)
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, input_scale)
