"""Tuning a model: configurations tried on one calibration until the accuracy holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from onnx_woq.engine.calibration_data import feeds_hash
from onnx_woq.engine.convert import converted
from onnx_woq.engine.executors import leaves_process
from onnx_woq.engine.metadata import warn_of_old_runtime
from onnx_woq.engine.output import Destination, destination, write
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.engine.verify import verify
from onnx_woq.errors import OutputChanged, system_failure
from onnx_woq.graph.io.find_model import ModelSource, model_file
from onnx_woq.graph.io.model import Model, file_bytes, load, model_hash
from onnx_woq.graph.io.save import data_path
from onnx_woq.runtime.custom_ops import custom_operators
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.session import blames_models
from onnx_woq.targets.registry import required_runtime
from onnx_woq.tuning.budget import Budget, budget_of
from onnx_woq.tuning.configurations import named_recipes, plan_of_all, require_work, try_all
from onnx_woq.tuning.data_split import split_data
from onnx_woq.tuning.judge import Judge, built_in_judge, user_judge
from onnx_woq.tuning.mixed.feasibility import check_reachable
from onnx_woq.tuning.mixed.search import MIX, limit_of, mix_candidates, search_mixes
from onnx_woq.tuning.mixed.sensitivity import statistics_recipe
from onnx_woq.tuning.options import CalibrationData, Evaluation, RunResources, Search, TuneOptions, gather_options
from onnx_woq.tuning.results import SearchResult, TuneResult
from onnx_woq.tuning.trials import Run, made_again
from onnx_woq.tuning.work_folder import work_folder


@blames_models("model")
def tune(
    model: ModelSource,
    eval_fn: Callable[[Path], float] | None = None,
    dataloader: Any = None,
    *,
    data: CalibrationData | Any = None,
    evaluation: Evaluation | None = None,
    search: Search | None = None,
    resources: RunResources | None = None,
    output: str | Path | None = None,
    workdir: str | Path | None = None,
    **keywords: Any,
) -> TuneResult:
    """Quantizes `model` with one configuration after another until the accuracy holds.

    The float model is evaluated once and calibrated once for all configurations. A trial that fails or gives NaN is
    recorded and the next goes on. The best model so far is always returned. A trial lost to a fault of this program is
    one of `TuneResult.faults`; a later run tries it again.

    Args:
        model: an .onnx file, a folder that holds one, or a model in memory (`onnx.ModelProto`, `onnx_ir.Model`).
        eval_fn: gets the path of an .onnx file and returns its metric. Without it the built-in judge is used: mean KL
            divergence to the float model (language models, limit `KL_LIMIT`) or output SQNR (others, `SQNR_LIMIT`) on
            data held out from calibration.
        dataloader: calibration data, in any form that `quantize` takes.
        data: another name for `dataloader`; or a `CalibrationData`, which also says how much of it is used.
        evaluation: how much worse than the float model is accepted, see `Evaluation`.
        search: what is tried, and what wins, see `Search`.
        resources: memory, executor, custom operators and progress, see `RunResources`.
        output: where the best model goes, an .onnx file or a folder; by default it stays in `workdir`.
        workdir: folder of the journal and the trial models; a run killed there resumes. Temporary by default. The
            journal knows `eval_fn` by its name: give another folder when what it does has changed.
        keywords: any field of `CalibrationData`, `Evaluation`, `Search` and `RunResources` by its name, such as
            `objective="smallest"`, `tolerance=0.02`, `samples=64` or `max_memory=6_000_000_000`.

    Raises:
        OnnxWoqError: model, data, configurations, evaluation or output cannot be used at all.
        DiskError: the disk is full, or fails; with `workdir` the same call goes on from there.
        ResourceError: memory, open files or the like have run out; with `workdir` the same call goes on from there.
    """
    given = data if isinstance(data, CalibrationData) else CalibrationData(dataloader if data is None else data)
    named = {"eval_fn": eval_fn} if eval_fn is not None else {}
    if dataloader is not None:
        named["source"] = dataloader
    options = gather_options(given, evaluation, search, resources, named | keywords)
    try:
        with ExitStack() as stack:
            original = stack.enter_context(model_file(model))
            place = destination(output, original) if output is not None else None
            stack.enter_context(custom_operators(options.resources.custom_ops))
            path = stack.enter_context(converted(original, options.resources.convert, options.resources.announce))
            folder = stack.enter_context(work_folder(workdir, keep=place is None, out=place.onnx if place else None))
            return replace(_tune(options, path, place, folder, stack), model=original)
    except Exception as error:
        if (scarce := system_failure(error)) and scarce is not error:
            raise scarce from error
        raise


def _tune(options: TuneOptions, path: Path, place: Destination | None, folder: Path, stack: ExitStack) -> TuneResult:
    """Tries what `options` ask for in a work folder; what has to stay open until the end goes onto `stack`."""
    start, there = time.monotonic(), _seen(place)
    search, evaluation, limits = options.search, options.evaluation, options.resources
    budget = budget_of(search, has_metric=evaluation.eval_fn is not None)
    recipes = named_recipes({"mixes": MIX} if budget and search.configs is None else search.configs, options.data)
    source = load(path)
    require_work(source, recipes)
    base = next(iter(recipes.values()))
    # The losses of a mix come from statistics, whether its method needs them or not.
    calibrated = {name: statistics_recipe(recipe) for name, recipe in recipes.items()} if budget else recipes
    calibration, held_out = split_data(source, path, calibrated, options.data, judged=evaluation.eval_fn is None)
    heaviest = max(calibrated.values(), key=lambda r: (r.needs_data, r.asymmetric_calibration, r.rotation))
    everything = plan_of_all(source, recipes.values(), heaviest)
    if budget:
        make_plan(source, base).require_work(linears=True)
    resources = stack.enter_context(
        open_resources(
            everything,
            calibration,
            max_memory=limits.max_memory,
            executor=limits.executor,
            progress=limits.progress,
            announce=limits.announce,
            verify=limits.verify,
        )
    )
    run = Run(source, folder, model_hash(source), feeds_hash(calibration), start, search.timeout, resources)
    if search.objective in ("smallest", "best") and limits.executor and leaves_process(limits.executor):
        run.elsewhere = limits.executor
    candidates = mix_candidates(run, base, place.onnx if place else None) if budget else None
    if budget and candidates:
        check_reachable(candidates, budget, source, held_out)
    judge = _judge(run, options, budget, path, held_out)
    with SharedStatistics(source, [*calibrated.values()], calibration, resources) as shared:
        if budget and candidates:
            found = search_mixes(run, candidates, recipes, judge, shared, calibration, budget, search)
        else:
            found = try_all(run, recipes, judge, shared, search)
        best = found.best
        if best is not None and best.path is None:
            best = made_again(run, best, shared)
    final = best.path if best else None
    if place and final:
        if _seen(place) != there:
            raise OutputChanged(
                f"{place.onnx} has been written by others since the run began, and is not overwritten: move it away "
                f"and give the same command again, or take the chosen model from {final}"
            )
        final = _deliver(final, place, source, verified=limits.verify)
    return _result(replace(found, best=best), final, judge, budget, path, file_bytes(source), start)


def _judge(run: Run, options: TuneOptions, budget: Budget | None, path: Path, held_out: list[Feed]) -> Judge:
    """Returns the judge of a run: the user's evaluation, or the built-in one."""
    evaluation, max_loss = options.evaluation, options.search.max_loss
    if evaluation.eval_fn is None:
        run.race = options.search.objective == "best"
        limit = evaluation.judge_limit if budget is None else limit_of(budget, evaluation.judge_limit)
        return built_in_judge(run.source, held_out, limit)
    run.say("evaluate", 0, 1)
    return user_judge(
        evaluation.eval_fn,
        path,
        run.journal,
        run.key,
        tolerance=evaluation.tolerance if max_loss is None else max_loss,
        criterion=evaluation.criterion if max_loss is None else "absolute",
        higher_is_better=evaluation.higher_is_better,
    )


def _result(
    found: SearchResult,
    final: Path | None,
    judge: Judge,
    budget: Budget | None,
    path: Path,
    float_bytes: int,
    start: float,
) -> TuneResult:
    within = budget is not None and budget.kind in ("bpw", "size")  # a budget of bytes is never exceeded
    return TuneResult(
        met=bool(found.best and (found.best.met or within)),
        best=found.best,
        path=final,
        trials=tuple(found.trials),
        metric_name=judge.name,
        baseline=judge.baseline,
        limit=judge.limit,
        higher_is_better=judge.higher_is_better,
        float_bytes=float_bytes,
        stopped=found.stopped,
        seconds=time.monotonic() - start,
        target=str(budget or ""),
        frontier=found.frontier,
        layers=found.layers,
        model=path,
    )


def _seen(place: Destination | None) -> list[tuple[int, ...] | None]:
    """Returns how the files of an output look now, None for those that are not there."""
    stamps: list[tuple[int, ...] | None] = []
    for file in (place.onnx, data_path(place.onnx)) if place else ():
        status = file.stat() if file.exists() else None
        stamps.append(status and (status.st_size, status.st_mtime_ns, status.st_ino))
    return stamps


def _deliver(made: Path, place: Destination, source: Model, *, verified: bool) -> Path:
    """Writes the model of a trial to where it goes."""
    chosen = load(made)
    check = partial(verify, out=place.onnx, source=source, opens=verified)
    write(chosen, place, {}, source.named, check=check)  # the trial's file says already what it is
    warn_of_old_runtime(required_runtime(chosen))
    return place.onnx
