"""The packed bytes, against one code at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.targets.packing import pack_codes, pack_zeros, spread


def slowly(codes, bits, block, shift):
    """MatMulNBits' layout, bit by bit."""
    k, n = codes.shape
    blocks = -(-k // block)
    out = np.zeros((n, blocks, block * bits // 8), np.uint8)
    for row in range(k):
        for column in range(n):
            place = row % block * bits
            code = int(codes[row, column]) + shift
            out[column, row // block, place // 8] |= np.uint8(code << place % 8)
    return out


shapes = st.tuples(st.integers(1, 80), st.integers(1, 5))


@given(shapes, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]), st.integers(0, 9))
def test_codes(shape, bits, block, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)
    assert np.array_equal(pack_codes(codes, bits, block), slowly(codes, bits, block, 0))
    low = codes >> 1
    shift = 1 << (bits - 1)
    assert np.array_equal(pack_codes(low, bits, block, shift), slowly(low, bits, block, shift))


def test_codes_larger_than_a_tile():
    codes = np.random.default_rng(0).integers(0, 16, (1100, 530)).astype(np.uint8)
    assert np.array_equal(pack_codes(codes, 4, 32), slowly(codes, 4, 32, 0))


@given(shapes, st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_zero_points_start_a_byte_in_every_row(shape, bits, seed):
    zeros = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)
    packed = pack_zeros(zeros, bits)
    assert packed.shape == (shape[1], -(-shape[0] * bits // 8))
    for group in range(shape[0]):
        place = group * bits
        assert np.array_equal(packed[:, place // 8] >> (place % 8) & ((1 << bits) - 1), zeros[group])


def test_groups_spread_over_their_blocks():
    groups = np.arange(3)[:, None]
    assert spread(groups, 250, 96, 32)[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert spread(groups[:1], 250, 250, 64)[:, 0].tolist() == [0, 0, 0, 0]
