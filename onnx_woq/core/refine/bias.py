"""Bias correction: a constant per output channel that removes the mean error of the outputs.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2. With
`ΔW = W − Ŵ`, quantization moves the mean output by `E[x·Ŵ] − E[x·W] = −E[x]·ΔW`. Adding `b = E[x]·ΔW` to the output
undoes that. Of all constants b it also leaves the least squared error `‖X·ΔW − 1·b‖²`. The mean is taken over the
calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from onnx_woq.core.stats import Stats

F32 = NDArray[np.float32]

COLUMNS = 128  # columns of ΔW at a time, in float64


def correction(delta_of: Callable[[slice], F32], n: int, stats: Stats) -> F32:
    """Returns the constant to add to the output, `mean(x)ᵀ·ΔW`, float32 [N].

    Args:
        delta_of: returns the columns of `ΔW = W − Ŵ` [K, N] in a slice; called for some columns at a time.
        n: output channels.
        stats: statistics of the inputs.

    Raises:
        ValueError: the statistics do not know the mean of the inputs.
    """
    mean, out = stats.known_mean(), np.empty(n, np.float32)
    for columns in (slice(c, min(c + COLUMNS, n)) for c in range(0, n, COLUMNS)):
        out[columns] = mean @ delta_of(columns).astype(np.float64)
    return out
