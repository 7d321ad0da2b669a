"""The search for an input scale, which AWQ, TEQ and GPTQ share.

For s [K] > 0, `x @ W = (x / s) @ (diag(s) @ W)`. Rounding the scaled weight leaves the error
`ΔW = Q(diag(s)·W) / s − W`, which is small in rows where s is large. The loss of a scale is the squared error of the
outputs over all calibration tokens, `Σ ΔW ∘ (H·ΔW)`, with the Gram matrix H of the inputs. AWQ searches s along one
exponent r (Lin et al. 2023, "AWQ", equation 5, with the size of the weights as a second factor):

    s = max(mean|x|^r / w^(1−r), 1e-4),    w = mean over output channels of |W| / (largest |W| of its group),

divided by sqrt(max s · min s). No scale at all is a candidate too.

If a weight has many output channels, an evenly spread sample of them chooses: every exponent is scored on a small
sample, the best few on a larger one. The winner is then measured on all output channels and dropped where it is no
better than no scale: on the calibration data the result is never worse than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import (
    TILE_COLUMNS,
    TILE_ROWS,
    QuantizedTensor,
    encode,
    fit,
    project,
    scratch_of,
    tiles,
    widened,
)
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import ERROR_ROWS, Stats, column_errors

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

Grid = tuple[F32, U8]
"""Scales and zero points of some columns, [G, n] each."""

FitGrid = Callable[[F32, NDArray[Any], "Grid | None"], Grid]
"""`(tile [K, n], row weights [K], the grid of the fitter before this one, if any) -> (scales, zeros)`."""

ErrorsOf = Callable[[F32, F32], NDArray[np.float64]]
"""`(delta [K, n], gram [K, K]) -> squared output error of each column [n]`."""

RATIOS = tuple(i / 20 for i in range(21))
SCREEN = 128  # output channels that every exponent is scored on
SAMPLE = 512  # output channels that choose between the best few exponents, and between scaling and not
HEAVY = 64  # inputs whose errors are taken to be correlated while screening
FINALISTS = 4  # exponents scored on SAMPLE: the loss is within 1 % of that of scoring everything on all channels
LEAST, LARGEST = 1e-4, 1e4  # of a scale; float16 holds both, and their inverses
TILE = 512  # output channels scored at a time


def grid_fitters(spec: Spec, mse_range: Sequence[float] | None = None, **kinds: Any) -> list[FitGrid]:
    """Returns the fitter of the plain grid and, if there is a `mse_range` of shrink factors, that of clipped ranges.

    Args:
        spec: bits, group size and scheme.
        mse_range: shrink factors (start, stop, step) of a clip search; None for no search.
        kinds: `full_range` and `scale_dtype` of `core.grids.integer.fit`.
    """

    def plain(tile: F32, _: NDArray[Any], __: Grid | None) -> Grid:
        return fit(tile, spec, **kinds)

    if mse_range is None:
        return [plain]

    def clipped(tile: F32, row_weights: NDArray[Any], before: Grid | None) -> Grid:
        return search(tile, spec, mse_range, row_weights=row_weights, plain=before, **kinds)

    return [plain, clipped]


def quantize_scaled_or_plain(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[FitGrid], parallel_map: ParallelMap
) -> QuantizedTensor:
    """Quantizes `weight [K, N]` with its rows scaled, or without where scaling loses no less than rounding to nearest.

    Args:
        weight: any float dtype, in either memory order.
        scale: s [K], None for no scale.
        gram: [K, K] of the inputs.
        spec: bits, group size and scheme.
        grids: the plain fitter first.
        parallel_map: maps a function over tiles of columns.
    """
    if scale is not None:
        scaled, loss = quantize_scaled(weight, scale, gram, spec, grids, parallel_map)
        if loss < scaled_loss(weight, None, gram, spec, grids[:1], parallel_map=parallel_map):
            return scaled
    return quantize_scaled(weight, None, gram, spec, grids, parallel_map)[0]


def search_scale(
    weight: NDArray[Any],
    stats: Stats,
    spec: Spec,
    grids: Sequence[FitGrid],
    scale_dtype: DTypeLike,
    parallel_map: ParallelMap,
) -> F32 | None:
    """Returns the scale s [K] of least loss on a sample of output channels, None where no scale is best.

    Args:
        weight: [K, N], any float dtype, in either memory order.
        stats: statistics of the inputs.
        spec: bits, group size and scheme.
        grids: fitters that candidates are scored with.
        scale_dtype: dtype that s is rounded to.
        parallel_map: maps a function over candidates.
    """
    sample, gram = sample_columns(weight, SAMPLE), stats.gram
    few = sample_columns(weight, min(SCREEN, SAMPLE))
    scales = list(candidate_scales(stats.abs_mean, weight_share(weight, spec), scale_dtype))
    if few.shape != sample.shape:
        screened = list(
            parallel_map(lambda scale: scaled_loss(few, scale, gram, spec, grids, _estimated_errors), scales)
        )
        scales = [scales[i] for i in np.argsort(screened, kind="stable")[:FINALISTS]]
    if not scales:
        return None
    tried = [None, *scales]  # no scale comes first and so wins a tie
    return tried[int(np.argmin(list(parallel_map(lambda scale: scaled_loss(sample, scale, gram, spec, grids), tried))))]


def _estimated_errors(delta: F32, gram: F32) -> NDArray[np.float64]:
    """Estimates `column_errors`: only inputs with the largest diagonal entries are taken to be correlated.

    Rounding errors of different rows are nearly independent, so products of them cancel in the sum. Single products
    still matter only between a few channels of massive size.
    """
    diagonal = gram.diagonal()
    heavy = np.argsort(-diagonal, kind="stable")[:HEAVY]
    between = gram[np.ix_(heavy, heavy)]
    np.fill_diagonal(between, 0)
    part = delta[heavy]
    return (diagonal @ np.square(delta)).astype(np.float64) + np.einsum("kn,kn->n", part, between @ part)


def sample_columns(weight: NDArray[Any], most: int) -> F32:
    """Returns at most `most` columns of `weight`, evenly spread, float32."""
    return np.array(weight[:, :: -(-weight.shape[1] // most)], np.float32, order="C")


def candidate_scales(
    abs_mean: NDArray[np.float64], share: NDArray[np.float64], scale_dtype: DTypeLike
) -> Iterator[F32]:
    """Yields one scale s [K] for each exponent; nothing if all inputs or all weights are zero.

    Mean |x| is divided by its own mean. That cancels in s, but gives the floor of 1e-4 the same meaning for inputs of
    any size. Inputs that were always zero, and rows of zero weights, count like the smallest others.

    Args:
        abs_mean: [K], mean |x| of each input.
        share: [K], of `weight_share`.
        scale_dtype: dtype that s is rounded to.
    """
    if not abs_mean.any() or not share.any():
        return
    x, w = (np.maximum(v, v[v > 0].min()) for v in (abs_mean / abs_mean.mean(), share))
    for ratio in RATIOS:
        s = np.maximum(x**ratio / w ** (1 - ratio), LEAST)
        s = np.clip(s / np.sqrt(s.max() * s.min()), LEAST, LARGEST)
        yield s.astype(scale_dtype).astype(np.float32)


def weight_share(weight: NDArray[Any], spec: Spec) -> NDArray[np.float64]:
    """Returns the share [K] of each row of `weight [K, N]`: mean of |W| / (largest |W| of its group) over columns."""
    k, n = weight.shape
    share = np.zeros(k)
    scratch = scratch_of(weight, spec.resolved_group(k), whole=True)
    for rows, groups, g, columns in tiles(k, n, spec.resolved_group(k), whole=True):
        size = np.abs(widened(weight[rows, columns], scratch)).reshape(groups.stop - groups.start, g, -1)
        largest = size.max(axis=1, keepdims=True)
        share[rows] += np.divide(size, largest, out=size, where=largest > 0).sum(axis=2, dtype=np.float64).ravel()
    return share / n


def quantize_scaled(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[FitGrid], parallel_map: ParallelMap
) -> tuple[QuantizedTensor, float]:
    """Rounds `diag(scale) @ weight` on the better of `grids` in each output channel; returns that and its loss."""
    k, n = weight.shape
    g = spec.resolved_group(k)
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)

    def finish(columns: slice) -> float:
        tile, grid, loss = _score_tile(weight[:, columns], scale, gram, spec, grids, column_errors)
        scales[:, columns], zeros[:, columns] = grid
        codes[:, columns] = encode(tile, *grid, spec.bits, g)
        return loss

    loss = sum(parallel_map(finish, _column_tiles(n)))
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, scale), loss


def scaled_loss(
    weight: NDArray[Any],
    scale: F32 | None,
    gram: F32,
    spec: Spec,
    grids: Sequence[FitGrid],
    errors_of: ErrorsOf = column_errors,
    parallel_map: ParallelMap = map,
) -> float:
    """Returns the loss of `weight [K, n]` scaled by `scale [K]`, each column rounded on the better of `grids`."""
    tiles = (weight[:, columns] for columns in _column_tiles(weight.shape[1]))
    return sum(parallel_map(lambda tile: _score_tile(tile, scale, gram, spec, grids, errors_of)[2], tiles))


def _column_tiles(n: int) -> list[slice]:
    """Cuts n output channels into tiles of `TILE`."""
    return [slice(c, min(c + TILE, n)) for c in range(0, n, TILE)]


def _score_tile(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[FitGrid], errors_of: ErrorsOf
) -> tuple[F32, Grid, float]:
    """Scores some columns [K, n]: returns them scaled, the better grid of each column and the loss."""
    original = np.ascontiguousarray(weight, np.float32)
    tile = original if scale is None else original * scale[:, None]
    row_weights = gram.diagonal() if scale is None else gram.diagonal() / scale**2
    best: Grid | None = None
    least = np.full(tile.shape[1], np.inf)
    for fit_grid in grids:
        grid = fit_grid(tile, row_weights, best)
        delta = project(tile, *grid, spec.bits, spec.resolved_group(len(tile)))
        if scale is not None:
            delta /= scale[:, None]
        delta -= original
        errors = errors_of(delta, gram)
        if best is None:
            best, least = grid, errors
            continue
        better = errors < least
        best = np.where(better, grid[0], best[0]), np.where(better, grid[1], best[1])
        least = np.where(better, errors, least)
    assert best is not None  # noqa: S101
    return tile, best, float(least.sum())


def working_bytes(k: int, n: int, spec: Spec) -> int:
    """Estimates the bytes that searching a scale and quantizing with it hold at once.

    Not counted are the weight [k, n], its statistics and the result.
    """
    sample, few = (-(-n // -(-n // most)) for most in (SAMPLE, SCREEN))
    width = min(TILE, n)
    while_choosing = k * (sample + few + len(RATIOS)) + 2 * k * min(TILE, sample)
    while_solving = 3 * k * width
    step = max(ERROR_ROWS, -(-k // 8))
    products = max(step * (k + width), 2 * min(TILE_ROWS * TILE_COLUMNS, k * width))
    share = 3 * min(TILE_ROWS * TILE_COLUMNS, k * n)
    grids = 6 * -(-k // spec.resolved_group(k)) * width
    return 4 * (max(while_choosing + products, while_solving + products, share) + grids)
