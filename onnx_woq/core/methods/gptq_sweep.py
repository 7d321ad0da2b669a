"""The sweep of GPTQ over the rows of a weight, and the factorization of the Gram matrix that it needs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), Algorithm 1.
Let `H̃ = H + damp·mean(diag H)·I` be the damped Gram matrix and U the upper Cholesky factor of its inverse,
`H̃⁻¹ = Uᵀ·U`. Row i of W [K, N] is rounded to ŵ_i, and its error is fed back into every later row j:

    W[j] −= U_ij / U_ii · e_i,    e_i = w_i − ŵ_i.

The paper applies this lazily, a block of rows at a time. Here a block first gathers the feedback of all finished rows
in one matrix product. It is then solved in halves: the second half begins by gathering the errors of the first.
Blocking decides which products are computed together, never what is added to a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_woq.core.lapack import cholesky, invert_lower
from onnx_woq.core.spec import Spec

logger = logging.getLogger(__name__)

Float = NDArray[np.floating[Any]]

FitGrid = Callable[..., "tuple[NDArray[np.float32], NDArray[np.uint8]]"]
"""`(weight [K, n], row weights [K]) -> (scales [G, n], zeros [G, n])`, see `core.grids.clip_search.fitter`."""

LEAF = 16  # rows solved one by one before a matrix product pays
FACTOR_EXACTLY = 2048  # inputs up to which the factorization is in float64
COPIED = 256  # rows of the Gram matrix copied at a time
DAMP_RAISES = 4  # times that damping is raised tenfold before giving up


class Sweep:
    """One sweep over the rows of some columns, in solving order.

    Attributes:
        work: [K, n], weights less the feedback gathered so far; a finished row holds its levels (code − zero point).
        error: [K, n], e = w − ŵ of finished rows.
        feedback: [K, K], see `factorize`.
        group_of: [K], the group of each row.
        scales: [G, n].
        zeros: [G, n], zero points.
        floor, ceiling: [G, n], the lowest and the highest level of each group.
    """

    def __init__(self, work: Float, feedback: Float, group_of: NDArray[np.intp], spec: Spec):
        self.work, self.error, self.feedback, self.group_of = work, np.empty_like(work), feedback, group_of
        self.scales, self.zeros = (np.ones((group_of.max() + 1, work.shape[1]), work.dtype) for _ in range(2))
        self.top = 2**spec.bits - 1
        self.floor, self.ceiling = np.empty_like(self.zeros), np.empty_like(self.zeros)

    def set_grid(self, groups: slice | int, grid: tuple[Float, NDArray[np.uint8]]) -> None:
        """Fixes the grid (scales, zeros) of some groups."""
        self.scales[groups], self.zeros[groups] = grid
        self.floor[groups], self.ceiling[groups] = -self.zeros[groups], self.top - self.zeros[groups]

    def run(self, block: int, group_size: int, grid: FitGrid | None = None, importance: Float | None = None) -> None:
        """Quantizes every row.

        Args:
            block: rows that gather their feedback in one matrix product; a multiple of `group_size`.
            group_size: rows per group, which are never split before their grid is fitted.
            grid: fits the grid of each group when its turn comes, once the feedback of all earlier rows is gathered;
                None where the grids are fixed already.
            importance: [K], row weights for `grid`.
        """
        for start in range(0, len(self.work), block):
            stop = min(start + block, len(self.work))
            self.gather(slice(start, stop), slice(0, start))
            self.finish(start, stop, group_size, grid, importance)

    # Not a function inside `run`: one that calls itself would keep the arrays alive until garbage is collected.
    def finish(self, start: int, stop: int, group_size: int, grid: FitGrid | None, importance: Float | None) -> None:
        """Quantizes rows `start` to `stop` by halves; the feedback of all rows before `start` is gathered already."""
        if grid is not None and start % group_size == 0 and stop == min(start + group_size, len(self.work)):
            rows = slice(start, stop)
            scales, zeros = grid(self.work[rows], None if importance is None else importance[rows])
            self.set_grid(start // group_size, (scales[0], zeros[0]))
        if stop - start <= (LEAF if grid is None else min(LEAF, group_size)):
            return self.finish_rows(start, stop)
        grain = group_size if stop - start > group_size else 1  # halves are cut between groups
        middle = start + max(1, (stop - start) // 2 // grain) * grain
        self.finish(start, middle, group_size, grid, importance)
        self.gather(slice(middle, stop), slice(start, middle))
        return self.finish(middle, stop, group_size, grid, importance)

    def gather(self, rows: slice, finished: slice) -> None:
        """Subtracts the feedback of `finished` rows from `rows`."""
        if finished.stop > finished.start:
            self.work[rows] -= self.feedback[rows, finished] @ self.error[finished]

    def finish_rows(self, start: int, stop: int) -> None:
        """Quantizes a few rows one by one."""
        work, error, feedback = self.work, self.error, self.feedback  # at small N this loop takes most of the time
        for row in range(start, stop):
            level, left, group = work[row], error[row], self.group_of[row]
            if row > start:
                level -= feedback[row, start:row] @ error[start:row]
            left[...] = level
            level /= self.scales[group]
            np.rint(level, out=level)
            np.maximum(level, self.floor[group], out=level)
            np.minimum(level, self.ceiling[group], out=level)
            left -= level * self.scales[group]


def factor_dtype(k: int) -> type[np.floating[Any]]:
    """Returns the dtype that the Gram matrix of k inputs is factorized in."""
    return np.float64 if k <= FACTOR_EXACTLY else np.float32


def factorize(
    gram: NDArray[np.float32], percdamp: float, order: NDArray[np.intp]
) -> tuple[Float, NDArray[np.float32]] | None:
    """Factorizes H̃⁻¹ with its rows taken in `order`, raising the damping tenfold until H̃ is positive definite.

    H̃⁻¹ is never formed. With rows and columns reversed, the lower Cholesky factor of H̃ is U⁻¹ read backwards, and
    inverting a triangle takes half the work of inverting H̃ and factorizing that.

    Args:
        gram: H [K, K].
        percdamp: damping as a share of the mean diagonal of H.
        order: [K], the rows in solving order.

    Returns:
        Feedback [K, K] and importance [K] in solving order; None when no damping makes H̃ positive definite. Entry
        (j, i) of the feedback, i < j, is `U_ij / U_ii`; entries above its diagonal are not defined. The importance of
        row i, `1 / U_ii²`, is the cost of an error in it after all later rows have made up for it as well as they can.
    """
    k = len(gram)
    dtype = factor_dtype(k)
    backwards, as_given = order[::-1], np.array_equal(order, np.arange(k))
    # Everything happens in this one buffer. LAPACK wants column order; the transpose of a symmetric matrix has it.
    buffer: Float = np.empty((k, k), dtype, order="F")
    for attempt in range(DAMP_RAISES + 1):
        damp = percdamp * 10**attempt * float(gram.diagonal().mean(dtype=np.float64))
        for rows in (slice(r, min(r + COPIED, k)) for r in range(0, k, COPIED)):
            # Some rows at a time: picking single entries of the whole matrix would take longer than inverting it.
            source = (
                gram[k - rows.stop : k - rows.start][::-1, ::-1]
                if as_given
                else gram[np.ix_(backwards[rows], backwards)]
            )
            buffer.T[rows] = source
        np.einsum("kk->k", buffer)[...] += damp  # a view of the diagonal; inputs that are always zero get one too
        if cholesky(buffer) and invert_lower(buffer):
            pivots = buffer.diagonal()[::-1].astype(np.float64)
            if np.isfinite(pivots).all():
                feedback = buffer.T[::-1, ::-1]
                feedback /= pivots.astype(dtype)
                return feedback, (1 / pivots**2).astype(np.float32)
        logger.info("gptq: the Gram matrix of %d inputs is not positive definite with %g added", k, damp)
    return None
