"""AWQ: multiplies the input channels that matter by a scale before rounding, and divides the input by it.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023), section 3.2 and
equation 5. Rows of the weight whose inputs are large are scaled up, so that rounding hurts them less. The scale is
searched as `core.input_scale` describes. All weights that read one activation are solved as one matrix and share one
scale.

A clip search then shrinks the range of each group. An output channel keeps the shrunk ranges only where they lower the
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core import input_scale
from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.integer import QuantizedTensor
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats


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
    """Quantizes `weight [K, N]` after scaling its rows by s; the result's `input_scale` is s, or None where none helps.

    Args:
        weight: any float dtype, in either memory order, possibly mapped from a file; read some columns at a time.
        stats: statistics of the input of every column of `weight`.
        spec: bits, group size and scheme.
        scale_dtype: dtype that the model stores scales in; s is rounded to it too.
        parallel_map: maps a function over candidates and over tiles of columns.
        enable_auto_scale: search for s.
        enable_mse_search: shrink the range of each group to where its squared error is least. Rows are weighted by the
            diagonal of the Gram matrix of the scaled input. An output channel keeps the result if its loss gets lower.
        mse_range: the shrink factors tried (start, stop, step).
        folding: True if 1/s may only be placed inside an existing operation; not used here.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.

    Raises:
        ValueError: there are no statistics, or their number of inputs is not the number of rows of `weight`.
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    if stats is None or stats.gram.shape != (len(weight), len(weight)):
        raise ValueError("awq needs the statistics of the weight's inputs, as many of them as it has rows")
    kinds: dict[str, Any] = {"full_range": enable_full_range, "scale_dtype": scale_dtype}
    grids = input_scale.grid_fitters(spec, mse_range if enable_mse_search else None, **kinds)
    scale = None
    if enable_auto_scale:
        scale = input_scale.search_scale(weight, stats, spec, grids[:1], scale_dtype, parallel_map)
    return input_scale.quantize_scaled_or_plain(weight, scale, stats.gram, spec, grids, parallel_map)


def working_bytes(k: int, n: int, spec: Spec, **_: Any) -> int:
    """Estimates the bytes that `solve` holds at once beyond the weight [k, n], its statistics and the result."""
    return input_scale.working_bytes(k, n, spec)
