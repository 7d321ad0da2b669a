"""The distance of a model's outputs from those of the float model, summed up sample by sample in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.evaluation.metrics import divergence
from onnx_woq.runtime.evaluation.outputs import float_outputs, is_language_model, logits_mask

Measure = Callable[[Feed], float]
"""`(outputs of one sample) -> what they add to the distance`, before the sum is divided."""

_CHUNK = 1 << 21  # logits compared at a time


class OutputDistance:
    """The distance of outputs from those of the float model.

    For a language model it is the mean KL divergence over tokens, in nats. For any other model it is the share of noise
    in the float outputs, `Σ (y − ŷ)² / Σ y²`.

    Attributes:
        language: True for a language model.
        outputs: names of the outputs that count.
        size: the number that sums are divided by: tokens, or the energy of the float outputs.
    """

    def __init__(self, model: Model, feeds: Sequence[Feed]) -> None:
        self.language = is_language_model(model, feeds[0])
        self.outputs = {"logits"} if self.language else set(float_outputs(model))
        self.size = 0.0
        self._sized: set[tuple[int, str]] = set()

    def measure(self, reference: Feed, feed: Feed) -> Measure:
        """Returns a function that measures the outputs of one sample; adds the sample to `size` the first time.

        Args:
            reference: outputs of the float model that are measured against.
            feed: the sample.
        """
        parts = {name: self._part(array, feed) for name, array in reference.items()}
        for name, array in reference.items():
            if (id(feed), name) not in self._sized:
                self._sized.add((id(feed), name))
                self.size += float(logits_mask(feed, array.shape).sum()) if self.language else _signal(array)
        return lambda computed: sum(part(computed[name]) for name, part in parts.items())

    def _part(self, reference: np.ndarray, feed: Feed) -> Callable[[np.ndarray], float]:
        """Returns a function that measures one output of one sample."""
        if not self.language:
            return lambda array: _noise(array, reference)
        mask = logits_mask(feed, reference.shape)
        logits = reference[mask]
        shares = _softmax(logits)
        return lambda array: _divergence(logits, shares, array[mask])

    def distance(self, total: float, name: str) -> float:
        """Returns the distance that a sum of measures gives.

        Args:
            total: sum over all samples.
            name: name of the replaced weight in the message.

        Raises:
            DataError: it is not finite.
        """
        found = total / self.size if self.size else math.nan
        if not math.isfinite(found):
            raise DataError(f"the outputs are no finite numbers once the weight of {name!r} is another one: exclude it")
        return found


def _signal(array: np.ndarray) -> float:
    """Returns the energy of an output, without numbers so large that they say "never" in a mask."""
    never = np.abs(array) >= np.finfo(array.dtype).max
    return float(np.square(np.where(never, 0, array), dtype=np.float64).sum())


def _noise(array: np.ndarray, reference: np.ndarray) -> float:
    """Returns the energy of what an output differs by; the same infinity in both is no difference."""
    with np.errstate(invalid="ignore"):
        delta = np.where(array == reference, 0, array - reference)
    return float(np.square(delta, dtype=np.float64).sum())


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of `logits [T, V]`, float32 [T, V]."""
    shares: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares


def _divergence(logits: np.ndarray, shares: np.ndarray, other: np.ndarray) -> float:
    """Returns the sum over tokens of KL(p ‖ q) in nats.

    With d = other − logits, `q = p·exp(d) / E_p[exp(d)]`, so the divergence is `log E_p[exp(d)] − E_p[d]`. This is a
    difference of small numbers, for which float32 is enough; two log-softmaxes would give one of large numbers.

    Args:
        logits: [T, V] of the float model.
        shares: [T, V], the probabilities p that these logits give.
        other: [T, V], logits that give q.
    """
    total, step = 0.0, max(1, _CHUNK // logits.shape[-1])
    for rows in (slice(i, i + step) for i in range(0, len(logits), step)):
        with np.errstate(over="ignore", invalid="ignore"):
            d = other[rows] - logits[rows]
            d -= np.einsum("tv,tv->t", shares[rows], d)[:, None]
            np.exp(d, out=d)
            d -= 1
            found = np.log1p(np.einsum("tv,tv->t", shares[rows], d).astype(np.float64))
        if not np.isfinite(found).all():  # exp overflowed
            found = divergence(logits[rows], other[rows])
        total += float(np.maximum(found, 0).sum())
    return total
