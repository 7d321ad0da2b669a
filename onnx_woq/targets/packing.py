"""The byte layout of MatMulNBits (com.microsoft, see ContribOperators.md of ONNX Runtime)."""

from __future__ import annotations

import numpy as np

_ROWS, _COLUMNS = 1024, 512  # a tile of codes and what is made of it stay in the cache
# What two words of so many bits fit in.
_WORDS: dict[int, np.dtype] = {8: np.dtype("<u2"), 16: np.dtype("<u4"), 32: np.dtype("<u8")}
_WORD_BITS = 64


def pack_codes(codes: np.ndarray, bits: int, block: int, shift: int = 0) -> np.ndarray:
    """Packs codes along K, lowest bits first, each output channel in a row.

    Turning rows into columns a byte at a time is what would take the time. So neighbouring rows are joined two by two
    until a word holds 64 bits of one channel, and words are turned.

    Args:
        codes: uint8 `[K, N]`.
        bits: 2, 4 or 8 per code.
        block: rows per scale; K is padded with zeros to whole blocks.
        shift: added to every code.

    Returns:
        uint8 `[N, ceil(K / block), block * bits / 8]`.
    """
    k, n = codes.shape
    blocks = -(-k // block)
    row_bytes = blocks * block * bits // 8
    per_word = _WORD_BITS // bits
    words = np.zeros((n, -(-row_bytes * 8 // _WORD_BITS)), "<u8")
    for top in range(0, k, _ROWS):
        for left in range(0, n, _COLUMNS):
            tile = codes[top : top + _ROWS, left : left + _COLUMNS]
            if shift:
                tile = tile + np.uint8(shift)
            if short := -len(tile) % per_word:
                tile = np.pad(tile, ((0, short), (0, 0)))
            joined = _joined(tile, bits)
            words[left : left + joined.shape[1], top // per_word : top // per_word + len(joined)] = joined.T
    return words.view(np.uint8)[:, :row_bytes].reshape(n, blocks, block * bits // 8)


def _joined(tile: np.ndarray, bits: int) -> np.ndarray:
    """Rows of `bits` bits joined into words, the first row lowest: uint64 `[rows * bits / 64, columns]`."""
    while bits < _WORD_BITS:
        wider = _WORDS.get(bits, tile.dtype)
        high = tile[1::2].astype(wider)
        high <<= wider.type(bits)
        high |= tile[::2]
        tile, bits = high, 2 * bits
    return tile


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
