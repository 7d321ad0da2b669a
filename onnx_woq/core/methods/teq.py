"""TEQ: trains the input scale that AWQ takes from a formula.

Cheng et al., "TEQ: Trainable Equivalent Transformation for Quantization of LLMs" (2023): the scale α [K] of
`x @ W = (x / α) @ (diag(α) @ W)` is a parameter. The paper trains the scales of all layers end to end on a label loss.
Here each scale is trained by itself on the error of its own output, `L = Σ ΔW ∘ (H·ΔW)` with
`ΔW = Q(diag(α)·W) / α − W` and the Gram matrix H of the inputs. This local loss needs no labels and no backward pass
through the model, but does not see what later layers make of an error.

Let `E = ΔW ∘ (H·ΔW)`. The gradient passes straight through rounding (∂round(u)/∂u = 1) and follows the rows that span
the range of their group:

    ∂L / ∂log α_k = −2 Σ_n E_kn + 2 Σ_n [k spans its group] · |α_k·W_kn| / range_gn · Σ_{j in g} E_jn.

It is centred, because a factor common to all rows changes nothing, scaled to unit size, and followed with momentum for
some steps from AWQ's scale. The best scale met is kept, or no scale where that is better: on the calibration data the
result is never worse than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core import input_scale
from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.integer import QuantizedTensor, fit, project
from onnx_woq.core.input_scale import F32, LARGEST, LEAST
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats, column_errors

MOMENTUM = 0.9
SAMPLE = 256  # output channels, evenly spread, that the scale is trained on


def solve(
    weight: NDArray[Any],
    stats: Stats | None,
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
    steps: int = 60,
    learning_rate: float = 0.05,
    enable_mse_search: bool = True,
    mse_range: Sequence[float] = (0.91, 1.0, 0.01),
    enable_auto_scale: bool = True,
    folding: bool = False,  # noqa: ARG001 (acted on where the graph is known)
    enable_full_range: bool = False,
) -> QuantizedTensor:
    """Quantizes `weight [K, N]` after scaling its rows by a trained α; the result's `input_scale` is α, or None.

    Args:
        weight: any float dtype, in either memory order, possibly mapped from a file; read some columns at a time.
        stats: statistics of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: dtype that the model stores scales in; α is rounded to it too.
        parallel_map: maps a function over candidates and over tiles of columns.
        steps: steps of training.
        learning_rate: change of log α per step (root mean square); it falls to zero over the steps.
        enable_mse_search: shrink the range of each group to where its squared error is least. Rows are weighted by the
            diagonal of the Gram matrix of the scaled input. An output channel keeps the result if its loss gets lower.
        mse_range: the shrink factors tried (start, stop, step).
        enable_auto_scale: train a scale at all.
        folding: True if 1/α may only be placed inside an existing operation; not used here.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.

    Raises:
        ValueError: there are no statistics, or their number of inputs is not the number of rows of `weight`.
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("teq needs the statistics of the weight's inputs, as many of them as it has rows")
    kinds: dict[str, Any] = {"full_range": enable_full_range, "scale_dtype": scale_dtype}
    grids = input_scale.grid_fitters(spec, mse_range if enable_mse_search else None, **kinds)
    scale = None
    if enable_auto_scale:
        scale = trained_scale(weight, stats, spec, steps, learning_rate, parallel_map=parallel_map, **kinds)
    return input_scale.quantize_scaled_or_plain(weight, scale, stats.gram, spec, grids, parallel_map)


def trained_scale(
    weight: NDArray[Any],
    stats: Stats,
    spec: Spec,
    steps: int = 60,
    learning_rate: float = 0.05,
    *,
    full_range: bool = False,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
) -> F32 | None:
    """Trains α [K] on a sample of output channels; returns the best one met, None where no scale is better.

    Args:
        weight: [K, N], any float dtype, in either memory order.
        stats: statistics of the inputs.
        spec: bits, group size and scheme.
        steps: steps of training.
        learning_rate: change of log α per step (root mean square); it falls to zero over the steps.
        full_range: symmetric only: a signed scale that uses code 0.
        scale_dtype: dtype that α and the scales are rounded to.
        parallel_map: maps a function over the candidates for the start.
    """
    kinds: dict[str, Any] = {"full_range": full_range, "scale_dtype": scale_dtype}
    grids = input_scale.grid_fitters(spec, **kinds)
    start = input_scale.search_scale(weight, stats, spec, grids, scale_dtype, parallel_map)
    sample = input_scale.sample_columns(weight, SAMPLE)
    log = np.zeros(len(sample)) if start is None else np.log(start.astype(np.float64))
    velocity = np.zeros(len(sample))
    best, least = None, np.inf
    for step in range(steps + 1):
        scale = np.clip(np.exp(log), LEAST, LARGEST).astype(scale_dtype).astype(np.float32)
        loss, gradient = loss_and_gradient(sample, scale, stats.gram, spec, **kinds)
        if loss < least:
            best, least = scale, loss
        gradient -= gradient.mean()
        size = float(np.sqrt(np.square(gradient).mean()))
        if step == steps or not 0 < size < np.inf:
            break
        velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / size
        log -= learning_rate * (1 - step / steps) * velocity
    unscaled = input_scale.scaled_loss(sample, None, stats.gram, spec, grids)
    return best if least < unscaled else None


def loss_and_gradient(
    weight: F32,
    scale: F32,
    gram: F32,
    spec: Spec,
    *,
    full_range: bool = False,
    scale_dtype: DTypeLike = np.float32,
) -> tuple[float, NDArray[np.float64]]:
    """Returns the loss L and its gradient ∂L/∂log α, float64 [K], see the module's docstring.

    Args:
        weight: [K, n], rounded to nearest after scaling.
        scale: α [K].
        gram: H [K, K].
        spec: bits, group size and scheme.
        full_range: symmetric only: a signed scale that uses code 0.
        scale_dtype: dtype that the scales are rounded to.
    """
    k, g = len(weight), spec.resolved_group(len(weight))
    scaled = weight * scale[:, None]
    grid = fit(scaled, spec, full_range=full_range, scale_dtype=scale_dtype)
    delta = project(scaled, *grid, spec.bits, g)
    delta /= scale[:, None]
    delta -= weight
    errors = delta * (gram @ delta)
    gradient = -2 * errors.sum(axis=1, dtype=np.float64)
    for start in range(0, k, g):
        rows = slice(start, min(k, start + g))
        part, size = scaled[rows], np.abs(scaled[rows])
        lo, hi = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
        if spec.symmetric or spec.bits == 1:
            span, spans = size.max(axis=0), size == size.max(axis=0)
        else:
            span, spans = hi - lo, (part == lo) | (part == hi)
        share = np.divide(size, span, out=np.zeros_like(size), where=spans & (span > 0))
        gradient[rows] += 2 * (share * errors[rows].sum(axis=0)).sum(axis=1, dtype=np.float64)
    return float(column_errors(delta, gram).sum()), gradient


def working_bytes(k: int, n: int, spec: Spec, **_: Any) -> int:
    """Estimates the bytes that `solve` holds at once beyond the weight [k, n], its statistics and the result."""
    return max(input_scale.working_bytes(k, n, spec), 4 * (7 * k * min(SAMPLE, n) + 10 * k))
