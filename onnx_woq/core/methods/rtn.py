"""RTN (round to nearest): rounds every weight to the nearest level of its group's grid. It needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.clip_search import search
from onnx_woq.core.grids.integer import TALL, QuantizedTensor, encode, nearest, tiles
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats

PIECE = 1 << 23  # weights in one piece of the work: most matrices have fewer


def solve(
    weight: NDArray[Any],
    stats: Stats | None,  # noqa: ARG001 (every method is called alike)
    spec: Spec,
    *,
    scale_dtype: DTypeLike = np.float32,
    parallel_map: ParallelMap = map,
    enable_full_range: bool = False,
    enable_mse_search: bool = False,
    mse_range: Sequence[float] = (0.805, 1.0, 0.005),
) -> QuantizedTensor:
    """Rounds `weight [K, N]` to nearest.

    Args:
        weight: any float dtype, in either memory order, possibly mapped from a file; read tile by tile.
        stats: not used.
        spec: bits, group size and scheme.
        scale_dtype: dtype that the model stores scales in.
        parallel_map: maps a function over pieces of columns.
        enable_full_range: symmetric only: use code −2^(bits−1) too, by a signed scale.
        enable_mse_search: shrink the range of each group to where its squared error is least.
        mse_range: the shrink factors tried (start, stop, step).

    Raises:
        FloatingPointError: the weight holds NaN or infinite numbers.
    """
    kinds: dict[str, Any] = {"full_range": enable_full_range, "scale_dtype": scale_dtype}
    k, n = weight.shape
    g = spec.resolved_group(k)

    def rounded(columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        piece = weight[:, columns]
        if not enable_mse_search:
            return nearest(piece, spec, **kinds)
        grid = search(piece, spec, mse_range, **kinds)
        return encode(piece, *grid, spec.bits, g), *grid

    width = max(1, PIECE // max(1, k))
    if n <= width:
        return QuantizedTensor(*rounded(slice(None)), spec.bits, g, spec.symmetric)
    codes = np.empty((k, n), np.uint8)
    scales, zeros = np.empty((-(-k // g), n), np.float32), np.empty((-(-k // g), n), np.uint8)

    def put(columns: slice) -> None:
        codes[:, columns], scales[:, columns], zeros[:, columns] = rounded(columns)

    for _ in parallel_map(put, [slice(c, c + width) for c in range(0, n, width)]):
        pass
    return QuantizedTensor(codes, scales, zeros, spec.bits, g, spec.symmetric)


def working_bytes(k: int, n: int, spec: Spec, **_: Any) -> int:
    """Estimates the bytes that `solve` holds at once beyond the weight [k, n] and the result."""
    g = spec.resolved_group(k)
    pieces = tiles(k, n, g, whole=g <= TALL)
    largest = max((r.stop - r.start) * (c.stop - c.start) for r, _, _, c in pieces)
    return 5 * largest + (24 * -(-k // g) * n if g > TALL else largest)
