"""RTN: round every weight to the nearest level of its group's grid. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.grid import QuantizedTensor, fitter, quantize
from onnx_woq.core.stats import Stats
from onnx_woq.recipe import Spec


def solve(
    weight: NDArray[np.float32],
    stats: Stats | None,  # noqa: ARG001 (every method is called alike)
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    enable_full_range: bool = False,
    enable_mse_search: bool = False,
    mse_range: Sequence[float] = (0.805, 1.0, 0.005),
) -> QuantizedTensor:
    """Rounds `weight [K, N]` to nearest.

    Args:
        weight: float32, finite.
        stats: not used.
        spec: bits, group size and scheme.
        scale_dtype: what the model stores scales in.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.
        enable_mse_search: shrink each group's range to where its squared error is least.
        mse_range: the shrink factors tried (start, stop, step).
    """
    weight = np.ascontiguousarray(weight, np.float32)
    grid = fitter(spec, mse_range if enable_mse_search else None, full_range=enable_full_range, scale_dtype=scale_dtype)
    return quantize(weight, *grid(weight), spec)
