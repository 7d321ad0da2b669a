"""The judge of tuning trials: the user's own evaluation, or the divergence from the float model.

The built-in judge is a race (`onnx_woq.tuning.bootstrap`): every model is seen on the same samples,
few where that is clear, more where it is close; what stays too close to call is called undecided.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.custom_ops import custom_operators, registered
from onnx_woq.tuning import bootstrap, journal
from onnx_woq.tuning.failures import failure_of
from onnx_woq.tuning.metric import measure, measure_float

KL_LIMIT = 0.05
"""Mean KL divergence to the float model, nats per token, that the built-in judge accepts for language models."""

SQNR_LIMIT = 15.0
"""Output signal to quantization noise ratio, dB, that the built-in judge accepts for other models."""


Report = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""

Pair = tuple[float, float]
"""The numerator and denominator of one sample, summed up over samples to give a metric, see `bootstrap.estimate`."""


@dataclass(frozen=True)
class Runner:
    """A model in a race: where it is, if it is kept, and how it did on the first samples."""

    path: Path | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Measured:
    """The measurement of the built-in judge: metric, samples, and those of the leader, which may be more."""

    metric: float
    pairs: tuple[Pair, ...]
    leader: tuple[Pair, ...] = ()
    dropped: bool = False


Score = Callable[..., "float | Measured"]
"""`(path, report)` gives a model's metric; the built-in one takes the `Runner` to beat as well."""

Outcome = Literal["within", "outside", "undecided"]


@dataclass(frozen=True)
class Judge:
    """A score against `limit`.

    Attributes:
        name: of the metric: "eval_fn", "kl" (nats per token) or "sqnr_db" (dB).
        key: what identifies it in a journal, its data included.
        score: gives the metric; can be pickled if the user's function can.
        baseline: the float model's metric.
        limit: the last value that is accepted.
        reads: files that `score` reads beside the model that is judged.
        races: whether `score` gives `Measured` and takes a leader.
    """

    name: str
    key: str
    score: Score
    baseline: float
    limit: float
    higher_is_better: bool
    reads: tuple[Path, ...] = ()
    races: bool = False

    def met(self, metric: float) -> bool:
        """Tells whether a metric is within the limit."""
        return metric >= self.limit if self.higher_is_better else metric <= self.limit

    def counts(self, metric: float) -> bool:
        """Tells whether a metric is a number that models are compared by: finite, or that of the float model."""
        return math.isfinite(metric) or metric == self.baseline

    def metric(self, pairs: Sequence[Pair]) -> float:
        """Returns the metric that the samples of a race add up to."""
        return _metric(self.name, pairs)

    def outcome(self, metric: float, pairs: Sequence[Pair] = ()) -> Outcome:
        """Tells on which side of the limit a model is, as far as the samples `pairs` can tell."""
        if not pairs:
            return "within" if self.met(metric) else "outside"
        side = bootstrap.side(np.array(pairs), _ratio(self.name, self.limit))
        return {"below": "within", "above": "outside", "undecided": "undecided"}[side]  # type: ignore[return-value]

    def rank(self, metric: float) -> float:
        """Returns a sort key: smaller is better."""
        return -metric if self.higher_is_better else metric


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model: a metric, or NaN and the error; and the seconds that it took.

    `measured` holds what a race gave, and `fault` says that the error is one of this program.
    """

    metric: float
    seconds: float
    error: str = ""
    measured: Measured | None = None
    fault: bool = False


def judge_model(path: Path, score: Score, report: Report | None, leader: Runner | None = None) -> Verdict:
    """Returns the verdict on the model at `path`; an error is a verdict too.

    Raises:
        OnnxWoqError: the error is not that of this model, see `failure_of`.
    """
    start = time.monotonic()
    try:
        found = score(path, report) if leader is None else score(path, report, leader)
        measured = found if isinstance(found, Measured) else None
        metric = found.metric if isinstance(found, Measured) else found
        return Verdict(metric, time.monotonic() - start, measured=measured)
    except Exception as error:
        failed = failure_of(error, path)
        return Verdict(math.nan, time.monotonic() - start, failed.text, fault=failed.status == "fault")


FileStamps = dict[Path, tuple[int, int]]
"""Size and time of files."""


def stamp_files(files: Iterable[Path]) -> FileStamps:
    """Returns size and time of files, by which `judge_remotely` tells whether a worker sees the same ones."""
    found = {file: file.stat() for file in files}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in found.items()}


def judge_remotely(path: Path, score: bytes, files: FileStamps, leader: Runner | None = None) -> Verdict:
    """Judges a model in a worker, by a pickled score.

    An error of the model, the score or the worker comes back as a verdict, with its message.

    Args:
        path: of the model, absolute.
        score: from `pickled`.
        files: what is read, and how that looks to the process that asks.
        leader: of the race, if there is one.
    """

    with _quiet():
        try:
            if stamp_files(files) != files:
                raise FileNotFoundError(f"the worker sees another file than this process at {path}")
            measure_it: Score = pickle.loads(score)  # noqa: S301  the asking process pickled it
        except (Exception, SystemExit) as error:  # the latter would take the worker of a cluster along
            return Verdict(math.nan, 0.0, f"{type(error).__name__}: {error}")
        return judge_model(path, measure_it, None, leader)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps a worker from writing warnings to standard error where nobody set up logging: it is another's terminal."""
    package, nowhere = logging.getLogger("onnx_woq"), logging.NullHandler()
    package.addHandler(nowhere)
    try:
        yield
    finally:
        package.removeHandler(nowhere)


def user_judge(
    eval_fn: Callable[[Path], float],
    float_model: Path,
    journal_file: Path,
    run_key: str,
    *,
    tolerance: float,
    criterion: str,
    higher_is_better: bool,
) -> Judge:
    """Makes a judge of `eval_fn`; the float model is evaluated once, or its value is in the journal.

    Raises:
        EvaluationError: `eval_fn` raises, ends the program, or gives no finite number, on the float model.
    """
    name = f"{getattr(eval_fn, '__module__', '')}:{getattr(eval_fn, '__qualname__', type(eval_fn).__name__)}"
    key = f"{run_key}/float/{name}"
    baseline = journal.read(journal_file).get(key, {}).get("metric")
    if not isinstance(baseline, int | float) or not math.isfinite(baseline):
        baseline = measure_float(eval_fn, float_model)
        journal.append(journal_file, {"key": key, "metric": baseline})
    room = tolerance * abs(baseline) if criterion == "relative" else tolerance
    limit = baseline - room if higher_is_better else baseline + room
    return Judge("eval_fn", name, partial(_evaluated, eval_fn), baseline, limit, higher_is_better)


def built_in_judge(
    float_model: Model,
    held_out: list[dict[str, np.ndarray]],
    limit: float | None,
) -> Judge:
    """Makes a judge by mean KL divergence (language models) or output SQNR (others) on held-out samples.

    An infinite `limit` accepts everything.

    Raises:
        DataError: the model has no output that it could be judged by.
    """
    from onnx_woq.runtime.data.feeds import data_hash
    from onnx_woq.runtime.evaluation.outputs import float_outputs, is_language_model

    float_outputs(float_model)
    language = is_language_model(float_model, held_out[0])
    name, default, baseline = ("kl", KL_LIMIT, 0.0) if language else ("sqnr_db", SQNR_LIMIT, math.inf)

    limit = default if limit is None else limit
    if math.isinf(limit):
        limit = math.inf if language else -math.inf
    return Judge(
        name=name,
        key=f"{name}/{data_hash(held_out)}",
        score=partial(_race, float_model.path, held_out, name, limit, registered()),
        baseline=baseline,
        limit=limit,
        higher_is_better=not language,
        reads=float_model.files,
        races=True,
    )


def _evaluated(eval_fn: Callable[[Path], Any], path: Path, _: Report | None) -> float:
    return measure(eval_fn, path)


def _race(
    float_model: Path,
    held_out: list[dict[str, np.ndarray]],
    name: str,
    limit: float,
    custom_ops: tuple[str, ...],
    path: Path,
    report: Report | None,
    leader: Runner | None = None,
) -> Measured:
    """Sees the model at `path` on samples until it is clear what it is, beside the limit and beside the leader."""
    with custom_operators(custom_ops):  # a worker has not been told of them
        return _raced(float_model, held_out, name, limit, path, report, leader)


def _raced(
    float_model: Path,
    held_out: list[dict[str, np.ndarray]],
    name: str,
    limit: float,
    path: Path,
    report: Report | None,
    leader: Runner | None,
) -> Measured:
    from onnx_woq.runtime.evaluation.metrics import distances

    own, best = list[Pair](), list(leader.pairs if leader else ())
    each_own = distances(path, float_model, held_out)
    each_best = (
        iter(())
        if leader is None or leader.path is None
        else distances(leader.path, float_model, held_out[len(best) :])
    )
    dropped = False
    for stage in [*(stage for stage in bootstrap.STAGES if stage < len(held_out)), len(held_out)]:
        for number, pair in enumerate(islice(each_own, stage - len(own)), len(own) + 1):
            own.append(pair)
            if report:
                report(number, stage)
        best += islice(each_best, max(0, stage - len(best)))
        if not math.isfinite(bootstrap.estimate(np.array(own))):
            break
        beside = bootstrap.worse(np.array(own), np.array(best)) if leader else "below"
        dropped = beside == "above"
        if dropped or (beside == "below" and bootstrap.side(np.array(own), _ratio(name, limit)) != "undecided"):
            break
    return Measured(_metric(name, own), tuple(own), tuple(best), dropped)


def _metric(name: str, pairs: Sequence[Pair]) -> float:
    from onnx_woq.runtime.evaluation.metrics import decibels

    num, den = (sum(column) for column in zip(*pairs, strict=True))
    return decibels(num, den) if name == "sqnr_db" else bootstrap.estimate(np.array(pairs))


def _ratio(name: str, limit: float) -> float:
    """Returns the limit in the unit that samples are summed up in: noise per signal instead of decibels."""
    return float(10 ** (-limit / 10)) if name == "sqnr_db" else limit
