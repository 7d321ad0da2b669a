"""AWQ: scale the input channels that matter up before rounding, and the input down by as much.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023), section 3.2 and
equation 5. For s [K] > 0, `x @ W = (x / s) @ (diag(s) @ W)`: rounding the scaled weight leaves the error
`ΔW = Q(diag(s)·W) / s − W`, small in rows where s is large. The search is over one exponent r,

    s = max(mean|x|^r / w^(1−r), 1e-4),    w = mean over output channels of |W| / (largest |W| of its group),

divided by sqrt(max s · min s), with the loss `Σ ΔW ∘ (H·ΔW)`, H the Gram matrix of the inputs: the exact squared error
of the output over all calibration tokens. All weights that read an input are solved side by side and share one s.

No scale at all is a candidate too, and a clipped range is kept in an output channel only where it lowers that loss:
on the calibration data the result is never worse than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.grid import QuantizedTensor, fitter, quantize, tiles
from onnx_woq.core.stats import Stats, column_errors
from onnx_woq.recipe import Spec

F32 = NDArray[np.float32]
GridOf = Callable[..., tuple[F32, NDArray[np.uint8]]]

RATIOS = tuple(i / 20 for i in range(21))
SAMPLE = 1024  # output channels that choose the exponent; whether to scale at all is decided on all of them
LEAST, LARGEST = 1e-4, 1e4  # of a scale; float16 holds both, and their inverses
TILE = 512  # output channels scored at a time


def solve(
    weight: F32,
    stats: Stats | None,
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    enable_auto_scale: bool = True,
    enable_mse_search: bool = True,
    mse_range: Sequence[float] = (0.91, 1.0, 0.01),
    folding: bool = False,  # noqa: ARG001 (acted on where the graph is known)
    enable_full_range: bool = False,
) -> QuantizedTensor:
    """Quantizes `weight [K, N]` after scaling its rows; the result's `input_scale` is s, or None where none helps.

    Args:
        weight: float32, finite.
        stats: of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: what the model stores scales in; s is rounded to it as well.
        enable_auto_scale: search for s.
        enable_mse_search: shrink each group's range to where its error, rows weighted by the diagonal of the scaled
            input's Gram matrix, is least; kept in the output channels where it lowers the loss.
        mse_range: the shrink factors tried (start, stop, step).
        folding: whether the pipeline must place 1/s inside an existing operation or do without; not used here.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.

    Raises:
        ValueError: no statistics, or of another number of inputs than `weight` has rows.
    """
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("awq needs the statistics of the weight's inputs, as many of them as it has rows")
    weight = np.ascontiguousarray(weight, np.float32)
    plain = fitter(spec, None, full_range=enable_full_range, scale_dtype=scale_dtype)
    clipped = fitter(spec, mse_range, full_range=enable_full_range, scale_dtype=scale_dtype)
    grids = [plain, clipped] if enable_mse_search else [plain]
    best, loss = _quantize(weight, None, stats.gram, spec, grids)
    if not enable_auto_scale or loss == 0:
        return best
    scale = _best_scale(weight, stats, spec, plain, scale_dtype)
    if scale is None:
        return best
    scaled, scaled_loss = _quantize(weight, scale, stats.gram, spec, grids)
    return scaled if scaled_loss < loss else best


def _best_scale(weight: F32, stats: Stats, spec: Spec, grid: GridOf, scale_dtype: DTypeLike) -> F32 | None:
    """The s [K] of least loss over a sample of output channels, None when that is no scale at all."""
    sample = np.ascontiguousarray(weight[:, :: -(-weight.shape[1] // SAMPLE)])
    _, least = _quantize(sample, None, stats.gram, spec, [grid])
    best = None
    for scale in candidates(stats.abs_mean, weight_share(weight, spec), scale_dtype):
        _, loss = _quantize(sample, scale, stats.gram, spec, [grid])
        if loss < least:
            least, best = loss, scale
    return best


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


def weight_share(weight: F32, spec: Spec) -> NDArray[np.float64]:
    """How large each row's weights are, on average over output channels, beside the largest of their group, [K]."""
    k, n = weight.shape
    share = np.zeros(k)
    for rows, groups, g, columns in tiles(k, n, spec.resolved_group(k), whole=True):
        size = np.abs(weight[rows, columns]).reshape(groups.stop - groups.start, g, -1)
        largest = size.max(axis=1, keepdims=True)
        share[rows] += np.divide(size, largest, out=size, where=largest > 0).sum(axis=2, dtype=np.float64).ravel()
    return share / n


def _quantize(
    weight: F32, scale: F32 | None, gram: F32, spec: Spec, grids: Sequence[GridOf]
) -> tuple[QuantizedTensor, float]:
    """`diag(scale) @ weight` rounded on the better of `grids` in each output channel, and the loss of that."""
    k, n = weight.shape
    g = spec.resolved_group(k)
    codes, loss = np.empty((k, n), np.uint8), 0.0
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)
    row_weights = gram.diagonal() if scale is None else gram.diagonal() / scale**2
    for columns in (slice(c, min(c + TILE, n)) for c in range(0, n, TILE)):
        original = weight[:, columns]
        tile = original if scale is None else original * scale[:, None]
        least = np.full(tile.shape[1], np.inf)
        for grid in grids:
            q = quantize(tile, *grid(tile, row_weights), spec, input_scale=scale)
            delta = q.effective()
            delta -= original
            errors = column_errors(delta, gram)
            better = errors < least
            least[better] = errors[better]
            for kept, new in ((codes, q.codes), (scales, q.scales), (zeros, q.zeros)):
                np.copyto(kept[:, columns], new, where=better)
        loss += float(least.sum())
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric, scale), loss
