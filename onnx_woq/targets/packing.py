"""Packing of codes and zero points into the bytes of MatMulNBits (see ContribOperators.md of ONNX Runtime)."""

from __future__ import annotations

import numpy as np

_ROWS, _COLUMNS = 1024, 512  # a tile of codes, and the words made of it, stay in the processor's cache
# The type that holds two words of so many bits.
_WORDS: dict[int, np.dtype] = {8: np.dtype("<u2"), 16: np.dtype("<u4"), 32: np.dtype("<u8")}
_WORD_BITS = 64


def pack_codes(codes: np.ndarray, bits: int, block: int, shift: int = 0) -> np.ndarray:
    """Packs codes along K, lowest bits first; each output channel becomes a row of blocks.

    Transposing byte by byte would take most of the time. So neighbouring rows are joined two by two until a word holds
    64 bits of one output channel, and words are transposed instead.

    Args:
        codes: uint8 `[K, N]`.
        bits: bits of a code: 2, 4 or 8.
        block: input channels of a block; K is padded with zeros to whole blocks.
        shift: a number that is added to every code.

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
    """Returns rows of `bits` bits joined into words, the first row lowest: uint64 `[rows * bits / 64, columns]`."""
    while bits < _WORD_BITS:
        wider = _WORDS.get(bits, tile.dtype)
        high = tile[1::2].astype(wider)
        high <<= wider.type(bits)
        high |= tile[::2]
        tile, bits = high, 2 * bits
    return tile


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Packs zero points `[blocks, N]`, lowest bits first; each output channel is padded to whole bytes.

    Returns:
        uint8 `[N, ceil(blocks * bits / 8)]`.
    """
    blocks, n = zeros.shape
    return pack_codes(zeros, bits, 8 // bits).reshape(n, -(-blocks * bits // 8))


def spread(per_group: np.ndarray, k: int, group_size: int, block: int) -> np.ndarray:
    """Returns values per group `[G, N]` repeated for each block of the group: `[ceil(k / block), N]`."""
    if group_size == block:
        return per_group
    return per_group[np.arange(-(-k // block)) * block // group_size]
