"""HQQ: finds the zero point of each group that leaves sparse errors. It needs no data.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Let w be the weights of a group, s
its scale, z its zero point and q the codes. With s fixed, the problem `min_z φ(w − s·(q − z))`, φ = |·|^p with p < 1,
is split by an error W_e ≈ w − s·(q − z) and solved in turns (equations 5 to 7):

    W_e = shrink(w − s·(q − z), β),  shrink(x, β) = sign(x)·max(|x| − |x|^(p−1) / β, 0)
    z = mean over the group of q − (w − W_e) / s,  β = κ·β

Each group stops when its mean error |w − ŵ| no longer falls. The best z is kept, not the last.

The paper stores z as a float. No fast kernel reads one, so here z is rounded, the codes are computed anew and the scale
is fitted by least squares. A group keeps its plain grid where that is closer to its weights. Rounding z loses most of
what the method gains. Squared errors on the demo model's weights relative to rounding to nearest, 4 bits in groups of
32: float z .88, rounded z .96, a clip search .92. With 2 bits: .88, .78 (thanks to the fitted scale), .67.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.integer import (
    TILE_COLUMNS,
    TILE_ROWS,
    Float,
    QuantizedTensor,
    encode,
    fit,
    grouped,
    scratch_of,
    storable,
    tiles,
    widened,
)
from onnx_woq.core.grids.scale_range import large_unit
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats

PIECE = 1 << 22  # weights in one piece of the work


def solve(
    weight: NDArray[Any],
    stats: Stats | None,  # noqa: ARG001 (every method is called alike)
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    enable_full_range: bool = False,
) -> QuantizedTensor:
    """Rounds `weight [K, N]` to grids whose zero points HQQ chooses.

    Symmetric grids have a fixed zero point; only their scales are fitted.

    Args:
        weight: any float dtype, in either memory order, possibly mapped from a file; read tile by tile.
        stats: not used.
        spec: bits, group size and scheme.
        scale_dtype: dtype that the model stores scales in.
        parallel_map: maps a function over pieces of columns.
        norm: p, the exponent of the error; below 1 it favours sparse errors.
        beta: β at the start, how strongly errors are pulled to W_e.
        kappa: κ, the factor by which β grows in each iteration.
        iterations: iterations at most.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    k, n = weight.shape
    g, top = spec.resolved_group(k), 2**spec.bits - 1
    scales, zeros = fit(weight, spec, full_range=enable_full_range, scale_dtype=scale_dtype)
    codes = np.empty((k, n), np.uint8)

    def put(columns: slice) -> None:
        part = weight[:, columns]
        scratch = scratch_of(part, g, whole=True)
        for rows, groups, size, inside in tiles(k, part.shape[1], g, whole=True):
            at = (groups, slice(columns.start + inside.start, columns.start + inside.stop))
            w = grouped(np.array(widened(part[rows, inside], scratch)), size)
            w = w.astype(np.float64) if large_unit(float(np.abs(w).max(initial=0))) else w
            s, z = scales[at].astype(w.dtype), zeros[at].astype(w.dtype)
            wanted = z if spec.symmetric else np.rint(zero_point(w, s, z, top, norm, beta, kappa, iterations))
            found, moved = _fitted(w, s, np.clip(wanted, 0, top), top, scale_dtype)
            better = _error(w, found, moved, top) < _error(w, s, z, top)
            np.copyto(scales[at], found, where=better)
            np.copyto(zeros[at], moved, where=better, casting="unsafe")
        codes[:, columns] = encode(part, scales[:, columns], zeros[:, columns], spec.bits, g)

    width = max(1, PIECE // max(1, k))
    for _ in parallel_map(put, [slice(c, min(c + width, n)) for c in range(0, n, width)]):
        pass
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric)


def zero_point(
    w: Float,
    s: Float,
    z: Float,
    top: int,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> Float:
    """Returns the best float zero points [groups, n] that the iteration meets, the given ones among them.

    Args:
        w: weights of whole groups, [groups, g, n].
        s: scales [groups, n].
        z: zero points to start from, [groups, n].
        top: the largest code.
        norm: p, the exponent of the error.
        beta: β at the start.
        kappa: κ, the growth of β.
        iterations: iterations at most.
    """
    scale, best = s[:, None], z.copy()
    least = np.full(z.shape, np.inf, w.dtype)
    running = np.ones(z.shape, bool)
    for _ in range(iterations):
        codes = np.clip(np.rint(w / scale + z[:, None]), 0, top)
        error = w - (codes - z[:, None]) * scale
        size = np.abs(error)
        mean = size.mean(axis=1)
        running &= mean < least
        if not running.any():
            break
        least, best = np.where(running, mean, least), np.where(running, z, best)
        with np.errstate(divide="ignore", over="ignore"):  # an error of zero stays zero
            shrunk = np.sign(error) * np.maximum(size - size ** (norm - 1) / beta, 0)
        z = np.where(running, (codes - (w - shrunk) / scale).mean(axis=1), z)
        beta *= kappa
    return best


def _fitted(w: Float, s: Float, z: Float, top: int, scale_dtype: DTypeLike) -> tuple[Float, Float]:
    """Returns the least-squares scale for the levels that z leads to, as stored, and z; [groups, n] each."""
    level = np.clip(np.rint(w / s[:, None] + z[:, None]), 0, top) - z[:, None]
    square = np.square(level).sum(axis=1)
    scale = np.divide((level * w).sum(axis=1), square, out=s.copy(), where=square > 0)
    return storable(np.where(scale == 0, s, scale), scale_dtype, np.maximum(z, top - z)).astype(w.dtype), z


def _error(w: Float, s: Float, z: Float, top: int) -> Float:
    """Returns the squared error of rounding each group to nearest, [groups, n]."""
    codes = np.clip(np.rint(w / s[:, None] + z[:, None]), 0, top)
    out: Float = np.square(w - (codes - z[:, None]) * s[:, None], dtype=np.float64).sum(axis=1)
    return out


def working_bytes(k: int, n: int, spec: Spec, **_: Any) -> int:
    """Estimates the bytes that `solve` holds at once beyond the weight [k, n] and the result."""
    tile = max(TILE_ROWS * TILE_COLUMNS, min(spec.resolved_group(k), k) * 64)
    return 32 * min(tile, k * n)
