"""GPTQ: quantizes one input channel after another; later ones make up for the errors of earlier ones.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), Algorithm 1.
`core.methods.gptq_sweep` holds the algorithm itself. This module adds what surrounds it: the order of the rows, an
input scale as AWQ or TEQ would choose it, tiles of columns, and coordinate descent on the result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core import input_scale
from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.clip_search import fitter
from onnx_woq.core.grids.integer import TILE_COLUMNS, TILE_ROWS, QuantizedTensor, quantize
from onnx_woq.core.methods import teq
from onnx_woq.core.methods.gptq_sweep import COPIED, FitGrid, Float, Sweep, factor_dtype, factorize
from onnx_woq.core.refine import descent
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)

SCALINGS = ("none", "awq", "teq")
"""The values of the option `scaling`."""

FEW = 0.1
"""Damping added for each time that the tokens would have to be doubled, tripled … to be as many as the inputs.

On held-out tokens of 256 correlated inputs, the squared error relative to rounding to nearest falls from 1.66 to .91
with 4 tokens, from 1.02 to .69 with 16 and from .39 to .32 with 128; by group order it rises from .32 to .36 with 32.
"""

TILE_BYTES = 32 << 20  # working weights per tile: columns are independent, so wide weights are solved in tiles
EXACT_PRODUCTS = 1 << 28  # K²·N up to which everything is computed in float64, at no cost anyone would notice


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
    """Quantizes `weight [K, N]` for inputs with the Gram matrix `stats.gram [K, K]`.

    Inputs that are zero on all calibration data get zero weights, as in the paper's code. The data do not say what
    their weights should be, and large ones would widen the ranges of their groups.

    Args:
        weight: any float dtype, in either memory order, possibly mapped from a file; read some columns at a time.
        stats: statistics of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: dtype that the model stores scales in.
        parallel_map: maps a function over tiles of columns.
        actorder: take rows by falling diagonal of the Gram matrix, the most important first. Groups stay runs of
            consecutive rows of `weight`, so with groups their grids are fixed beforehand (static groups).
        percdamp: damping added to the diagonal of the Gram matrix, as a share of its mean; more of it where there are
            fewer tokens than inputs, see `damping`.
        block_size: rows whose feedback is gathered in one matrix product. It changes speed, not the result (except for
            float32 rounding, in weights too large to be solved in float64).
        static_groups: fit the grid of every group to the original weights. Otherwise it is fitted when its turn comes,
            to the rows as the errors of earlier rows have changed them.
        group_order: take groups, and the rows inside each, by falling diagonal of the Gram matrix. The most important
            rows come early and, unlike under `actorder`, every grid is still fitted to the changed rows (group-aware
            order: Gafni et al., "Dual Precision Quantization" (2025), section 3.3).
        enable_mse_search: shrink the range of each group to where its share `Σ e_i² / U_ii²` of the loss is least. Over
            all rows that sum is the loss; weighting by the diagonal of the Gram matrix measures worse.
        mse_range: the shrink factors tried (start, stop, step).
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.
        descent_passes: passes of coordinate descent and scale refit over the result (`core.refine.descent`).
        scaling: "awq" or "teq": first scale the rows, and divide the input, as that method would; "none": do not.
        folding: True if the division of the input may only be placed inside an existing operation; not used here.

    Raises:
        ValueError: there are no statistics, or their number of inputs is not the number of rows of `weight`; or two
            orders are asked for at once.
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if actorder and group_order:
        raise ValueError("actorder and group_order are two orders of the rows: choose one")
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("gptq needs the statistics of the weight's inputs, as many of them as it has rows")
    k, n = weight.shape
    scale = _choose_scale(scaling, weight, stats, spec, enable_full_range, scale_dtype, parallel_map)
    if scale is not None:
        weight, stats = np.asarray(weight, np.float32) * scale[:, None], stats.scaled(1 / scale)
    grid = fitter(spec, mse_range if enable_mse_search else None, full_range=enable_full_range, scale_dtype=scale_dtype)
    diagonal = stats.gram.diagonal()
    percdamp = damping(percdamp, stats.tokens, int(np.count_nonzero(diagonal)))
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
    factors = factors[0].astype(sweep_dtype(k, n), copy=False), factors[1]  # frees the other precision
    q = _sweep(
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
    del factors  # coordinate descent takes as much memory
    return descent.descend(
        weight,
        replace(q, input_scale=scale),
        stats.gram,
        descent_passes,
        damp=percdamp,
        tiles=column_tiles(k, n),
        dtype=sweep_dtype(k, n),
        scale_dtype=scale_dtype,
        parallel_map=parallel_map,
    )


def damping(percdamp: float, tokens: int, inputs: int) -> float:
    """Returns the damping for so many tokens: as asked for, or more where there are fewer than inputs.

    Such tokens leave directions open, along which errors are fed back as if nobody felt them. More damping shrinks the
    result towards rounding to nearest.

    Args:
        percdamp: the damping that is asked for, as a share of the mean of the diagonal.
        tokens: tokens that the Gram matrix is the sum over.
        inputs: inputs that were not always zero.
    """
    return percdamp + FEW * max(0.0, inputs / max(1, tokens) - 1)


def _sweep(
    weight: NDArray[Any],
    factors: tuple[Float, NDArray[np.float32]],
    order: NDArray[np.intp],
    grid: FitGrid,
    spec: Spec,
    *,
    static: bool,
    dead: NDArray[np.bool_],
    block_size: int,
    parallel_map: ParallelMap,
) -> QuantizedTensor:
    """Sweeps over all rows of `weight [K, N]`, one tile of columns after another.

    Args:
        weight: any float dtype, in either memory order.
        factors: feedback and importance, see `factorize`.
        order: [K], the rows in solving order.
        grid: fits the grid of a group.
        spec: bits, group size and scheme.
        static: fit all grids beforehand, to the original weights.
        dead: [K], inputs that are always zero.
        block_size: rows that gather their feedback in one matrix product.
        parallel_map: maps a function over tiles of columns.
    """
    k, n = weight.shape
    g = spec.resolved_group(k)
    group_of = order // g if static else np.arange(k) // g  # by row of the sweep, which numbers groups as it meets them
    weight_group = slice(None) if static else order[::g] // g  # by group of the sweep: its number in the weight
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
        sweep = Sweep(work, feedback, group_of, spec)
        if fixed is not None:
            sweep.set_grid(slice(None), fixed)
            sweep.run(block_size, group_size=1)
        else:
            sweep.run(-(-block_size // g) * g, group_size=g, grid=grid, importance=importance)
        scales[weight_group, columns], zeros[weight_group, columns] = sweep.scales, sweep.zeros
        for rows in (slice(r, r + COPIED) for r in range(0, k, COPIED)):
            codes[order[rows], columns] = sweep.work[rows] + sweep.zeros[group_of[rows]]

    for _ in parallel_map(finish, column_tiles(k, n)):
        pass
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric)


def _choose_scale(
    scaling: str,
    weight: Any,
    stats: Stats,
    spec: Spec,
    full_range: bool,
    scale_dtype: DTypeLike,
    parallel_map: ParallelMap,
) -> NDArray[np.float32] | None:
    """Returns the scale [K] of the rows that AWQ or TEQ would choose for rounding to nearest, None for no scale."""
    kinds: dict[str, Any] = {"full_range": full_range, "scale_dtype": scale_dtype}
    if scaling == "none":
        return None
    if scaling == "teq":
        return teq.trained_scale(weight, stats, spec, parallel_map=parallel_map, **kinds)
    grids = input_scale.grid_fitters(spec, **kinds)
    return input_scale.search_scale(weight, stats, spec, grids, scale_dtype, parallel_map)


def row_order(diagonal: NDArray[Any], group: int) -> NDArray[np.intp]:
    """Returns the row numbers in solving order [K]: groups by their largest entry of `diagonal`, rows by their own.

    Args:
        diagonal: [K], of the Gram matrix.
        group: rows per group. K gives plain act-order, 1 leaves the rows as they are. A short last group stays last,
            because the sweep cuts its rows into whole groups.
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
    """Returns the dtype that a weight [k, n] is solved in."""
    return np.float64 if k * k * n <= EXACT_PRODUCTS else np.float32


def column_tiles(k: int, n: int) -> list[slice]:
    """Cuts the columns of a weight [k, n] into tiles of about `TILE_BYTES` of working weights."""
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
    """Estimates the bytes that `solve` holds at once beyond the weight [k, n], its statistics and the result."""
    g = spec.resolved_group(k)
    size, factor = (np.dtype(d).itemsize for d in (sweep_dtype(k, n), factor_dtype(k)))
    feedback = k * k * (factor if factor == size else factor + size)
    width = column_tiles(k, n)[0].stop
    grids = -(-k // g) * width * 4 * size
    tile = max(g * 64, TILE_ROWS * TILE_COLUMNS)  # a clip search holds two at once
    fitting = 3 * min(g * width, 2 * tile) if enable_mse_search else min(g * width, tile)
    solving = k * k * size + (2 * k * width + max(fitting, min(COPIED, k) * width)) * size + grids
    descending = descent.working_bytes(k, n, g, width, size) if descent_passes else 0
    scaled = 0 if scaling == "none" else 4 * (k * k + k * n)
    choosing = 0 if scaling == "none" else teq.working_bytes(k, n, spec)
    return max(choosing, scaled + max(feedback, solving, descending))
