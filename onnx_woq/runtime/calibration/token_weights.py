"""Token weights for the layers that make keys and values: a token counts by the attention that it receives.

Let a [T, S] be the attention probabilities of a head and δv_t the error of the value of token t. The error of the
head's output at query i is `Σ_t a_it·δv_t`. Rounding errors of different tokens are nearly independent, so their
squares add up to `Σ_t (Σ_i a_it²)·|δv_t|²`: token t counts `Σ_i a_it²` times. Keys are weighted in the same way. RSQ
(Sung et al. 2025, "Rotate, Scale, then Quantize", section 4) weights tokens by `Σ_i a_it`, in every layer.
"""

from __future__ import annotations

import numpy as np

from onnx_woq.errors import DataError

SINK_SHARE = 0.3
"""Share of the weight of all tokens that the first one gets where an operator does not show its attention."""


def token_weights(array: np.ndarray, squares: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
    """Returns the weight of each token, [B·T]; their mean over the counted tokens of a sequence is 1.

    Args:
        array: the activation, `[B, T, K]` or `[B·T, K]`; only its shape is used.
        squares: squares of the attention probabilities summed over heads, [B, T, S], or [T, S] for one sequence; the
            last T keys are the tokens. None where they are not known; the first token then gets `SINK_SHARE`.
        mask: [B, T], True for tokens that count; None for all.

    Raises:
        DataError: the probabilities do not fit the tokens.
    """
    rows, length = _shape(array, squares, mask)
    counted = np.ones((rows, length), bool) if mask is None or mask.shape != (rows, length) else mask
    if squares is None:
        weights = np.where(counted, 1 - SINK_SHARE, 0) / np.maximum(counted.sum(axis=1, keepdims=True) - 1, 1)
        weights[np.arange(rows), counted.argmax(axis=1)] = SINK_SHARE
    else:
        weights = np.where(counted, _received(squares, rows, length, mask), 0)
    mean = weights.sum(axis=1, keepdims=True) / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    return np.divide(weights, mean, out=np.ones((rows, length)), where=mean > 0).reshape(-1)


def _received(squares: np.ndarray, rows: int, length: int, mask: np.ndarray | None) -> np.ndarray:
    """Sums `squares` [B, T, S] or [T, S] over the queries that the mask counts; returns [rows, length]."""
    if squares.ndim not in (2, 3) or rows != (len(squares) if squares.ndim == 3 else 1) or length > squares.shape[-1]:
        raise DataError(
            f"attention of shape {list(squares.shape)} does not tell how much {rows} x {length} tokens receive: "
            "give one sequence per sample, or turn attention_weighted off"
        )
    squares = squares.reshape(rows, *squares.shape[-2:])[:, :, -length:].astype(np.float64)
    asking = np.ones(squares.shape[:2]) if mask is None or mask.shape != squares.shape[:2] else mask.astype(float)
    received: np.ndarray = np.einsum("bts,bt->bs", squares, asking)
    return received


def _shape(array: np.ndarray, squares: np.ndarray | None, mask: np.ndarray | None) -> tuple[int, int]:
    """Returns the number of sequences in `array` and their length in tokens."""
    if array.ndim == 3:
        return array.shape[0], array.shape[1]
    tokens = array.size // max(1, array.shape[-1])
    known = mask if mask is not None else squares if squares is not None and squares.ndim == 3 else None
    rows = 1 if known is None else known.shape[0]
    return rows, tokens // max(1, rows)
