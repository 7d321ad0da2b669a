"""GPTQ: quantize one input channel after another; the later ones make up for the errors of those before them.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), Algorithm 1.
With U the upper Cholesky factor of `H̃⁻¹ = Uᵀ·U`, `H̃ = H + damp·mean(diag H)·I`, row i of W [K, N] is rounded to ŵ_i and

    W[j] −= U_ij / U_ii · e_i,    e_i = w_i − ŵ_i    for every later row j.

The paper applies this lazily, to a block of rows at a time. Here a block first gathers the feedback of every finished
row in one matrix product and is then solved in halves, the second after gathering the errors of the first: blocking
decides which products are done together, never what is added to a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.clip_search import fitter
from onnx_woq.core.grids.integer import TILE_COLUMNS, TILE_ROWS, QuantizedTensor, quantize
from onnx_woq.core.lapack import cholesky, invert_lower
from onnx_woq.core.refine import descent
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)

Float = NDArray[np.floating[Any]]
GridOf = Callable[..., "tuple[NDArray[np.float32], NDArray[np.uint8]]"]

SCALINGS = ("none", "awq", "teq")
LEAF = 16  # rows solved one by one before a matrix product pays
TILE_BYTES = 32 << 20  # of working weights: columns are independent, so wide weights are solved a tile at a time
EXACT_PRODUCTS = 1 << 28  # K²N up to which float64 costs nothing anyone would notice
FACTOR_EXACTLY = 2048  # inputs up to which the factorization is in float64
COPIED = 256  # rows of the Gram matrix at a time
DAMP_RAISES = 4  # tenfold each


def solve(
    weight: NDArray[Any],
    stats: Stats | None,
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
    actorder: bool = False,
    percdamp: float = 0.01,
    block_size: int = 128,
    static_groups: bool = False,
    group_order: bool = False,
    enable_mse_search: bool = False,
    mse_range: Sequence[float] = (0.805, 1.0, 0.005),
    enable_full_range: bool = False,
    descent_passes: int = 0,
    scaling: str = "none",
    folding: bool = False,  # noqa: ARG001 (acted on where the graph is known)
) -> QuantizedTensor:
    """Quantizes `weight [K, N]` for the inputs whose Gram matrix `stats.gram [K, K]` holds.

    Inputs that are zero on all calibration data get zero weights, as in the paper's code: they say nothing about
    what their weights should be, and would widen their groups' ranges.

    Args:
        weight: any float dtype, in either memory order, mapped from a file or not: read some columns at a time.
        stats: of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: what the model stores scales in.
        each: how to go through tiles of columns.
        actorder: take rows by falling diagonal of the Gram matrix, the ones that matter most first. Groups stay
            runs of consecutive rows of `weight`, so with groups the grids are fixed beforehand (static groups).
        percdamp: what is added to the diagonal, as a share of its mean.
        block_size: rows whose feedback is gathered in one matrix product; changes speed, not the result (float32
            rounding apart, in weights too large to be solved in float64).
        static_groups: fit every group's grid to the original weights rather than, when its turn comes, to the
            rows as errors of earlier ones have changed them.
        group_order: take groups, and the rows inside each, by falling diagonal of the Gram matrix: the rows that
            matter most come early, and unlike under `actorder` every grid is still fitted to the updated rows
            (group-aware order: Gafni et al., "Dual Precision Quantization" (2025), section 3.3).
        enable_mse_search: shrink each group's range to where its share `Σ e_i² / U_ii²` of the loss is least (over
            all rows that sum is the loss: a weighting by the diagonal of the Gram matrix measures worse).
        mse_range: the shrink factors tried (start, stop, step).
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.
        descent_passes: passes of coordinate descent and scale refit over the result (`core.descent`).
        scaling: first scale the rows, and divide the input, as "awq" or "teq" would; "none" leaves them.
        folding: whether the pipeline must place the division inside an existing operation or do without; not used here.

    Raises:
        ValueError: no statistics, or of another number of inputs than `weight` has rows; two orders at once.
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if actorder and group_order:
        raise ValueError("actorder and group_order are two orders of the rows: choose one")
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("gptq needs the statistics of the weight's inputs, as many of them as it has rows")
    k, n = weight.shape
    scale = _input_scale(scaling, weight, stats, spec, enable_full_range, scale_dtype, parallel_map)
    if scale is not None:
        weight, stats = np.asarray(weight, np.float32) * scale[:, None], stats.scaled(1 / scale)
    grid = fitter(spec, mse_range if enable_mse_search else None, full_range=enable_full_range, scale_dtype=scale_dtype)
    diagonal = stats.gram.diagonal()
    g = spec.resolved_group(k)
    order = row_order(diagonal, g if group_order else k if actorder else 1)
    gram = stats.gram
    factors = (
        stats.kept("gptq factors", (percdamp, order.tobytes()), lambda: factorize(gram, percdamp, order))
        if diagonal.any()
        else None
    )
    if factors is None:
        reason = "no damping makes the Gram matrix positive definite" if diagonal.any() else "no input was ever nonzero"
        logger.warning("gptq, weight of %d rows: %s; rounding to nearest", k, reason)
        return replace(quantize(weight, *grid(weight, diagonal), spec), input_scale=scale)

    static = g < k and (static_groups or actorder)
    factors = factors[0].astype(sweep_dtype(k, n), copy=False), factors[1]  # of two precisions one will do
    q = _swept(
        weight,
        factors,
        order,
        grid,
        spec,
        static=static,
        dead=diagonal == 0,
        block_size=block_size,
        parallel_map=parallel_map,
    )
    del factors  # descent takes as much
    return descent.descend(
        weight, replace(q, input_scale=scale), stats.gram, descent_passes,
        damp=percdamp, tiles=column_tiles(k, n), dtype=sweep_dtype(k, n), scale_dtype=scale_dtype, parallel_map=parallel_map,
    )  # fmt: skip


def _swept(
    weight: NDArray[Any],
    factors: tuple[Float, NDArray[np.float32]],
    order: NDArray[np.intp],
    grid: GridOf,
    spec: Spec,
    *,
    static: bool,
    dead: NDArray[np.bool_],
    block_size: int,
    parallel_map: ParallelMap,
) -> QuantizedTensor:
    """All rows in `order [K]`, with what `factorize` gave for it; where `static`, grids are fixed beforehand."""
    k, n = weight.shape
    g = spec.resolved_group(k)
    group_of = order // g if static else np.arange(k) // g  # of the sweep, which counts groups as it meets them
    place_of = slice(None) if static else order[::g] // g  # the group of the weight that is met first, second, …
    ordered = not np.array_equal(order, np.arange(k))
    feedback, importance = factors
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)

    def finish(columns: slice) -> None:
        work = np.array(weight[:, columns], feedback.dtype, order="C")
        if not (np.isfinite(work.min()) and np.isfinite(work.max())):
            raise FloatingPointError("cannot fit a grid to weights that are NaN or infinite")
        work[dead] = 0
        fixed = grid(work, importance[np.argsort(order)]) if static else None
        if ordered:
            work = work[order]
        sweep = _Sweep(work, feedback, group_of, spec)
        if fixed is not None:
            sweep.set_grid(slice(None), fixed)
            sweep.run(block_size, group_size=1)
        else:
            sweep.run(-(-block_size // g) * g, group_size=g, grid=grid, importance=importance)
        scales[place_of, columns], zeros[place_of, columns] = sweep.scales, sweep.zeros
        for rows in (slice(r, r + COPIED) for r in range(0, k, COPIED)):
            codes[order[rows], columns] = sweep.work[rows] + sweep.zeros[group_of[rows]]

    for _ in parallel_map(finish, column_tiles(k, n)):
        pass
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric)


def _input_scale(
    scaling: str,
    weight: Any,
    stats: Stats,
    spec: Spec,
    full_range: bool,
    scale_dtype: DTypeLike,
    parallel_map: ParallelMap,
) -> NDArray[np.float32] | None:
    """The scale [K] of the rows that AWQ or TEQ would choose for rounding to nearest, None for none."""
    from onnx_woq.core.methods import awq, teq

    kinds: dict[str, Any] = {"full_range": full_range, "scale_dtype": scale_dtype}
    if scaling == "none":
        return None
    if scaling == "teq":
        return teq.trained_scale(weight, stats, spec, parallel_map=parallel_map, **kinds)
    return awq.best_scale(weight, stats, spec, awq.grids_of(spec, **kinds), scale_dtype, parallel_map)


def row_order(diagonal: NDArray[Any], group: int) -> NDArray[np.intp]:
    """The rows in solving order [K]: groups of `group` rows by their largest entry of `diagonal [K]`, rows by theirs.

    A group as large as K is plain act-order, a group of 1 row leaves the rows as they are. A short last group stays
    last: the sweep cuts its rows into whole groups.
    """
    k = len(diagonal)
    if group == 1:
        return np.arange(k)
    whole = k // group * group
    inside = np.argsort(-diagonal[:whole].reshape(-1, group), axis=1, kind="stable")
    starts = group * np.argsort(-diagonal[:whole].reshape(-1, group).max(axis=1), kind="stable")
    rest = whole + np.argsort(-diagonal[whole:], kind="stable")
    return np.concatenate([(starts[:, None] + inside[starts // group]).ravel(), rest])


def sweep_dtype(k: int, n: int) -> type[np.floating[Any]]:
    """What a weight [k, n] is solved in."""
    return np.float64 if k * k * n <= EXACT_PRODUCTS else np.float32


def column_tiles(k: int, n: int) -> list[slice]:
    """The columns of a weight [k, n] that are solved together, about `TILE_BYTES` of working weights."""
    width = max(64, TILE_BYTES // (k * np.dtype(sweep_dtype(k, n)).itemsize))
    return [slice(c, min(c + width, n)) for c in range(0, n, width)]


def working_bytes(
    k: int,
    n: int,
    spec: Spec,
    *,
    enable_mse_search: bool = False,
    descent_passes: int = 0,
    scaling: str = "none",
    **_: Any,
) -> int:
    """About the most that `solve` holds at once beyond the weight [k, n], its statistics and the result."""
    from onnx_woq.core.methods import teq

    g = spec.resolved_group(k)
    size, factor = (np.dtype(d).itemsize for d in (sweep_dtype(k, n), factor_dtype(k)))
    feedback = k * k * (factor if factor == size else factor + size)
    width = column_tiles(k, n)[0].stop
    grids = -(-k // g) * width * 4 * size
    tile = max(g * 64, TILE_ROWS * TILE_COLUMNS)  # of a search, two are held at once
    fitting = 3 * min(g * width, 2 * tile) if enable_mse_search else min(g * width, tile)
    solving = k * k * size + (2 * k * width + max(fitting, min(COPIED, k) * width)) * size + grids
    descending = descent.working_bytes(k, n, g, width, size) if descent_passes else 0
    scaled = 0 if scaling == "none" else 4 * (k * k + k * n)
    choosing = 0 if scaling == "none" else teq.working_bytes(k, n, spec)
    return max(choosing, scaled + max(feedback, solving, descending))


class _Sweep:
    """A tile of columns being quantized, its rows in solving order.

    Attributes:
        work: [K, n], weights less the feedback gathered so far; a finished row holds its levels (code − zero).
        error: [K, n], e = w − ŵ of finished rows.
        feedback: [K, K], see `factorize`.
        group_of: [K], each row's group.
        scales: [G, n].
        zeros: [G, n].
    """

    def __init__(self, work: Float, feedback: Float, group_of: NDArray[np.intp], spec: Spec):
        self.work, self.error, self.feedback, self.group_of = work, np.empty_like(work), feedback, group_of
        self.scales, self.zeros = (np.ones((group_of.max() + 1, work.shape[1]), work.dtype) for _ in range(2))
        self.top = 2**spec.bits - 1
        self.floor, self.ceiling = np.empty_like(self.zeros), np.empty_like(self.zeros)

    def set_grid(self, groups: slice | int, grid: tuple[Float, NDArray[np.uint8]]) -> None:
        self.scales[groups], self.zeros[groups] = grid
        self.floor[groups], self.ceiling[groups] = -self.zeros[groups], self.top - self.zeros[groups]

    def run(self, block: int, group_size: int, grid: GridOf | None = None, importance: Float | None = None) -> None:
        """Finishes every row, `block` of them (a multiple of `group_size`) after one gathering of feedback.

        With `grid`, each group of `group_size` rows is fitted when its turn comes, all feedback of the rows before it
        gathered: no cut is ever made inside a group that has not been fitted.
        """

        for start in range(0, len(self.work), block):
            stop = min(start + block, len(self.work))
            self.gather(slice(start, stop), slice(0, start))
            self.finish(start, stop, group_size, grid, importance)

    # A method: a function inside `run` that calls itself would keep all of this alive until garbage is collected.
    def finish(self, start: int, stop: int, group_size: int, grid: GridOf | None, importance: Float | None) -> None:
        if grid is not None and start % group_size == 0 and stop == min(start + group_size, len(self.work)):
            rows = slice(start, stop)
            scales, zeros = grid(self.work[rows], None if importance is None else importance[rows])
            self.set_grid(start // group_size, (scales[0], zeros[0]))
        if stop - start <= (LEAF if grid is None else min(LEAF, group_size)):
            return self.finish_rows(start, stop)
        unit = group_size if stop - start > group_size else 1
        middle = start + max(1, (stop - start) // 2 // unit) * unit
        self.finish(start, middle, group_size, grid, importance)
        self.gather(slice(middle, stop), slice(start, middle))
        return self.finish(middle, stop, group_size, grid, importance)

    def gather(self, rows: slice, finished: slice) -> None:
        if finished.stop > finished.start:
            self.work[rows] -= self.feedback[rows, finished] @ self.error[finished]

    def finish_rows(self, start: int, stop: int) -> None:
        work, error, feedback = self.work, self.error, self.feedback  # this loop is most of the time at small N
        for row in range(start, stop):
            level, left, group = work[row], error[row], self.group_of[row]
            if row > start:
                level -= feedback[row, start:row] @ error[start:row]
            left[...] = level
            level /= self.scales[group]
            np.rint(level, out=level)
            np.maximum(level, self.floor[group], out=level)
            np.minimum(level, self.ceiling[group], out=level)
            left -= level * self.scales[group]


def factor_dtype(k: int) -> type[np.floating[Any]]:
    """What the Gram matrix of k inputs is factorized in."""
    return np.float64 if k <= FACTOR_EXACTLY else np.float32


def factorize(
    gram: NDArray[np.float32], percdamp: float, order: NDArray[np.intp]
) -> tuple[Float, NDArray[np.float32]] | None:
    """What the sweep needs of H̃⁻¹ with its rows taken in `order`: feedback [K, K] and importance [K].

    Entry (j, i), i < j, of the feedback is `U_ij / U_ii` (what lies above its diagonal means nothing); importance is
    `1 / U_ii²`, what an error of row i costs after all later rows have made up for it as well as they can.

    H̃⁻¹ is never formed: with rows and columns reversed, the lower Cholesky factor of H̃ is U⁻¹ read backwards, and
    inverting a triangle takes half the work of inverting H̃ and factoring that.

    None when no damping makes H̃ positive definite.
    """
    k = len(gram)
    dtype = factor_dtype(k)
    backwards, as_given = order[::-1], np.array_equal(order, np.arange(k))
    # The one buffer all of this happens in. LAPACK wants columns; the matrix being symmetric, its transpose will do.
    buffer: Float = np.empty((k, k), dtype, order="F")
    for attempt in range(DAMP_RAISES + 1):
        damp = percdamp * 10**attempt * float(gram.diagonal().mean(dtype=np.float64))
        for rows in (slice(r, min(r + COPIED, k)) for r in range(0, k, COPIED)):
            # Picked entry by entry it would take longer than the inversion, so some rows at a time.
            source = (
                gram[k - rows.stop : k - rows.start][::-1, ::-1]
                if as_given
                else gram[np.ix_(backwards[rows], backwards)]
            )
            buffer.T[rows] = source
        np.einsum("kk->k", buffer)[...] += damp  # a view of the diagonal; dead inputs are positive now as well
        if cholesky(buffer) and invert_lower(buffer):
            pivots = buffer.diagonal()[::-1].astype(np.float64)
            if np.isfinite(pivots).all():
                feedback = buffer.T[::-1, ::-1]
                feedback /= pivots.astype(dtype)
                return feedback, (1 / pivots**2).astype(np.float32)
        logger.info("gptq: the Gram matrix of %d inputs is not positive definite with %g added", k, damp)
    return None
