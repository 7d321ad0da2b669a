"""Random orthogonal matrices that spread a few large channels over all channels.

The largest number of a group decides how wide the rounding step of the whole group is. In the residual stream x of a
transformer a few channels are much larger than the others. In `x·R` they are not (QuIP: Chee et al. 2023, section 4;
QuaRot: Ashkboos et al. 2024, section 4), R being a randomised Hadamard matrix `diag(signs)·H / sqrt(D)`: each new
channel is the sum of all old ones with random signs.

R is a Kronecker product of small matrices. Multiplying a row of D numbers by it therefore costs D times the sum of
their sizes instead of D².
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
        """Returns R, float32 [D, D]."""
        return self.signs[:, None] * reduce(np.kron, self.factors)


def rotation(d: int, seed: int = 0) -> Rotation:
    """Returns a random rotation of `d` channels; one seed always gives the same.

    Let `d = 2^k·m` with m odd. If a Hadamard matrix of m times a power of two up to 2^k can be constructed, all of R is
    a Hadamard matrix. This is so for the widths that models have (576 = 16·36, 896 = 32·28, 5120 = 256·20). Otherwise R
    is the Hadamard matrix of order 2^k times a random orthogonal matrix of order m.
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
    """Rotates `array` in place: replaces it by `Rᵀ·array` along axis 0, by `array·R` along axis 1.

    Tiles are rotated one after another, so that little memory is taken beside the array.

    Args:
        array: float32 [D, N] for axis 0, [M, D] for axis 1; in row order.
        by: the rotation R.
        axis: 0 or 1.
    """
    step = max(1, TILE // max(1, array.shape[axis]))
    for start in range(0, array.shape[1 - axis], step):
        part = (slice(None), slice(start, start + step))[:: 1 if axis == 0 else -1]
        tile = array[part] if axis == 0 else array[part].T
        tile = by.signs[:, None] * tile
        before = 1
        for factor in by.factors:  # each acts on one digit of the channel's number, written in mixed radix
            tile = np.matmul(factor.T, tile.reshape(before, len(factor), -1))
            before *= len(factor)
        tile = tile.reshape(len(by.signs), -1)
        array[part] = tile if axis == 0 else tile.T


def _sylvester(order: int) -> F32:
    """Returns the Hadamard matrix [2^k, 2^k] of that order (Sylvester 1867)."""
    pair = np.array([[1, 1], [1, -1]], np.float32)
    return reduce(np.kron, [pair] * (order.bit_length() - 1), np.ones((1, 1), np.float32))


def _paley(order: int) -> F32 | None:
    """Returns a Hadamard matrix [order, order] by one of Paley's constructions (1933), None where neither applies.

    Both start from the conference matrix `C = [[0, 1], [±1ᵀ, Q]]` of a prime q, Q the matrix of quadratic residues mod
    q. For q ≡ 3 (mod 4), C is skew and `C + I` is a Hadamard matrix of order q + 1. For q ≡ 1 (mod 4), C is symmetric;
    replacing its entries 0 and ±1 by two matrices of order 2 gives a Hadamard matrix of order 2(q + 1).
    """
    if order % 4 == 0 and _is_prime(order - 1):
        return _conference(order - 1, -1) + np.eye(order, dtype=np.float32)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        ones, diagonal = np.array([[1, 1], [1, -1]], np.float32), np.array([[1, -1], [-1, -1]], np.float32)
        return np.kron(_conference(order // 2 - 1, 1), ones) + np.kron(np.eye(order // 2, dtype=np.float32), diagonal)
    return None


def _conference(q: int, sign: int) -> F32:
    """Returns the conference matrix [q + 1, q + 1] of a prime q: symmetric for sign 1, skew for −1."""
    residues = np.full(q, -1, np.float32)
    residues[np.arange(1, q) ** 2 % q] = 1
    residues[0] = 0
    whole = np.zeros((q + 1, q + 1), np.float32)
    whole[0, 1:], whole[1:, 0] = 1, sign
    whole[1:, 1:] = residues[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return whole


def _is_prime(number: int) -> bool:
    """Tells whether `number` is a prime, by trial division."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _orthogonal(d: int, rng: np.random.Generator) -> NDArray[Any]:
    """Returns an orthogonal matrix [d, d], drawn uniformly from all of them (Stewart 1980)."""
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    return (q * np.sign(r.diagonal())).astype(np.float32)
