"""Decide on few sequences what is clear on few, and look at more for the rest.

A metric is a ratio of sums over sequences, `Σ num / Σ den`: divergence per token, noise per signal. Resampling whole
sequences (Efron 1979; Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation") says how sure it
is; two models that have seen the same sequences are compared sequence by sequence, which cancels what makes a text hard
for both. The seed is fixed: the same numbers always give the same answer.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Side = Literal["below", "above", "undecided"]

STAGES = (8, 32, 128)
"""Sequences after which a race stops to look whether more are needed."""

RESAMPLES = 2000
SURE = 0.95
"""Confidence that a statement about a model against a limit must have."""

CLEARLY = 0.99
"""Confidence that a model is worse than another, for it to drop out: comparisons are many, and there is no way back."""

SEED = 2026


def estimate(pairs: NDArray[Any]) -> float:
    """Returns `Σ num / Σ den` of pairs [S, 2], NaN if there is nothing to divide by."""
    num, den = np.asarray(pairs, np.float64).reshape(-1, 2).sum(axis=0)
    return float(num / den) if den else float("nan")


def resampled(pairs: NDArray[Any]) -> F64:
    """Returns the estimates [RESAMPLES] of as many draws of S sequences, with replacement, from pairs [S, 2].

    Equal numbers of sequences are drawn alike: differences between the results of two models are paired. A draw that
    has nothing to divide by, such as outputs of zeros, counts as 0 if nothing is lost either.
    """
    pairs = np.asarray(pairs, np.float64).reshape(-1, 2)
    draws = np.random.default_rng(SEED).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    sums = pairs[draws].sum(axis=1)
    out: F64 = np.where(sums[:, 0] > 0, np.inf, 0.0)
    return np.divide(sums[:, 0], sums[:, 1], out=out, where=sums[:, 1] != 0)


def standard_error(pairs: NDArray[Any]) -> float | None:
    """Returns the standard error of the estimate over sequences, None for fewer than two."""
    return float(resampled(pairs).std(ddof=1)) if len(pairs) > 1 else None


def side(pairs: NDArray[Any], limit: float) -> Side:
    """Tells on which side of `limit` the estimate is, as sure as `SURE`.

    A single sequence says nothing of how sure it is: its estimate decides.
    """
    found = np.array([estimate(pairs)]) if len(pairs) < 2 else resampled(pairs)
    above = float((found > limit).mean())
    return "below" if above <= 1 - SURE else "above" if above >= SURE else "undecided"


def worse(pairs: NDArray[Any], other: NDArray[Any]) -> Side:
    """Compares a model with another one on the sequences that both have seen, the first in both.

    "above" says that it is clearly worse, "below" clearly better, each as sure as `CLEARLY`.
    """
    common = min(len(pairs), len(other))
    if common < 2:
        return "undecided"
    difference = resampled(pairs[:common]) - resampled(other[:common])
    above, below = float((difference > 0).mean()), float((difference < 0).mean())
    return "above" if above >= CLEARLY else "below" if below >= CLEARLY else "undecided"
