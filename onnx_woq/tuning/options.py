"""Options of `tune()`: what it calibrates on, how a model is evaluated, what is searched, and with which resources."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from onnx_woq.errors import RecipeError, nearest
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.custom_ops import CustomOps

Objective = Literal["first", "smallest", "best", "pareto"]
Criterion = Literal["relative", "absolute"]


@dataclass(frozen=True)
class CalibrationData:
    """Samples that models are calibrated on, and judged on where no evaluation function is given.

    Attributes:
        source: in any form that `quantize` takes: an iterable, a path, or "random".
        samples: replaces the `nsamples` of every recipe; an error then when there are fewer.
        seqlen: tokens per sample, replaces the `pad_max_length` of every recipe.
        tokenizer: folder of the tokenizer for text, when it is not beside the model.
    """

    source: Any = None
    samples: int | None = None
    seqlen: int | None = None
    tokenizer: str | Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """The number that a model is judged by, and how much of it may be lost.

    Attributes:
        eval_fn: gets the path of an .onnx file and returns its metric. Without it the built-in judge is used.
        tolerance: how much worse than the float model's metric is accepted.
        criterion: the tolerance is a fraction of the float metric ("relative") or a difference ("absolute").
        higher_is_better: direction of the metric.
        judge_limit: replaces the limit of the built-in judge: nats per token, or dB for models without logits.
    """

    eval_fn: Callable[[Path], float] | None = None
    tolerance: float = 0.01
    criterion: Criterion = "relative"
    higher_is_better: bool = True
    judge_limit: float | None = None

    def __post_init__(self) -> None:
        _require_known("criterion", self.criterion, ("relative", "absolute"))
        if not math.isfinite(self.tolerance) or self.tolerance < 0:
            raise RecipeError(f"tolerance={self.tolerance!r} must be a number of at least 0")
        if self.judge_limit is not None and not math.isfinite(self.judge_limit):
            raise RecipeError(f"tolerance {self.judge_limit!r} must be a number: nats per token, or dB without logits")


@dataclass(frozen=True)
class Search:
    """The configurations that are tried, which of them wins, and when to stop.

    Attributes:
        configs: preset names or recipes, in tuning order; the presets in `TUNED` by default. With a budget for mixed
            precision, the first is what mixes are made with, and all of them are tried beside the mixes as they are.
        objective: "first" stops at the first configuration within the tolerance; "smallest" tries all and takes the
            fewest bytes within it; "best" tries all and takes the best metric; "pareto" mixes precisions, measures
            along the whole frontier and takes the smallest model within the tolerance.
        target_bpw: a budget: mix precisions for the least loss within so many bits per weight.
        target_size: a budget: likewise within so many bytes of the files written.
        max_kl: a budget: mix precisions for the fewest bytes within so many nats per token.
        max_loss: a budget: likewise with the metric worse than the float model's by at most so much.
        points: mixes measured along the frontier beside what a budget needs; 6 for "pareto", none otherwise.
        max_trials: trials at most, those of a resumed run included.
        timeout: seconds; no trial starts later, and one being solved is given up.
    """

    configs: str | Sequence[str | Recipe] | Mapping[str, Recipe] | None = None
    objective: Objective = "first"
    target_bpw: float | None = None
    target_size: int | None = None
    max_kl: float | None = None
    max_loss: float | None = None
    points: int | None = None
    max_trials: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        _require_known("objective", self.objective, ("first", "smallest", "best", "pareto"))
        if self.max_trials is not None and self.max_trials < 1:
            raise RecipeError(f"max_trials={self.max_trials!r} must be at least 1")
        if self.timeout is not None and not self.timeout > 0:
            raise RecipeError(f"timeout={self.timeout!r} must be more than 0 seconds")


@dataclass(frozen=True)
class RunResources:
    """Resources of a run, and whom to tell of it.

    Attributes:
        max_memory: bytes that the whole process may take; by default it takes what makes it fast.
        executor: solves weights, anything with the protocol of `concurrent.futures`. If its tasks run in other
            processes and the objective is "smallest" or "best", a trial is evaluated there while the next one is solved
            here, and what `eval_fn` writes into variables stays there.
        progress: called with (stage, done, total).
        announce: called with a line for people on what memory and disk the run will take, before the work begins.
        custom_ops: a library of custom operators that the model needs, or several.
        verify: open every result in ONNX Runtime before it takes its place; one that does not open fails.
        convert: begin with what `onnx_woq.convert` makes of the model.
    """

    max_memory: int | None = None
    executor: Executor | None = None
    progress: Progress | None = None
    announce: Callable[[str], None] | None = None
    custom_ops: CustomOps = None
    verify: bool = True
    convert: bool = False


@dataclass(frozen=True)
class TuneOptions:
    """All options of a run."""

    data: CalibrationData
    evaluation: Evaluation
    search: Search
    resources: RunResources


def gather_options(
    data: CalibrationData | None,
    evaluation: Evaluation | None,
    search: Search | None,
    resources: RunResources | None,
    keywords: Mapping[str, Any],
) -> TuneOptions:
    """Returns the options with the fields that plain keywords name replaced.

    Args:
        data, evaluation, search, resources: as given to `tune`; None for defaults.
        keywords: names of fields of any of them, with their values.

    Raises:
        TypeError: no option has the name of a keyword; the message names the nearest.
        RecipeError: a value is out of range.
    """
    given = (data or CalibrationData(), evaluation or Evaluation(), search or Search(), resources or RunResources())
    known = [field.name for options in given for field in fields(options)]
    for name in keywords:
        if name not in known:
            raise TypeError(f"tune() has no argument {name!r}: {nearest(name, known)}")
    changed = [
        replace(options, **{field.name: keywords[field.name] for field in fields(options) if field.name in keywords})
        for options in given
    ]
    return TuneOptions(*changed)  # type: ignore[arg-type]


def _require_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(f"unknown {name} {value!r}: {nearest(str(value), known)}")
