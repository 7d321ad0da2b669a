"""AWQ: scale the input channels that matter up before rounding, and the input down by as much.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023), section 3.2 and
equation 5. For s [K] > 0, `x @ W = (x / s) @ (diag(s) @ W)`: rounding the scaled weight leaves the error
`ΔW = Q(diag(s)·W) / s − W`, small in rows where s is large. The search is over one exponent r,

    s = max(mean|x|^r / w^(1−r), 1e-4),    w = mean over output channels of |W| / (largest |W| of its group),

divided by sqrt(max s · min s), with the loss `Σ ΔW ∘ (H·ΔW)`, H the Gram matrix of the inputs: the exact squared error
of the output over all calibration tokens. All weights that read an input are solved side by side and share one s.

No scale at all is a candidate too, and a clipped range is kept in an output channel only where it lowers that loss.

Of a weight with many output channels an evenly spread sample chooses: every exponent is scored on a small one, the
best few on a larger one. The winner is then measured on all output channels beside rounding to nearest, and dropped
where it is not better: on the calibration data the result is never worse than rounding to nearest.
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
GridOf = Callable[[F32, NDArray[Any], "Grid | None"], Grid]
"""`(tile [K, n], row weights [K], the plain grid if this is another) -> (scales, zeros)`."""

ErrorsOf = Callable[[F32, F32], NDArray[np.float64]]

RATIOS = tuple(i / 20 for i in range(21))
SCREEN = 128  # output channels that every exponent is scored on
SAMPLE = 512  # output channels that choose between the best few of them, and between scaling and not
HEAVY = 64  # inputs whose errors are not taken to be independent while screening
FINALISTS = 4  # with these the loss is within 1 % of that of scoring everything on everything
LEAST, LARGEST = 1e-4, 1e4  # of a scale; float16 holds both, and their inverses
TILE = 512  # output channels scored at a time


def solve(
    weight: NDArray[Any],
    stats: Stats | None,
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
    enable_auto_scale: bool = True,
    enable_mse_search: bool = True,
    mse_range: Sequence[float] = (0.91, 1.0, 0.01),
    folding: bool = False,  # noqa: ARG001 (acted on where the graph is known)
    enable_full_range: bool = False,
) -> QuantizedTensor:
    """Quantizes `weight [K, N]` after scaling its rows; the result's `input_scale` is s, or None where none helps.

    Args:
        weight: any float dtype, in either memory order, mapped from a file or not: read some columns at a time.
        stats: of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: what the model stores scales in; s is rounded to it as well.
        each: how to go through candidates, and through tiles of columns.
        enable_auto_scale: search for s.
        enable_mse_search: shrink each group's range to where its error, rows weighted by the diagonal of the scaled
            input's Gram matrix, is least; kept in the output channels where it lowers the loss.
        mse_range: the shrink factors tried (start, stop, step).
        folding: whether the pipeline must place 1/s inside an existing operation or do without; not used here.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.

    Raises:
        ValueError: no statistics, or of another number of inputs than `weight` has rows.
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("awq needs the statistics of the weight's inputs, as many of them as it has rows")
    kinds: dict[str, Any] = {"full_range": enable_full_range, "scale_dtype": scale_dtype}
    grids = grids_of(spec, mse_range if enable_mse_search else None, **kinds)
    scale = best_scale(weight, stats, spec, grids[:1], scale_dtype, parallel_map) if enable_auto_scale else None
    return scaled_where_better(weight, scale, stats.gram, spec, grids, parallel_map)


def grids_of(spec: Spec, mse_range: Sequence[float] | None = None, **kinds: Any) -> list[GridOf]:
    """The plain grid, and that of clipped ranges if there are factors to try."""

    def plain(tile: F32, _: NDArray[Any], __: Grid | None) -> Grid:
        return fit(tile, spec, **kinds)

    if mse_range is None:
        return [plain]

    def clipped(tile: F32, row_weights: NDArray[Any], before: Grid | None) -> Grid:
        return search(tile, spec, mse_range, row_weights=row_weights, plain=before, **kinds)

    return [plain, clipped]


def scaled_where_better(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[GridOf], parallel_map: ParallelMap
) -> QuantizedTensor:
    """`weight [K, N]` with its rows scaled, or not where that loses no more on the plain grid, the first of `grids`."""
    if scale is not None:
        scaled, loss = quantize_scaled(weight, scale, gram, spec, grids, parallel_map)
        if loss < loss_of(weight, None, gram, spec, grids[:1], parallel_map=parallel_map):
            return scaled
    return quantize_scaled(weight, None, gram, spec, grids, parallel_map)[0]


def best_scale(
    weight: NDArray[Any],
    stats: Stats,
    spec: Spec,
    grids: Sequence[GridOf],
    scale_dtype: DTypeLike,
    parallel_map: ParallelMap,
) -> F32 | None:
    """The s [K] of least loss on a sample of output channels, None when that is no scale at all."""
    sample, gram = spread(weight, SAMPLE), stats.gram
    few = spread(weight, min(SCREEN, SAMPLE))
    scales = list(candidates(stats.abs_mean, weight_share(weight, spec), scale_dtype))
    if few.shape != sample.shape:
        screened = list(parallel_map(lambda scale: loss_of(few, scale, gram, spec, grids, _estimated_errors), scales))
        scales = [scales[i] for i in np.argsort(screened, kind="stable")[:FINALISTS]]
    if not scales:
        return None
    tried = [None, *scales]  # no scale wins a tie
    return tried[int(np.argmin(list(parallel_map(lambda scale: loss_of(sample, scale, gram, spec, grids), tried))))]


def _estimated_errors(delta: F32, gram: F32) -> NDArray[np.float64]:
    """`column_errors` with only the inputs of the largest diagonal entries taken to be correlated.

    Rounding errors of different rows are as good as independent; where single terms of the sum still matter is among
    a few massive channels.
    """
    diagonal = gram.diagonal()
    heavy = np.argsort(-diagonal, kind="stable")[:HEAVY]
    between = gram[np.ix_(heavy, heavy)]
    np.fill_diagonal(between, 0)
    part = delta[heavy]
    return (diagonal @ np.square(delta)).astype(np.float64) + np.einsum("kn,kn->n", part, between @ part)


def spread(weight: NDArray[Any], most: int) -> F32:
    """At most `most` columns of `weight`, evenly spread, float32."""
    return np.array(weight[:, :: -(-weight.shape[1] // most)], np.float32, order="C")


def candidates(abs_mean: NDArray[np.float64], share: NDArray[np.float64], scale_dtype: DTypeLike) -> Iterator[F32]:
    """The scales s [K], one for each exponent, from mean |x| [K] and `weight_share` [K].

    Mean |x| is taken relative to its own mean, which cancels in s but makes the floor of 1e-4 mean the same for inputs
    of any size. Inputs that were always zero, and rows of zero weights, count like the smallest others.
    """
    if not abs_mean.any() or not share.any():
        return
    x, w = (np.maximum(v, v[v > 0].min()) for v in (abs_mean / abs_mean.mean(), share))
    for ratio in RATIOS:
        s = np.maximum(x**ratio / w ** (1 - ratio), LEAST)
        s = np.clip(s / np.sqrt(s.max() * s.min()), LEAST, LARGEST)
        yield s.astype(scale_dtype).astype(np.float32)


def weight_share(weight: NDArray[Any], spec: Spec) -> NDArray[np.float64]:
    """How large each row's weights are, on average over output channels, beside the largest of their group, [K]."""
    k, n = weight.shape
    share = np.zeros(k)
    scratch = scratch_of(weight, spec.resolved_group(k), whole=True)
    for rows, groups, g, columns in tiles(k, n, spec.resolved_group(k), whole=True):
        size = np.abs(widened(weight[rows, columns], scratch)).reshape(groups.stop - groups.start, g, -1)
        largest = size.max(axis=1, keepdims=True)
        share[rows] += np.divide(size, largest, out=size, where=largest > 0).sum(axis=2, dtype=np.float64).ravel()
    return share / n


def quantize_scaled(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[GridOf], parallel_map: ParallelMap
) -> tuple[QuantizedTensor, float]:
    """`diag(scale) @ weight` rounded on the better of `grids` in each output channel, and the loss of that."""
    k, n = weight.shape
    g = spec.resolved_group(k)
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)

    def finish(columns: slice) -> float:
        tile, grid, loss = _scored(weight[:, columns], scale, gram, spec, grids, column_errors)
        scales[:, columns], zeros[:, columns] = grid
        codes[:, columns] = encode(tile, *grid, spec.bits, g)
        return loss

    loss = sum(parallel_map(finish, _tiles(n)))
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, scale), loss


def loss_of(
    weight: NDArray[Any],
    scale: F32 | None,
    gram: F32,
    spec: Spec,
    grids: Sequence[GridOf],
    errors_of: ErrorsOf = column_errors,
    parallel_map: ParallelMap = map,
) -> float:
    """The loss of `weight` [K, n] scaled by `scale` [K], each column rounded on the better of `grids`."""
    tiles = (weight[:, columns] for columns in _tiles(weight.shape[1]))
    return sum(parallel_map(lambda tile: _scored(tile, scale, gram, spec, grids, errors_of)[2], tiles))


def _tiles(n: int) -> list[slice]:
    return [slice(c, min(c + TILE, n)) for c in range(0, n, TILE)]


def _scored(
    weight: NDArray[Any], scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[GridOf], errors_of: ErrorsOf
) -> tuple[F32, Grid, float]:
    """For a tile of columns: what is to be rounded, the better grid of each column, and the loss."""
    original = np.ascontiguousarray(weight, np.float32)
    tile = original if scale is None else original * scale[:, None]
    row_weights = gram.diagonal() if scale is None else gram.diagonal() / scale**2
    best: Grid | None = None
    least = np.full(tile.shape[1], np.inf)
    for grid_of in grids:
        grid = grid_of(tile, row_weights, best)
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


def working_bytes(k: int, n: int, spec: Spec, **_: Any) -> int:
    """About the most that `solve` holds at once beyond the weight [k, n], its statistics and the result."""
    sample, few = (-(-n // -(-n // most)) for most in (SAMPLE, SCREEN))
    width = min(TILE, n)
    while_choosing = k * (sample + few + len(RATIOS)) + 2 * k * min(TILE, sample)
    while_solving = 3 * k * width
    step = max(ERROR_ROWS, -(-k // 8))
    products = max(step * (k + width), 2 * min(TILE_ROWS * TILE_COLUMNS, k * width))
    share = 3 * min(TILE_ROWS * TILE_COLUMNS, k * n)
    grids = 6 * -(-k // spec.resolved_group(k)) * width
    return 4 * (max(while_choosing + products, while_solving + products, share) + grids)
