"""How a tuning trial is judged: by the user's own evaluation, or by divergence from the float model."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq import journal
from onnx_woq.errors import DataError, OnnxWoqError
from onnx_woq.graph.model import Model

KL_LIMIT = 0.05
"""Mean KL divergence to the float model, nats per token, that the built-in judge accepts for language models."""

SQNR_LIMIT = 15.0
"""Output signal to quantization noise ratio, dB, that the built-in judge accepts for other models."""


Report = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""

Score = Callable[[Path, Report | None], float]
"""Gives a model's metric."""


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
    """

    name: str
    key: str
    score: Score
    baseline: float
    limit: float
    higher_is_better: bool
    reads: tuple[Path, ...] = ()

    def met(self, metric: float) -> bool:
        """Whether a metric is within the limit."""
        return metric >= self.limit if self.higher_is_better else metric <= self.limit

    def rank(self, metric: float) -> float:
        """A sort key: smaller is better."""
        return -metric if self.higher_is_better else metric


@dataclass(frozen=True)
class Verdict:
    """What became of judging a model: a metric, or NaN and the error; and the seconds that it took."""

    metric: float
    seconds: float
    error: str = ""


def judged(path: Path, score: Score, report: Report | None) -> Verdict:
    """The verdict on the model at `path`, an error being one too."""
    start = time.monotonic()
    try:
        return Verdict(score(path, report), time.monotonic() - start)
    except Exception as error:
        return Verdict(math.nan, time.monotonic() - start, f"{type(error).__name__}: {error}")


Looks = dict[Path, tuple[int, int]]
"""Size and time of files."""


def looks(files: Iterable[Path]) -> Looks:
    """What `judged_there` goes by to tell whether a worker sees the same files as this process."""
    found = {file: file.stat() for file in files}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in found.items()}


def judged_there(path: Path, score: bytes, files: Looks) -> Verdict:
    """`judged` in a worker, of a pickled score. Whatever goes wrong comes back as an error: what is raised is printed.

    Args:
        path: of the model, absolute.
        score: from `pickled`.
        files: what is read, and how that looks to the process that asks.
    """

    def unpickled(path: Path, report: Report | None) -> float:
        if looks(files) != files:
            raise FileNotFoundError(f"the worker sees another file than this process at {path}")
        try:
            metric: float = pickle.loads(score)(path, report)  # noqa: S301  the asking process has pickled it
        except SystemExit as end:  # would take the worker of a cluster along
            raise RuntimeError(f"it ends the program: {end}") from end
        return metric

    with _quiet():
        return judged(path, unpickled, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Where nobody has set up logging, warnings go to standard error: that is the terminal of another process."""
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
    """A judge by `eval_fn`; the float model is evaluated once, an earlier run's value in the journal counts.

    Raises:
        DataError: `eval_fn` raises, or gives no finite number, on the float model.
    """
    name = f"{getattr(eval_fn, '__module__', '')}:{getattr(eval_fn, '__qualname__', type(eval_fn).__name__)}"
    key = f"{run_key}/float/{name}"
    if known := journal.read(journal_file).get(key):
        baseline = float(known["metric"])
    else:
        baseline = _evaluate_float(eval_fn, float_model)
        journal.append(journal_file, {"key": key, "metric": baseline})
    room = tolerance * abs(baseline) if criterion == "relative" else tolerance
    limit = baseline - room if higher_is_better else baseline + room
    return Judge("eval_fn", name, partial(_evaluated, eval_fn), baseline, limit, higher_is_better)


def built_in_judge(
    float_model: Model,
    held_out: list[dict[str, np.ndarray]],
    limit: float | None,
) -> Judge:
    """A judge by mean KL divergence (language models) or output SQNR (others) on samples held out from calibration."""
    from onnx_woq.runtime.data import data_hash
    from onnx_woq.runtime.evaluate import is_language_model

    language = is_language_model(float_model, held_out[0])
    name, default, baseline = ("kl", KL_LIMIT, 0.0) if language else ("sqnr_db", SQNR_LIMIT, math.inf)

    return Judge(
        name=name,
        key=f"{name}/{data_hash(held_out)}",
        score=partial(_distance, float_model.path, held_out, name),
        baseline=baseline,
        limit=default if limit is None else limit,
        higher_is_better=not language,
        reads=float_model.files,
    )


def _evaluated(eval_fn: Callable[[Path], Any], path: Path, _: Report | None) -> float:
    return float(eval_fn(path))


def _distance(
    float_model: Path, held_out: list[dict[str, np.ndarray]], name: str, path: Path, report: Report | None
) -> float:
    from onnx_woq.runtime.evaluate import compare

    return float(getattr(compare(path, float_model, held_out, progress=report), name))


def _evaluate_float(eval_fn: Callable[[Path], Any], path: Path) -> float:
    try:
        baseline = float(eval_fn(path))
    except OnnxWoqError:
        raise
    except Exception as error:
        raise DataError(
            f"the evaluation function failed on the float model ({type(error).__name__}: {error}): "
            "it must take the path of an .onnx file and return a number"
        ) from error
    if not math.isfinite(baseline):
        raise DataError(
            f"the evaluation function gives {baseline} for the float model: nothing can be compared with it"
        )
    return baseline
