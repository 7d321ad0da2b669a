"""The byte layout of MatMulNBits (com.microsoft, see ContribOperators.md of ONNX Runtime)."""

from __future__ import annotations

import numpy as np

_COLUMNS, _ROWS = 512, 512  # a tile of codes and of packed bytes stays in the cache while it is turned


def pack_codes(codes: np.ndarray, bits: int, block: int, shift: int = 0) -> np.ndarray:
    """Packs codes along K, lowest bits first, each output channel in a row.

    Args:
        codes: uint8 `[K, N]`.
        bits: 2, 4 or 8 per code.
        block: rows per scale; K is padded with zeros to whole blocks.
        shift: added to every code.

    Returns:
        uint8 `[N, ceil(K / block), block * bits / 8]`.
    """
    k, n = codes.shape
    per_byte = 8 // bits
    blocks = -(-k // block)
    packed = np.zeros((n, blocks * block // per_byte), np.uint8)
    for left in range(0, n, _COLUMNS):
        for top in range(0, k, _ROWS):
            tile = codes[top : top + _ROWS, left : left + _COLUMNS]
            if short := -len(tile) % per_byte:
                tile = np.pad(tile, ((0, short), (0, 0)), constant_values=np.uint8(-shift % 256))
            if shift:
                tile = tile + np.uint8(shift)
            out = tile[::per_byte].copy()
            for place in range(1, per_byte):
                out |= tile[place::per_byte] << np.uint8(bits * place)
            packed[left : left + out.shape[1], top // per_byte : top // per_byte + len(out)] = out.T
    return packed.reshape(n, blocks, block * bits // 8)


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Packs zero points `[blocks, N]`, lowest bits first, each channel's row padded to whole bytes.

    Returns:
        uint8 `[N, ceil(blocks * bits / 8)]`.
    """
    blocks, n = zeros.shape
    return pack_codes(zeros, bits, 8 // bits).reshape(n, -(-blocks * bits // 8))


def spread(per_group: np.ndarray, k: int, group_size: int, block: int) -> np.ndarray:
    """Repeats values per group `[G, N]` for the blocks that make up each group: `[ceil(k / block), N]`."""
    if group_size == block:
        return per_group
    return per_group[np.arange(-(-k // block)) * block // group_size]
