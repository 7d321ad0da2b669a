"""The range of scales: which of them a number type holds, and weights too large for the sums of a solver."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from onnx_woq.core.grids.integer import Float, QuantizedTensor, fit, storable
from onnx_woq.core.spec import Spec

LARGE = 40
"""Exponent of two above which weights are solved in a larger unit, so that their squares stay in float32."""


def holds(weight: Float, spec: Spec, dtype: DTypeLike, factor: float = 1.0) -> bool:
    """Tells whether a number type holds the scales of a weight `[K, N]`, without any becoming zero or infinite.

    A weight with NaN or infinite numbers is not judged: solving it says so.

    Args:
        weight: any float dtype, in either memory order.
        spec: bits, group size and scheme.
        dtype: float16 or float32.
        factor: what a target multiplies scales by before it stores them, a power of two. Where that is not 1, eight
            times as large scales are asked for, so that no more than a sixteenth of one is rounded away.
    """
    if spec.group_dim == 0:
        weight, spec = weight.T, replace(spec, group_dim=1)
    try:
        scales, zeros = fit(weight, spec)
    except FloatingPointError:
        return True
    info, size = np.finfo(np.dtype(dtype)), np.abs(scales)
    least = float(info.smallest_subnormal) / factor * (1 if factor == 1 else 8)
    most = (size.astype(np.float64) * _reach(zeros, spec.bits)).max(initial=0)
    return bool(size.min(initial=np.inf) >= least and most <= float(info.max))


def large_unit(largest: float) -> int:
    """Returns the exponent of a power of two to solve a weight in whose largest magnitude is given; 0 for most."""
    exponent = int(np.frexp(largest)[1])
    return exponent if exponent > LARGE else 0


def in_unit(q: QuantizedTensor, exponent: int, scale_dtype: DTypeLike) -> QuantizedTensor:
    """Returns a weight times two to the power of `exponent`; its scales stay numbers that are stored."""
    if not exponent:
        return q
    scales = np.ldexp(q.scales.astype(np.float64), exponent)
    return replace(q, scales=storable(scales, scale_dtype, _reach(q.zeros, q.bits)))


def _reach(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Returns the largest |code − zero| of each group."""
    return np.maximum(zeros, 2**bits - 1 - zeros)
