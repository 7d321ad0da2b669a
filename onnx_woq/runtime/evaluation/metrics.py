"""Metrics of a quantized model against its float original.

Both models run in step, sample by sample, so that only the outputs of one sample are held at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.data.inputs import MASKS
from onnx_woq.runtime.evaluation.outputs import (
    is_language_model,
    judging_session,
    logits_mask,
    mask_of,
    signals,
    token_ids,
)
from onnx_woq.runtime.session import run

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_CHUNK = 1 << 22  # logits compared at a time: 32 MB in float64


@dataclass(frozen=True)
class Metrics:
    """The distance of a model from its reference on some data. A model that computes NaN has NaN metrics.

    Attributes:
        kind: "lm" for language models, "tensor" for all others.
        tokens: tokens compared (lm), or rows of the first output (tensor).
        kl: mean of KL(reference ‖ model) over tokens, nats.
        kl_se: its standard error over sequences, nats; None for fewer than two sequences.
        top1: share of tokens after which both models find the same next token most likely.
        ppl: perplexity of the model; None without a token to predict.
        ppl_ref: perplexity of the reference.
        sqnr_db: ratio of signal to quantization noise over all float outputs, dB; infinite if they are equal.
        cosine: mean cosine between rows of the first float output; token vectors are averaged over each sequence first.
    """

    kind: Literal["lm", "tensor"]
    tokens: int
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    ppl: float | None = None
    ppl_ref: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary of all fields; numbers may be NaN or infinite."""
        return asdict(self)


def compare(
    model: str | Path, reference: str | Path, feeds: Sequence[Feed], *, progress: Progress | None = None
) -> Metrics:
    """Runs both models on every sample and compares their outputs.

    Tokens where a fed attention mask is 0 do not count.

    Args:
        model: the quantized .onnx file.
        reference: the float .onnx file.
        feeds: samples, from `runtime.data.feeds.feeds`.
        progress: called after each sample.

    Raises:
        DataError: there are no samples, or a model cannot be run on one.
        ModelError: a model cannot be run, or the two do not have the same outputs.
    """
    tally = None
    for number, tally in enumerate(_tallies(model, reference, feeds)):  # noqa: B007
        if progress:
            progress(number + 1, len(feeds))
    if tally is None:
        raise DataError("evaluation needs at least one sample")
    return tally.metrics()


def distances(model: str | Path, reference: str | Path, feeds: Sequence[Feed]) -> Iterator[tuple[float, float]]:
    """Yields the distance of `model` from the reference on each sample, one sample at a time.

    A distance is a pair of numbers. Summed over samples, the pairs give the metric: KL divergence in nats and tokens
    for language models, energy of the noise and of the signal for others.

    Args:
        model: the quantized .onnx file.
        reference: the float .onnx file.
        feeds: samples.

    Raises:
        DataError: a model cannot be run on a sample.
        ModelError: a model cannot be run, or the two do not have the same outputs.
    """
    seen = 0
    for tally in _tallies(model, reference, feeds):
        new = tally.pairs[seen:]
        seen = len(tally.pairs)
        yield sum(pair[0] for pair in new), sum(pair[1] for pair in new)


def _tallies(
    model: str | Path, reference: str | Path, feeds: Sequence[Feed]
) -> Iterator[_LanguageTally | _TensorTally]:
    """Yields the sums over all samples so far, after each sample."""
    if not feeds:
        return
    language = is_language_model(load(reference, convert=True), feeds[0])
    pair = judging_session(reference), judging_session(model)
    tally = _LanguageTally() if language else _TensorTally(_float_outputs(pair))
    for number, feed in enumerate(feeds):
        label = f"sample {number + 1}"
        expected, actual = (run(session, tally.outputs, _needed(session, feed, label), label) for session in pair)
        with np.errstate(all="ignore"):  # NaN and infinity are valid results
            tally.add(expected, actual, feed)
        yield tally


def _needed(session: ort.InferenceSession, feed: Feed, label: str) -> Feed:
    """Returns the arrays of `feed` that a session takes; raises a DataError if one is missing."""
    types = {value.name: value.type for value in session.get_inputs()}
    if missing := [name for name in types if name not in feed]:
        raise DataError(f"{label} has no {', '.join(missing)}, which one of the models takes")
    return {
        name: feed[name].astype(np.float32, copy=False) if kind == "tensor(float)" else feed[name]
        for name, kind in types.items()
    }


def _float_outputs(pair: tuple[ort.InferenceSession, ort.InferenceSession]) -> list[str]:
    """Returns the names of the float outputs that both models have, in the order of the first."""
    first, second = ([value.name for value in s.get_outputs() if value.type in _FLOATS] for s in pair)
    common = [name for name in first if name in second]
    if not common:
        raise DataError(f"the models have no float output in common: {', '.join(first)} and {', '.join(second)}")
    return common


@dataclass
class _LanguageTally:
    """Sums over the tokens of a language model.

    Attributes:
        counts: tokens of each sequence.
        divergences: KL divergence of each sequence, nats.
        agreements: tokens after which both models find the same next token most likely.
        predicted: tokens whose next token is known.
        losses: negative log likelihood of these next tokens, of the reference and of the model, nats.
        outputs: names of the outputs that are compared.
    """

    counts: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: float = 0.0
    predicted: int = 0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    outputs: Sequence[str] = ("logits",)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Returns divergence and tokens of each sequence."""
        return list(zip(self.divergences, map(float, self.counts), strict=True))

    def add(self, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], feed: Feed) -> None:
        """Adds one sample.

        Args:
            expected: logits [B, S, V] of the reference, of the last S tokens.
            actual: logits [B, S, V] of the model.
            feed: the sample.

        Raises:
            DataError: the logits have another shape than the tokens.
        """
        if expected[0].shape != actual[0].shape:
            raise DataError(f"the logits have shapes {list(expected[0].shape)} and {list(actual[0].shape)}")
        mask = logits_mask(feed, expected[0].shape)
        ids = np.asarray(token_ids(feed))[:, -mask.shape[1] :]
        for row in range(len(ids)):
            follows = np.append(mask[row, 1:] & mask[row, :-1], False)
            targets = np.append(ids[row, 1:], 0)
            divergence, count = 0.0, 0
            step = max(1, _CHUNK // expected[0].shape[-1])
            for start in range(0, ids.shape[1], step):
                part = slice(start, start + step)
                p, q = _log_softmax(expected[0][row, part]), _log_softmax(actual[0][row, part])
                keep, next_known = mask[row, part], follows[part]
                divergence += float(_divergence(p, q)[keep].sum())
                self.agreements += float(_agreement(p, q)[keep].sum())
                count += int(keep.sum())
                self.predicted += int(next_known.sum())
                for model, logp in enumerate((p, q)):
                    self.losses[model] -= float(logp[np.arange(len(logp)), targets[part]][next_known].sum())
            self.counts.append(count)
            self.divergences.append(divergence)

    def metrics(self) -> Metrics:
        """Returns the means over all tokens; raises a DataError if no token counts."""
        tokens = sum(self.counts)
        if not tokens:
            raise DataError("the attention masks leave no token to compare: check them")
        kl = sum(self.divergences) / tokens
        perplexities = [_exp(loss / self.predicted) if self.predicted else None for loss in self.losses]
        return Metrics(
            kind="lm",
            tokens=tokens,
            kl=kl,
            kl_se=self._standard_error(kl, tokens),
            top1=self.agreements / tokens,
            ppl=perplexities[1],
            ppl_ref=perplexities[0],
        )

    def _standard_error(self, kl: float, tokens: int) -> float | None:
        """Returns the standard error of the mean divergence as a ratio of sums over sequences.

        For sequences of equal length this is the standard error of their mean.
        """
        n = len(self.counts)
        if n < 2:
            return None
        squares = sum((total - kl * count) ** 2 for total, count in zip(self.divergences, self.counts, strict=True))
        return math.sqrt(squares * n / (n - 1)) / tokens


@dataclass
class _TensorTally:
    """Sums over the float outputs of any other model.

    Attributes:
        outputs: names of the outputs that are compared.
        pairs: energy of the noise and of the signal of each sample.
        cosines: sum of the cosines of all rows.
        rows: rows of the first output so far.
    """

    outputs: Sequence[str]
    pairs: list[tuple[float, float]] = field(default_factory=list)
    cosines: float = 0.0
    rows: int = 0

    def add(self, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], feed: Feed) -> None:
        """Adds one sample.

        Args:
            expected: arrays of `outputs`, of the reference.
            actual: arrays of `outputs`, of the model.
            feed: the sample.

        Raises:
            DataError: an output has another shape in the two models.
        """
        signal = noise = 0.0
        for name, want, have in zip(self.outputs, expected, actual, strict=True):
            if want.shape != have.shape:
                raise DataError(
                    f"output {name!r} has shape {list(want.shape)} in one model, {list(have.shape)} in the other"
                )
            want, have = (_counted(array, feed) for array in signals(want, have))
            signal += float(np.square(want).sum())
            noise += float(np.square(want - have).sum())
        self.pairs.append((noise, signal))
        a, b = (_vectors(array, feed) for array in signals(expected[0], actual[0]))
        size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        same = (a == b).all(axis=-1)  # two equal vectors of zeros point the same way
        self.cosines += float(np.where(same, 1.0, (a * b).sum(axis=-1) / size).sum())
        self.rows += len(a)

    def metrics(self) -> Metrics:
        """Returns the metrics over all samples."""
        noise, signal = (sum(column) for column in zip(*self.pairs, strict=True)) if self.pairs else (0.0, 0.0)
        cosine = self.cosines / self.rows if self.rows else None
        return Metrics(kind="tensor", tokens=self.rows, sqnr_db=decibels(noise, signal), cosine=cosine)


def decibels(noise: float, signal: float) -> float:
    """Returns the ratio of signal to noise in dB, given the energies of both; infinite without noise."""
    ratio = math.inf if noise == 0 else signal / noise
    return ratio if not math.isfinite(ratio) else 10 * math.log10(ratio) if ratio else -math.inf


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log probabilities of `logits [T, V]`, float64 [T, V]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def divergence(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns KL(p ‖ q) of each token in nats, [T]; p is given by `logits [T, V]`, q by `other [T, V]`."""
    return _divergence(_log_softmax(logits), _log_softmax(other))


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns KL(p ‖ q) of each token [T], p and q given as log probabilities [T, V]."""
    weights = np.exp(p)
    terms = weights * (p - q)
    terms[weights == 0] = 0  # an impossible token adds nothing, even where q is 0 too
    return np.maximum(terms.sum(axis=-1), 0)  # rounding may leave it just below zero


def _agreement(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns for each token [T] 1 if both find the same next token most likely, 0 if not, NaN if one gives NaN."""
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(np.float64)
    same[np.isnan(p).any(axis=-1) | np.isnan(q).any(axis=-1)] = np.nan
    return same


def _counted(array: np.ndarray, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the entries of an output, without those of masked tokens."""
    return array[mask_of(feed, array.shape[:2])] if array.ndim > 2 else array


def _vectors(array: np.ndarray, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns an output as rows [R, D]; token vectors [B, T, D] become their mean over each sequence."""
    masked = any(name in feed and feed[name].shape == array.shape[:2] for name in MASKS)
    if array.ndim == 3 and masked:
        mask = mask_of(feed, array.shape[:2])[..., None]
        return (array * mask).sum(axis=1) / mask.sum(axis=1)
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _exp(x: float) -> float:
    """Returns e^x, infinity where that overflows."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
