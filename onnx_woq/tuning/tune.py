"""The corridor `tune()`: try configurations in order, on one calibration, until the accuracy holds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from onnx_woq.engine.calibration_data import calibrated_on, feeds_hash, read_data
from onnx_woq.engine.executors import leaves_process
from onnx_woq.engine.metadata import warn_of_old_runtime
from onnx_woq.engine.output import Destination, destination, write
from onnx_woq.engine.plan import Plan, PlannedWeight, make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.errors import DataError, NothingToQuantize, RecipeError, nearest
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import Model, file_bytes, load, model_hash
from onnx_woq.presets import TUNED, preset
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.targets.registry import required_runtime
from onnx_woq.tuning import bootstrap as racing
from onnx_woq.tuning.budget import budget_of, check_reachable
from onnx_woq.tuning.judge import Judge, built_in_judge, user_judge
from onnx_woq.tuning.mixed.search import MIX, Mixed, limit_of, mix_candidates, mixed
from onnx_woq.tuning.mixed.sensitivity import statistics_recipe
from onnx_woq.tuning.results import Trial, TuneResult
from onnx_woq.tuning.trials import Run, drop, each_trial, made_again
from onnx_woq.tuning.work_folder import work_folder

logger = logging.getLogger(__name__)

HELD_OUT = 8
"""Samples held out for the built-in judge at least; a third of what there is when the data is short."""

MOST_HELD_OUT = racing.STAGES[-1]
"""Samples that are held out where the data has them to spare: they are looked at only where it is close."""

Objective = Literal["first", "smallest", "best", "pareto"]


def tune(
    model: str | Path,
    eval_fn: Callable[[Path], float] | None = None,
    dataloader: Any = None,
    *,
    configs: Sequence[str | Recipe] | Mapping[str, Recipe] | None = None,
    tolerance: float = 0.01,
    criterion: Literal["relative", "absolute"] = "relative",
    higher_is_better: bool = True,
    objective: Objective = "first",
    max_trials: int | None = None,
    timeout: float | None = None,
    workdir: str | Path | None = None,
    output: str | Path | None = None,
    judge_limit: float | None = None,
    target_bpw: float | None = None,
    target_size: int | None = None,
    max_kl: float | None = None,
    max_loss: float | None = None,
    points: int | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    tokenizer: str | Path | None = None,
    max_memory: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> TuneResult:
    """Quantizes `model` with one configuration after another until the accuracy holds.

    The float model is evaluated once and calibrated once for all configurations. A trial that raises or gives NaN
    is recorded and the next goes on. The best model so far is always returned.

    Args:
        model: an .onnx file, or a folder that holds one.
        eval_fn: gets the path of an .onnx file, returns its metric. Without it the built-in judge is used: mean KL
            divergence to the float model (language models, limit `KL_LIMIT`) or output SQNR (others, `SQNR_LIMIT`)
            on data held out from calibration.
        dataloader: calibration data, in any form that `quantize` takes.
        configs: preset names or recipes, in tuning order; the presets in `TUNED` by default. With a target for mixed
            precision, the first is what mixes are made with (method, options, what is quantized), and all of them are
            tried beside the mixes as they are, those beyond a target of bytes only with `points`; by default `MIX`.
        tolerance: how much worse than the float model's metric is accepted.
        criterion: the tolerance is a fraction of the float metric ("relative") or a difference ("absolute").
        higher_is_better: direction of `eval_fn`'s metric.
        objective: "first" stops at the first configuration within the tolerance; "smallest" tries all and takes the
            fewest bytes within it; "best" tries all and takes the best metric; "pareto" mixes precisions, measures
            along the whole frontier (`TuneResult.frontier`) and takes the smallest model within the tolerance.
        max_trials: trials at most, those of a resumed run included.
        timeout: seconds; no trial starts later, and one being solved is given up.
        workdir: folder of the journal and the trial models; a run killed there resumes. Temporary by default. The
            journal knows `eval_fn` by its name: give another folder when what it does has changed.
        output: where the best model goes, an .onnx file or a folder; by default it stays in `workdir`.
        judge_limit: replaces the built-in judge's limit.
        target_bpw: mix precisions for the least loss within so many bits per weight, scales and zero points included,
            over all weights that the configuration selects.
        target_size: likewise within so many bytes of the files written, never exceeded.
        max_kl: mix precisions for the fewest bytes with a mean KL divergence within so many nats per token.
        max_loss: likewise with `eval_fn`'s metric worse than the float model's by at most so much, as a difference.
        points: mixes measured along the frontier beside what a target needs; 6 for "pareto", none otherwise.
        samples, seqlen: replace `nsamples` and `pad_max_length` of every recipe. All share one calibration, on the
            most samples that any of them asks for.
        tokenizer: folder of the tokenizer for text data, when it is not beside the model.
        max_memory: bytes that the whole process may take; by default it takes what makes it fast.
        executor: where taps are solved, see `quantize`. If its tasks run in other processes and the objective is
            "smallest" or "best", a trial is evaluated there while the next one is solved here: the result is the same,
            and what `eval_fn` writes into variables stays there. Only a number counts: an evaluation that cannot be
            sent there, is lost or raises is done here. The disk then takes three models at a time instead of two.
        progress: called with (stage, done, total).
        announce: called with a line for people on what memory and disk it will take, before the work begins.

    Raises:
        OnnxWoqError: model, data, configs or output cannot be used at all.
        DiskError: the disk is full, or fails; with `workdir` the same call goes on from there.
    """
    start = time.monotonic()
    _check(tolerance, judge_limit, criterion, objective, max_trials, timeout)
    target = budget_of(objective, target_bpw, target_size, max_kl, max_loss, has_metric=eval_fn is not None)
    path = find_model(model)
    place = destination(output, path) if output is not None else None
    recipes = _recipes({"mixes": MIX} if target and configs is None else configs, samples, seqlen)
    source = load(path)
    _some_apply(source, recipes)
    base = next(iter(recipes.values()))
    # The losses of a mix come from statistics, whether its method needs them or not.
    calibrated = {name: statistics_recipe(recipe) for name, recipe in recipes.items()} if target else recipes
    calibration, held_out = _split(
        source, path, calibrated, dataloader, tokenizer, judged=eval_fn is None, exact=samples is not None
    )
    heaviest = max(calibrated.values(), key=lambda r: (r.needs_data, r.asymmetric_calibration, r.rotation))
    everything = _everything(source, recipes.values(), heaviest)
    if target:
        make_plan(source, base).require_work()
    with (
        work_folder(workdir, keep=place is None) as folder,
        open_resources(
            everything, calibration, max_memory=max_memory, executor=executor, progress=progress, announce=announce
        ) as resources,
    ):
        run = Run(source, folder, model_hash(source), feeds_hash(calibration), start, timeout, resources)
        if executor is not None and objective in ("smallest", "best") and leaves_process(executor):
            run.elsewhere = executor
        mixer = mix_candidates(run, base, place.onnx if place else None) if target else None
        if target and mixer:
            check_reachable(mixer, target, source, held_out)
        if eval_fn is None:
            judge = built_in_judge(source, held_out, judge_limit if target is None else limit_of(target, judge_limit))
            run.race = objective == "best"
        else:
            run.say("evaluate", 0, 1)
            worse, by = (tolerance, criterion) if max_loss is None else (max_loss, "absolute")
            known = (run.journal, run.key)
            judge = user_judge(eval_fn, path, *known, tolerance=worse, criterion=by, higher_is_better=higher_is_better)
        with SharedStatistics(source, [*calibrated.values()], calibration, resources) as shared:
            found = Mixed()
            if target and mixer:
                options = {"points": points, "max_trials": max_trials}
                found = mixed(run, mixer, recipes, judge, shared, calibration, target, **options)
                trials, best, stopped = found.trials, found.best, found.stopped
            else:
                trials, stopped = _try_all(run, recipes, judge, shared, objective, max_trials)
                best = _choose(trials, judge, objective)
            if best is not None and best.path is None:
                best = made_again(run, best, shared)
        final = best.path if best else None
        if place and final:
            final = _delivered(final, place, path.parent)
    return TuneResult(
        met=bool(best and (best.met or (target and target.kind in ("bpw", "size")))),
        best=best,
        path=final,
        trials=tuple(trials),
        metric_name=judge.name,
        baseline=judge.baseline,
        limit=judge.limit,
        higher_is_better=judge.higher_is_better,
        float_bytes=file_bytes(source),
        stopped=stopped,
        seconds=time.monotonic() - start,
        target=str(target or ""),
        frontier=found.frontier,
        layers=found.layers,
        model=path,
    )


def _delivered(made: Path, place: Destination, companions: Path) -> Path:
    """Writes the model of a trial to where it goes."""
    chosen = load(made)
    write(chosen, place, {}, companions)  # the trial's file says already what it is
    warn_of_old_runtime(required_runtime(chosen))
    return place.onnx


def _check(
    tolerance: float,
    judge_limit: float | None,
    criterion: str,
    objective: str,
    max_trials: int | None,
    timeout: float | None,
) -> None:
    for name, value, known in (
        ("criterion", criterion, ("relative", "absolute")),
        ("objective", objective, ("first", "smallest", "best", "pareto")),
    ):
        if value not in known:
            raise RecipeError(f"unknown {name} {value!r}: {nearest(str(value), known)}")
    if not math.isfinite(tolerance) or tolerance < 0:
        raise RecipeError(f"tolerance={tolerance!r} must be a number of at least 0")
    if judge_limit is not None and not math.isfinite(judge_limit):
        raise RecipeError(f"tolerance {judge_limit!r} must be a number: nats per token, or dB without logits")
    if max_trials is not None and max_trials < 1:
        raise RecipeError(f"max_trials={max_trials!r} must be at least 1")
    if timeout is not None and not timeout > 0:
        raise RecipeError(f"timeout={timeout!r} must be more than 0 seconds")


def _recipes(
    configs: Sequence[str | Recipe] | Mapping[str, Recipe] | None, samples: int | None, seqlen: int | None
) -> dict[str, Recipe]:
    if isinstance(configs, str):
        configs = [configs]
    if configs is None:
        configs = TUNED
    if isinstance(configs, Mapping):
        named = dict(configs)
    else:
        found = [(config, preset(config) if isinstance(config, str) else config) for config in configs]
        named = {
            config.upper() if isinstance(config, str) else f"{recipe.method}-{recipe.fingerprint()}": recipe
            for config, recipe in found
        }
    if not named:
        raise RecipeError("configs is empty: name at least one, or leave it out for the default ones")
    return {name: calibrated_on(recipe, samples, seqlen) for name, recipe in named.items()}


def _some_apply(source: Model, recipes: Mapping[str, Recipe]) -> None:
    """Raises what is wrong when no recipe finds anything to quantize; where some do, the others are failed trials."""
    problems = []
    for recipe in recipes.values():
        try:
            make_plan(source, recipe).require_work()
        except NothingToQuantize as error:
            problems.append(error)
    if len(problems) == len(recipes):
        raise problems[0]


def _everything(source: Model, recipes: Iterable[Recipe], heaviest: Recipe) -> Plan:
    """Returns a plan of the linear groups that any of the recipes quantizes, for the memory that all of them take."""
    largest: dict[tuple[tuple[str, str], ...], PlannedWeight] = {}
    for recipe in recipes:
        plan = make_plan(source, recipe)
        for weight, group in zip(plan.groups, plan.linear_groups, strict=True):
            other = largest.setdefault(group.sources, weight)
            if (weight.n, weight.rank) >= (other.n, other.rank):
                largest[group.sources] = weight
    return replace(make_plan(source, heaviest), groups=tuple(largest.values()), embeddings=())


def _split(
    source: Model,
    path: Path,
    recipes: Mapping[str, Recipe],
    data: Any,
    tokenizer: str | Path | None,
    *,
    judged: bool,
    exact: bool,
) -> tuple[list[Feed], list[Feed]]:
    """Calibration samples and, for the built-in judge, samples held out from them."""
    needing = [recipe for recipe in recipes.values() if recipe.needs_data]
    if not (judged or needing):
        return [], []
    first = (needing or list(recipes.values()))[0]
    wanted = max(recipe.nsamples for recipe in recipes.values())
    if not judged:
        return read_data(source, path, data, first, wanted, tokenizer, at_most=not exact), []
    batches = read_data(source, path, data, first, wanted + MOST_HELD_OUT, tokenizer, at_most=True)
    if exact and len(batches) < wanted:
        raise DataError(
            f"{wanted} samples are asked for and the data has {len(batches)}: give more data or fewer samples"
        )
    if len(batches) < 2:
        raise DataError(
            "the built-in judge needs at least 2 samples, one to calibrate and one held out: give more data, "
            "a shorter --seqlen, or an evaluation function of your own (--eval)"
        )
    spare = len(batches) - wanted
    held = min(MOST_HELD_OUT, spare) if spare >= HELD_OUT or (exact and spare > 0) else _least_held_out(batches)
    if exact and spare < held:
        logger.warning("%d of the %d samples are held out for judging", held, len(batches))
    return batches[:-held], batches[-held:]


def _least_held_out(batches: list[Feed]) -> int:
    return min(HELD_OUT, max(len(batches) // 3, 1))


def _try_all(
    run: Run,
    recipes: Mapping[str, Recipe],
    judge: Judge,
    shared: SharedStatistics,
    objective: Objective,
    max_trials: int | None,
) -> tuple[list[Trial], str]:
    """Makes the trials in order; returns them and why it stopped."""
    trials: list[Trial] = []
    wanted = dict(islice(recipes.items(), max_trials))
    with closing(each_trial(run, wanted, judge, shared)) as finished:
        for trial in finished:
            trials = [run.leader if run.leader and one.name == run.leader.name else one for one in trials] + [trial]
            if trial.met and objective == "first":
                return trials, "met"
            best = run.leader = _choose(trials, judge, objective)
            trials = [one if one is best else drop(one) for one in trials]  # no other models stay on the disk
    if len(trials) < len(wanted):
        return trials, "timeout"
    return trials, "all tried" if len(trials) == len(recipes) else "max_trials"


def _choose(trials: Sequence[Trial], judge: Judge, objective: Objective) -> Trial | None:
    """The trial to return: within the limit by the objective, otherwise the best metric so far."""
    done = [trial for trial in trials if trial.metric is not None and not trial.dropped]
    met = [trial for trial in done if trial.met]
    if met and objective == "first":
        return met[0]
    if met and objective == "smallest":
        return min(met, key=lambda t: (t.bytes or 0, judge.rank(t.metric or 0.0)))
    return min(met or done, key=lambda t: judge.rank(t.metric or 0.0), default=None)
