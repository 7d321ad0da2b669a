"""Orthogonal matrices that spread what is large in a few channels over all of them.

Rounding is to a step as wide as the largest number of a group asks for. Channels of the residual stream that are much
larger than the others are gone once the stream x is replaced by x·R (QuIP: Chee et al. 2023, section 4; QuaRot:
Ashkboos et al. 2024, section 4), R being a randomised Hadamard matrix `diag(signs)·H / sqrt(D)`: each new channel is a
sum of all old ones with random signs.

R is a Kronecker product of small matrices, so multiplying a row by it costs D times the sum of their sizes, not D².
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

SYLVESTER = 64  # order of the largest factor that is a power of two
LARGEST = 2048  # order up to which another factor is searched for
TILE = 1 << 20  # numbers rotated at a time


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix `R = diag(signs)·(A₁ ⊗ A₂ ⊗ …)` [D, D].

    Attributes:
        signs: float32 [D], 1 or −1.
        factors: float32, square and orthogonal; the product of their sizes is D.
    """

    signs: F32
    factors: tuple[F32, ...]

    def matrix(self) -> F32:
        """R itself, float32 [D, D]."""
        return self.signs[:, None] * reduce(np.kron, self.factors)


def rotation(d: int, seed: int = 0) -> Rotation:
    """A random rotation of `d` channels, the same for the same seed.

    With `d = 2^k·m`, m odd: a Hadamard matrix where one of m times a power of two up to 2^k can be constructed, which
    is so for the widths that models have (576 = 16·36, 896 = 32·28, 5120 = 256·20); else that of 2^k times a random
    orthogonal matrix.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], np.float32), d)
    odd, power = d, 1
    while odd % 2 == 0:
        odd, power = odd // 2, 2 * power
    factors: list[F32] = []
    if odd > 1:
        sizes = [odd * 2**j for j in range(2, power.bit_length()) if odd * 2**j <= LARGEST]
        found = next((h for size in sizes if (h := _paley(size)) is not None), None)
        factors.append(_orthogonal(odd, rng) if found is None else found / np.float32(np.sqrt(len(found))))
        power //= max(1, len(factors[0]) // odd)
    while power > 1:
        size = min(power, SYLVESTER)
        factors.append(_sylvester(size) / np.float32(np.sqrt(size)))
        power //= size
    return Rotation(signs, tuple(factors) or (np.ones((1, 1), np.float32),))


def turn(array: F32, by: Rotation, axis: int) -> None:
    """Replaces `array` in place, some of it at a time: `Rᵀ·array` along axis 0, `array·R` along axis 1.

    Args:
        array: float32, two-dimensional, in row order, with D numbers along `axis`.
        by: the rotation R.
        axis: 0 or 1.
    """
    step = max(1, TILE // max(1, array.shape[axis]))
    for start in range(0, array.shape[1 - axis], step):
        part = (slice(None), slice(start, start + step))[:: 1 if axis == 0 else -1]
        tile = array[part] if axis == 0 else array[part].T
        tile = by.signs[:, None] * tile
        before = 1
        for factor in by.factors:  # each turns one digit of the channel's number
            tile = np.matmul(factor.T, tile.reshape(before, len(factor), -1))
            before *= len(factor)
        tile = tile.reshape(len(by.signs), -1)
        array[part] = tile if axis == 0 else tile.T


def _sylvester(order: int) -> F32:
    """The Hadamard matrix of order 2^k (Sylvester 1867)."""
    pair = np.array([[1, 1], [1, -1]], np.float32)
    return reduce(np.kron, [pair] * (order.bit_length() - 1), np.ones((1, 1), np.float32))


def _paley(order: int) -> F32 | None:
    """A Hadamard matrix of that order by one of Paley's constructions (1933) over a prime field, None if there is none.

    Q being the matrix of quadratic residues mod q, `[[0, 1], [∓1ᵀ, Q]]` is skew and becomes a Hadamard matrix with I
    added where q ≡ 3 (mod 4), order q + 1; it is symmetric where q ≡ 1, and its entries 0 and ±1 are replaced by two
    matrices of order 2, order 2(q + 1).
    """
    if order % 4 == 0 and _is_prime(order - 1):
        return _conference(order - 1, -1) + np.eye(order, dtype=np.float32)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        ones, diagonal = np.array([[1, 1], [1, -1]], np.float32), np.array([[1, -1], [-1, -1]], np.float32)
        return np.kron(_conference(order // 2 - 1, 1), ones) + np.kron(np.eye(order // 2, dtype=np.float32), diagonal)
    return None


def _conference(q: int, sign: int) -> F32:
    """The conference matrix [q + 1, q + 1] of a prime q, symmetric for sign 1 and skew for −1."""
    residues = np.full(q, -1, np.float32)
    residues[np.arange(1, q) ** 2 % q] = 1
    residues[0] = 0
    whole = np.zeros((q + 1, q + 1), np.float32)
    whole[0, 1:], whole[1:, 0] = 1, sign
    whole[1:, 1:] = residues[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return whole


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _orthogonal(d: int, rng: np.random.Generator) -> NDArray[Any]:
    """An orthogonal matrix [d, d], all of them equally likely (Stewart 1980)."""
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    return (q * np.sign(r.diagonal())).astype(np.float32)
