"""Codes, scales and zero points of every number format, without a weight that they were rounded from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_woq.core.grids.integer import QuantizedTensor, nearest
from onnx_woq.core.spec import Spec


def random_codes(k: int, n: int, spec: Spec, *, seed: int = 0, half: bool = False) -> QuantizedTensor:
    """A weight `[k, n]` of random codes, with scales of both signs that float16 has exactly if `half`."""
    rng, channels = np.random.default_rng(seed), k if spec.group_dim == 1 else n
    size = spec.resolved_group(channels)
    groups = -(-channels // size)
    shape = (groups, n) if spec.group_dim == 1 else (k, groups)
    scales = rng.uniform(0.01, 2, shape) * rng.choice([-1, 1], shape)
    scales = scales.astype(np.float16 if half else np.float32).astype(np.float32)
    zeros = rng.integers(0, 2**spec.bits, shape) if not spec.symmetric else np.full(shape, 2 ** (spec.bits - 1))
    codes = rng.integers(0, 2**spec.bits, (k, n)).astype(np.uint8)
    zeros = zeros.astype(np.uint8)
    return QuantizedTensor(codes, scales, zeros, spec.bits, size, spec.symmetric, group_dim=spec.group_dim)


def rounded(weight: np.ndarray, spec: Spec) -> QuantizedTensor:
    """`weight [K, N]` rounded to nearest, in groups of input channels."""
    return QuantizedTensor(*nearest(weight, spec), spec.bits, spec.resolved_group(len(weight)), spec.symmetric)


def dequantize_linear(
    x: ir.TensorProtocol, scales: ir.TensorProtocol, zeros: ir.TensorProtocol | None, axis: int, block: int
) -> np.ndarray:
    """DequantizeLinear of ONNX, in float32: a scale for each index of `axis`, or for each `block` of them."""
    codes, scale = x.numpy().astype(np.float32), scales.numpy().astype(np.float32)
    zero = np.zeros_like(scale) if zeros is None else zeros.numpy().astype(np.float32)
    out = np.empty_like(codes)
    for place in np.ndindex(codes.shape):
        at = tuple(i // block if d == axis else i for d, i in enumerate(place)) if block else place[axis]
        out[place] = (codes[place] - zero[at]) * scale[at]
    return out
