"""Bias correction: what rounding a weight adds to the mean of each output is taken off again by a constant.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2: with
`ΔW = W − Ŵ`, the mean output is off by `E[x·Ŵ] − E[x·W] = −E[x]·ΔW`, and `E[x]·ΔW` added to the output puts it right.
Of all constants it leaves the least squared error `‖X·ΔW − 1·b‖²`. The mean is that of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from onnx_woq.core.stats import Stats

F32 = NDArray[np.float32]

COLUMNS = 128  # at a time, in float64


def correction(delta_of: Callable[[slice], F32], n: int, stats: Stats) -> F32:
    """What to add to the output, `mean(x)ᵀ·ΔW`, float32 [N].

    Args:
        delta_of: the columns of `ΔW = W − Ŵ` [K, N] that a slice names; asked for some at a time.
        n: output channels.
        stats: of the inputs.

    Raises:
        ValueError: the statistics do not know the mean of the inputs.
    """
    mean, out = stats.known_mean(), np.empty(n, np.float32)
    for columns in (slice(c, min(c + COLUMNS, n)) for c in range(0, n, COLUMNS)):
        out[columns] = mean @ delta_of(columns).astype(np.float64)
    return out
