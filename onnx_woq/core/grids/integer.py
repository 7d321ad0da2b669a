"""The integer grid of a weight: fit it, encode onto it, decode from it.

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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.spec import Spec

Float = NDArray[np.floating[Any]]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

TILE_ROWS, TILE_COLUMNS = 256, 2048  # 2 MB of float32: smaller ones have threads wait for Python's lock between calls
TALL = 256  # rows of a group beyond which narrow pieces cost more than reading the weight twice
TRANSPOSED = 64  # columns copied at a time out of a weight stored by columns


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
        group_dim: 1 for groups of input channels; 0 for groups of output channels, with scales and zeros [K, G].
        input_scale: float32 [K] when the codes describe `diag(input_scale) @ W`; the input is to be divided by it.
    """

    codes: U8
    scales: F32
    zeros: U8
    bits: int
    group_size: int
    symmetric: bool
    input_scale: F32 | None = None
    group_dim: int = 1

    def turned(self) -> QuantizedTensor:
        """Returns the transposed weight `[N, K]`; its groups run along its other axis."""
        parts = {name: getattr(self, name).T for name in ("codes", "scales", "zeros")}
        return replace(self, **parts, group_dim=1 - self.group_dim)

    def dequantize(self) -> F32:
        """What the codes describe, float32 [K, N]: `(codes − zeros)·scales`."""
        if self.group_dim == 0:
            return self.turned().dequantize().T
        out: F32 = np.empty(self.codes.shape, np.float32)
        k, n = self.codes.shape
        for rows, groups, g, columns in tiles(k, n, self.group_size):
            tile = grouped(out[rows, columns], g)
            tile[...] = grouped(self.codes[rows, columns], g)
            tile -= row(self.zeros, groups, columns)
            tile *= row(self.scales, groups, columns)
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


def tiles(
    k: int, n: int, group_size: int, *, whole: bool = False, rows: int = TILE_ROWS, columns: int = TILE_COLUMNS
) -> Iterator[tuple[slice, slice, int, slice]]:
    """Cuts [k, n] into cache-sized pieces: (rows, groups, rows per group, columns).

    A piece holds several groups, or one, or, unless `whole`, a part of one; the short last group comes by itself.
    It is about `rows · columns` numbers large.
    """
    aligned = k // group_size * group_size
    tall = max(rows, rows * columns // max(1, n))  # of a narrow weight more rows make a piece
    step = max(1, tall // group_size) * group_size
    if group_size > tall and not whole:
        spans = [
            (row, min(row + tall, end), min(tall, end - row))
            for start in range(0, k, group_size)
            for end in [min(start + group_size, k)]
            for row in range(start, end, tall)
        ]
    else:
        spans = [(row, min(row + step, aligned), group_size) for row in range(0, aligned, step)]
        spans += [(aligned, k, k - aligned)] if aligned < k else []
    for start, stop, g in spans:
        groups = slice(start // group_size, start // group_size + (stop - start) // g)
        width = max(64, rows * columns // (stop - start))
        for column in range(0, n, width):
            yield slice(start, stop), groups, g, slice(column, min(column + width, n))


def widened(tile: Float, scratch: Float) -> Float:
    """The `tile` of a stored weight [k, n] as rows of `scratch.dtype`, with contiguous runs of columns.

    A view where it is that already; otherwise a copy in `scratch`, flat and at least as large.
    """
    if tile.dtype == scratch.dtype and (tile.strides[1] == tile.itemsize or tile.size == 0):
        return tile
    out: Float = scratch[: tile.size].reshape(tile.shape)
    # Of columns that lie together in memory, a few at a time: more would push each other out of the cache.
    step = TRANSPOSED if abs(tile.strides[0]) < abs(tile.strides[1]) else tile.shape[1]
    for column in range(0, tile.shape[1], step):
        np.copyto(out[:, column : column + step], tile[:, column : column + step], casting="unsafe")
    return out


def scratch_of(weight: Float, group_size: int, *, whole: bool = False) -> Float:
    """An empty flat array as large as the largest of `tiles`: float64 for a float64 weight, otherwise float32."""
    k, n = weight.shape
    sizes = ((r.stop - r.start) * (c.stop - c.start) for r, _, _, c in tiles(k, n, group_size, whole=whole))
    return np.empty(max(sizes, default=0), np.float64 if weight.dtype == np.float64 else np.float32)


def grouped(tile: NDArray[Any], g: int) -> NDArray[Any]:
    """[groups·g, n] seen as [groups, g, n]; splitting the first axis never copies."""
    return tile.reshape(tile.shape[0] // g, g, tile.shape[1])


def row(parameters: NDArray[Any], groups: slice, columns: slice) -> NDArray[Any]:
    """[G, N] parameters of one tile as [groups, 1, n], ready to broadcast over the rows of each group."""
    return parameters[groups, None, columns]


def grid_of(
    lo: Float, hi: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> tuple[F32, U8]:
    """The grid that spans `lo <= 0 <= hi` (arrays of one shape): scales and zero points of that shape.

    Raises:
        FloatingPointError: a bound is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):
        spans = np.subtract(hi, lo, dtype=np.float64)  # may leave float32
    if not np.isfinite(spans.max(initial=0)):  # whatever is wrong with either bound shows here
        raise FloatingPointError("cannot fit a grid to weights that are NaN or infinite")
    top, half = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    if not spec.symmetric and spec.bits > 1:
        spans /= top
        scales = storable(spans, scale_dtype, 1, steps=top)
        levels = np.divide(lo, scales, dtype=np.float64)
        zeros = np.clip(np.rint(np.negative(levels, out=levels), out=levels), 0, top, out=levels).astype(np.uint8)
        return storable(scales, scale_dtype, np.maximum(zeros, top - zeros)), zeros
    lo, hi = lo.astype(np.float64), hi.astype(np.float64)
    negative = -lo >= hi
    if spec.symmetric:
        signed = full_range or spec.bits == 1
        raw = np.where(negative, -lo, -hi) / half if signed else np.maximum(-lo, hi) / (half - 1)
        return storable(raw, scale_dtype, half), np.full(lo.shape, half, np.uint8)
    return storable(np.where(negative, -lo, hi), scale_dtype, top), (negative & (lo < 0)).astype(np.uint8)


def storable(raw: Float, dtype: DTypeLike, reach: int | NDArray[Any], *, steps: int = 0) -> F32:
    """Rounds scales to what `dtype` holds, as float32: never zero, never so large that `reach·s` overflows.

    Below its normal numbers float16 is coarse. Where rounding down would cut half a step or more off a range of
    `steps` (by default, reach), the next larger scale is taken, which costs at most one step of resolution.
    """
    info, size = np.finfo(np.dtype(dtype)), np.abs(raw)
    headroom = float(info.max) * (1 - float(info.eps))
    if size.min(initial=np.inf) >= info.tiny and size.max(initial=0) <= headroom / 255:
        return raw.astype(info.dtype).astype(np.float32, copy=False)  # ordinary: nothing of the below happens
    size = size.astype(np.float64)
    least = float(info.tiny if info.dtype == np.float32 else info.smallest_subnormal)
    stored = np.clip(size, least, headroom / reach).astype(info.dtype)
    cut = (size - stored.astype(np.float64)) * (steps or reach)
    short = (cut >= stored.astype(np.float64) / 2) & (size < float(info.tiny))
    stored = np.where(short, np.nextafter(stored, info.max, dtype=info.dtype), stored)
    signed = np.copysign(stored, raw).astype(np.float32)
    return np.where(size > 0, signed, np.float32(1))  # an all-zero group: any scale does


def fit(weight: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32) -> tuple[F32, U8]:
    """The grid spanning each group of `weight [K, N]`: scales float32 [G, N], zeros uint8 [G, N].

    Args:
        weight: any float dtype, in any memory order; read tile by tile.
        spec: bits, group size and scheme.
        full_range: symmetric only: the signed scale that uses code 0 (see the module's first lines).
        scale_dtype: what the model stores scales in; they are rounded to it here.

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    k, n = weight.shape
    g = spec.resolved_group(k)
    scratch = scratch_of(weight, g)
    lo, hi = (np.zeros((-(-k // g), n), scratch.dtype) for _ in range(2))  # the range always holds zero
    for rows, groups, size, columns in tiles(k, n, g):
        tile, at = grouped(widened(weight[rows, columns], scratch), size), (groups, columns)
        np.minimum(lo[at], tile.min(axis=1), out=lo[at])
        np.maximum(hi[at], tile.max(axis=1), out=hi[at])
    return grid_of(lo, hi, spec, full_range=full_range, scale_dtype=scale_dtype)


def encode(weight: Float, scales: F32, zeros: U8, bits: int, group_size: int) -> U8:
    """The nearest code of every weight: `clip(round(w / s) + z, 0, 2^bits − 1)`, uint8 [K, N]."""
    k, n = weight.shape
    codes = np.empty((k, n), np.uint8)
    scratch = scratch_of(weight, group_size)
    for rows, groups, g, columns in tiles(k, n, group_size):
        tile = grouped(widened(weight[rows, columns], scratch), g)
        out = grouped(codes[rows, columns], g)
        _encode(tile, row(scales, groups, columns), row(zeros, groups, columns), 2**bits - 1, scratch, out)
    return codes


def project(weight: Float, scales: F32, zeros: U8, bits: int, group_size: int) -> Float:
    """What the nearest codes of `weight [K, N]` stand for, [K, N]: `dequantize` of `encode`, without the codes."""
    k, n = weight.shape
    scratch = scratch_of(weight, group_size)
    out: Float = np.empty((k, n), scratch.dtype)
    for rows, groups, g, columns in tiles(k, n, group_size):
        tile = grouped(widened(weight[rows, columns], scratch), g)
        level, scale = grouped(out[rows, columns], g), row(scales, groups, columns)
        zero = row(zeros, groups, columns).astype(scratch.dtype)
        with np.errstate(over="ignore"):
            np.divide(tile, scale, out=level)
        np.rint(level, out=level)
        np.maximum(level, -zero, out=level)
        np.minimum(level, 2**bits - 1 - zero, out=level)
        level *= scale
    return out


def nearest(
    weight: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> tuple[U8, F32, U8]:
    """`fit` and `encode` in one: codes [K, N], scales [G, N] and zeros [G, N], each tile of `weight` read once."""
    k, n = weight.shape
    g, top = spec.resolved_group(k), 2**spec.bits - 1
    if g > TALL:
        scales, zeros = fit(weight, spec, full_range=full_range, scale_dtype=scale_dtype)
        return encode(weight, scales, zeros, spec.bits, g), scales, zeros
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)
    scratch = scratch_of(weight, g, whole=True)
    whole_numbers = np.empty(len(scratch), np.int8 if spec.bits <= 6 else np.int16)
    for rows, groups, size, columns in tiles(k, n, g, whole=True):
        tile = grouped(widened(weight[rows, columns], scratch), size)
        out, at = grouped(codes[rows, columns], size), (groups, columns)
        lo, hi = tile.min(axis=1), tile.max(axis=1)
        np.minimum(lo, 0, out=lo)
        np.maximum(hi, 0, out=hi)
        scales[at], zeros[at] = grid_of(lo, hi, spec, full_range=full_range, scale_dtype=scale_dtype)
        parameters = row(scales, groups, columns), row(zeros, groups, columns)
        with np.errstate(over="ignore"):
            hi -= lo
            hi /= scales[at]
        if np.abs(hi, out=hi).max(initial=0) < 1.5 * top + 3:  # not so where a scale had to be cut to its dtype
            _encode_narrow(tile, *parameters, top, scratch, whole_numbers, out)
        else:
            _encode(tile, *parameters, top, scratch, out)
    return codes, scales, zeros


def _encode(tile: Float, scales: F32, zeros: U8, top: int, scratch: Float, codes: U8) -> None:
    """Writes the codes of one tile [groups, g, n]; the tile itself may lie in `scratch`."""
    level = scratch[: tile.size].reshape(tile.shape)
    with np.errstate(over="ignore"):  # a quotient beyond float32 is clipped like any other
        np.divide(tile, scales, out=level)
    np.rint(level, out=level)
    level += zeros.astype(level.dtype)
    np.clip(level, 0, top, out=level)
    codes[...] = level


def _encode_narrow(
    tile: Float, scales: F32, zeros: U8, top: int, scratch: Float, whole_numbers: NDArray[Any], codes: U8
) -> None:
    """`_encode` for levels that fit the dtype of `whole_numbers`: shifting and clipping there costs next to nothing."""
    level = scratch[: tile.size].reshape(tile.shape)
    whole = whole_numbers[: tile.size].reshape(tile.shape)
    np.divide(tile, scales, out=level)
    np.rint(level, out=level)
    np.copyto(whole, level, casting="unsafe")
    whole += zeros.astype(whole.dtype)
    np.clip(whole, 0, top, out=whole)
    np.copyto(codes, whole, casting="unsafe")


def quantize(weight: F32, scales: F32, zeros: U8, spec: Spec, *, input_scale: F32 | None = None) -> QuantizedTensor:
    """`weight [K, N]` rounded to the nearest on the grid given."""
    g = spec.resolved_group(len(weight))
    codes = encode(weight, scales, zeros, spec.bits, g)
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, input_scale)
