"""The integer grid of a weight: evenly spaced levels, fitted to each group, encoded to and decoded from.

Letters: `weight [K, N]` (y = x @ W), group size g, G = ceil(K / g) groups of consecutive rows (the last may be short).
Each group of each column has one scale s and one zero point z. A code c in 0 … 2^b − 1 stands for the weight
`(c − z)·s`.

Asymmetric: the range `lo = min(w, 0)`, `hi = max(w, 0)` always includes zero, so that zero is always exact. Then
`s = (hi − lo) / (2^b − 1)` and `z = clip(round(−lo / s), 0, 2^b − 1)`.

Symmetric: `z = 2^(b−1)`. Plain, `s = max|w| / (2^(b−1) − 1)`: levels lie symmetrically around zero and code 0 is not
used. Full range, `s = −w_ext / 2^(b−1)` with w_ext the weight of largest magnitude (the negative one at a tie): s may
be negative, w_ext gets code 0 exactly and every code is used.

One bit gives two levels, and because z is a code itself, one of them is zero. Both schemes then use `{0, w_ext}`:
asymmetric with a positive scale and z = 0 or 1, symmetric with z = 1 and a signed scale.

Codes are `clip(round(w / s) + z, 0, 2^b − 1)`, halves rounded to even. Scales are rounded to the dtype that the model
stores them in *before* anything is computed from them. Encoding and decoding gives a group that already lies on a grid
back exactly if three things hold: it contains both extremes (asymmetric: codes 0 and 2^b − 1; symmetric:
±(2^(b−1) − 1) from zero; full range: code 0), its scale can be represented, and so can the products `(c − z)·s` (in
float32 a scale of at most 16 significant bits is enough).
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

TILE_ROWS, TILE_COLUMNS = 256, 2048  # 2 MB of float32: in smaller tiles threads wait for Python's lock between calls
TALL = 256  # rows of a group above which narrow tiles cost more than reading the weight twice
TRANSPOSED = 64  # columns copied at a time out of a weight in column order


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight: codes with the scales and zero points of their groups. Solvers return it, `targets` store it.

    Attributes:
        codes: uint8 [K, N], 0 … 2^bits − 1.
        scales: float32 [G, N], never zero; negative ones occur (symmetric, full range).
        zeros: uint8 [G, N], zero points.
        bits: 1 to 8.
        group_size: rows per group, a number of rows and never −1.
        symmetric: True if all zero points are 2^(bits−1).
        group_dim: 1 for groups of input channels; 0 for groups of output channels, with scales and zeros [K, G].
        input_scale: float32 [K] if the codes describe `diag(input_scale) @ W` and the model has to divide the input by
            it; None if they describe W.
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
        """Returns the weight that the codes stand for, `(codes − zeros)·scales`, float32 [K, N]."""
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
        """Returns the weight that acts on the original input, `dequantize() / input_scale[:, None]`, float32 [K, N]."""
        out = self.dequantize()
        if self.input_scale is not None:
            out /= self.input_scale[:, None]
        return out

    def columns(self, columns: slice) -> QuantizedTensor:
        """Returns a view of some output channels, such as those of one of several weights solved as one matrix."""
        part = {name: getattr(self, name)[:, columns] for name in ("codes", "scales", "zeros")}
        return replace(self, **part)


def tiles(
    k: int, n: int, group_size: int, *, whole: bool = False, rows: int = TILE_ROWS, columns: int = TILE_COLUMNS
) -> Iterator[tuple[slice, slice, int, slice]]:
    """Yields tiles that cover a weight [k, n] and fit into the cache, of about `rows · columns` numbers each.

    A tile holds one or more groups or, unless `whole`, a part of one. A short last group has tiles of its own.

    Args:
        k, n: shape of the weight.
        group_size: rows per group.
        whole: never cut inside a group.
        rows, columns: the size aimed at.

    Yields:
        The rows, the groups they belong to, how many rows of the tile each of these has, the columns.
    """
    aligned = k // group_size * group_size
    tall = max(rows, rows * columns // max(1, n))  # a tile of a narrow weight has more rows
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
    """Returns `tile [k, n]` of a stored weight in `scratch.dtype` and row order.

    The result is the tile itself if it is so already, otherwise a copy in `scratch`, which is flat and at least as
    large.
    """
    if tile.dtype == scratch.dtype and (tile.strides[1] == tile.itemsize or tile.size == 0):
        return tile
    out: Float = scratch[: tile.size].reshape(tile.shape)
    # From column order a few columns at a time are copied: more would push each other out of the cache.
    step = TRANSPOSED if abs(tile.strides[0]) < abs(tile.strides[1]) else tile.shape[1]
    for column in range(0, tile.shape[1], step):
        np.copyto(out[:, column : column + step], tile[:, column : column + step], casting="unsafe")
    return out


def scratch_of(weight: Float, group_size: int, *, whole: bool = False) -> Float:
    """Returns an empty flat array as large as the largest tile: float64 for a float64 weight, otherwise float32.

    Args:
        weight: [K, N].
        group_size: rows per group.
        whole: as for `tiles`.
    """
    k, n = weight.shape
    sizes = ((r.stop - r.start) * (c.stop - c.start) for r, _, _, c in tiles(k, n, group_size, whole=whole))
    return np.empty(max(sizes, default=0), np.float64 if weight.dtype == np.float64 else np.float32)


def grouped(tile: NDArray[Any], g: int) -> NDArray[Any]:
    """Returns a view [groups, g, n] of `tile [groups·g, n]`; splitting the first axis never copies."""
    return tile.reshape(tile.shape[0] // g, g, tile.shape[1])


def row(parameters: NDArray[Any], groups: slice, columns: slice) -> NDArray[Any]:
    """Returns a tile of `parameters [G, N]` as [groups, 1, n], which broadcasts over the rows of each group."""
    return parameters[groups, None, columns]


def grid_of(
    lo: Float, hi: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32
) -> tuple[F32, U8]:
    """Returns the scales and zero points of grids that span the ranges `lo <= 0 <= hi`.

    Args:
        lo, hi: bounds, arrays of one shape, which the results have too.
        spec: bits and scheme.
        full_range: symmetric only: the signed scale that uses code 0.
        scale_dtype: dtype that the model stores scales in; scales are rounded to it.

    Raises:
        FloatingPointError: a bound is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):
        spans = np.subtract(hi, lo, dtype=np.float64)  # may overflow float32
    if not np.isfinite(spans.max(initial=0)):  # not finite if either bound is not
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
    """Rounds scales to values of `dtype` that are never zero and never so large that `reach·s` overflows.

    The subnormal numbers of float16 are coarse. Where rounding down would cut half a step or more off a range of
    `steps`, the next larger scale is taken, which costs at most one step of resolution.

    Args:
        raw: scales of any sign; where one is 0, all weights of the group are, and 1 is returned.
        dtype: float16 or float32.
        reach: the largest |code − zero|.
        steps: steps of the range; 0 for as many as `reach`.

    Returns:
        The rounded scales, float32 and of the shape of `raw`.
    """
    info, size = np.finfo(np.dtype(dtype)), np.abs(raw)
    headroom = float(info.max) * (1 - float(info.eps))
    if size.min(initial=np.inf) >= info.tiny and size.max(initial=0) <= headroom / 255:
        return raw.astype(info.dtype).astype(np.float32, copy=False)  # ordinary scales need no care
    size = size.astype(np.float64)
    least = float(info.tiny if info.dtype == np.float32 else info.smallest_subnormal)
    stored = np.clip(size, least, headroom / reach).astype(info.dtype)
    cut = (size - stored.astype(np.float64)) * (steps or reach)
    short = (cut >= stored.astype(np.float64) / 2) & (size < float(info.tiny))
    stored = np.where(short, np.nextafter(stored, info.max, dtype=info.dtype), stored)
    signed = np.copysign(stored, raw).astype(np.float32)
    return np.where(size > 0, signed, np.float32(1))  # a group of zeros: any scale will do


def fit(weight: Float, spec: Spec, *, full_range: bool = False, scale_dtype: DTypeLike = np.float32) -> tuple[F32, U8]:
    """Fits a grid to the whole range of each group of `weight [K, N]`.

    Args:
        weight: any float dtype, in any memory order; read tile by tile.
        spec: bits, group size and scheme.
        full_range: symmetric only: the signed scale that uses code 0.
        scale_dtype: dtype that the model stores scales in; they are rounded to it here.

    Returns:
        Scales float32 [G, N] and zero points uint8 [G, N].

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    k, n = weight.shape
    g = spec.resolved_group(k)
    scratch = scratch_of(weight, g)
    lo, hi = (np.zeros((-(-k // g), n), scratch.dtype) for _ in range(2))  # the range always includes zero
    for rows, groups, size, columns in tiles(k, n, g):
        tile, at = grouped(widened(weight[rows, columns], scratch), size), (groups, columns)
        np.minimum(lo[at], tile.min(axis=1), out=lo[at])
        np.maximum(hi[at], tile.max(axis=1), out=hi[at])
    return grid_of(lo, hi, spec, full_range=full_range, scale_dtype=scale_dtype)


def encode(weight: Float, scales: F32, zeros: U8, bits: int, group_size: int) -> U8:
    """Returns the nearest code of every weight, `clip(round(w / s) + z, 0, 2^bits − 1)`, uint8 [K, N].

    Args:
        weight: [K, N], any float dtype, in any memory order.
        scales: [G, N].
        zeros: [G, N].
        bits: 1 to 8.
        group_size: rows per group.
    """
    k, n = weight.shape
    codes = np.empty((k, n), np.uint8)
    scratch = scratch_of(weight, group_size)
    for rows, groups, g, columns in tiles(k, n, group_size):
        tile = grouped(widened(weight[rows, columns], scratch), g)
        out = grouped(codes[rows, columns], g)
        _encode(tile, row(scales, groups, columns), row(zeros, groups, columns), 2**bits - 1, scratch, out)
    return codes


def project(weight: Float, scales: F32, zeros: U8, bits: int, group_size: int) -> Float:
    """Returns the level nearest to every weight, [K, N]: `encode` and decode in one, without storing codes.

    Args:
        weight: [K, N], any float dtype, in any memory order.
        scales: [G, N].
        zeros: [G, N].
        bits: 1 to 8.
        group_size: rows per group.
    """
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
    """Rounds `weight [K, N]` to nearest: `fit` and `encode` in one, which reads each tile only once.

    Args:
        weight: any float dtype, in any memory order.
        spec: bits, group size and scheme.
        full_range: symmetric only: the signed scale that uses code 0.
        scale_dtype: dtype that the model stores scales in.

    Returns:
        Codes uint8 [K, N], scales float32 [G, N] and zero points uint8 [G, N].

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
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
        # A level fits the narrow integers unless a scale had to be cut to the largest number of its dtype.
        if np.abs(hi, out=hi).max(initial=0) < 1.5 * top + 3:
            _encode_narrow(tile, *parameters, top, scratch, whole_numbers, out)
        else:
            _encode(tile, *parameters, top, scratch, out)
    return codes, scales, zeros


def _encode(tile: Float, scales: F32, zeros: U8, top: int, scratch: Float, codes: U8) -> None:
    """Writes the codes of `tile [groups, g, n]` into `codes`; the tile itself may lie in `scratch`."""
    level = scratch[: tile.size].reshape(tile.shape)
    with np.errstate(over="ignore"):  # a quotient that overflows float32 is clipped like any other
        np.divide(tile, scales, out=level)
    np.rint(level, out=level)
    level += zeros.astype(level.dtype)
    np.clip(level, 0, top, out=level)
    codes[...] = level


def _encode_narrow(
    tile: Float, scales: F32, zeros: U8, top: int, scratch: Float, whole_numbers: NDArray[Any], codes: U8
) -> None:
    """Writes codes like `_encode`, for levels that fit the dtype of `whole_numbers`, where clipping is fast."""
    level = scratch[: tile.size].reshape(tile.shape)
    whole = whole_numbers[: tile.size].reshape(tile.shape)
    np.divide(tile, scales, out=level)
    np.rint(level, out=level)
    np.copyto(whole, level, casting="unsafe")
    whole += zeros.astype(whole.dtype)
    np.clip(whole, 0, top, out=whole)
    np.copyto(codes, whole, casting="unsafe")


def quantize(weight: F32, scales: F32, zeros: U8, spec: Spec, *, input_scale: F32 | None = None) -> QuantizedTensor:
    """Rounds `weight [K, N]` to the nearest level of a given grid.

    Args:
        weight: already multiplied by `input_scale`, if there is one.
        scales: [G, N].
        zeros: [G, N].
        spec: the format that the grid was fitted for.
        input_scale: [K], stored in the result.
    """
    g = spec.resolved_group(len(weight))
    codes = encode(weight, scales, zeros, spec.bits, g)
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, input_scale)
