"""`onnx-woq quantize`: one recipe as it is, or the best of several quantized models."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_woq.cli.console import FAULT, TOLERANCE_NOT_MET, announce, print_result, progress_bar
from onnx_woq.cli.metric import load_metric, output_to_stderr
from onnx_woq.cli.mix_flags import BUDGETS, wants_mix
from onnx_woq.cli.options import (
    DataFlags,
    RecipeFlags,
    RunFlags,
    TuneFlags,
    data_options,
    json_option,
    recipe_options,
    run_options,
    tune_options,
)
from onnx_woq.errors import DiskError, RecipeError, ResourceError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from onnx_woq.engine.results import QuantizeReport
    from onnx_woq.recipe import Recipe
    from onnx_woq.tuning.results import TuneResult


@click.command()
@click.argument("model", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="OUT", help="An .onnx file, or a folder.")
@click.option("--auto", is_flag=True, help="Try the predefined configurations until the accuracy holds.")
@recipe_options
@click.option("--calib", metavar="PATH", help="Calibration data: text, JSONL, .npz, .npy, a folder; or `random`.")
@data_options
@tune_options
@run_options
@click.option("--report", "report_file", type=click.Path(), metavar="FILE", help="A page (.html) or JSON of the run.")
@click.option("--resume", is_flag=True, help="Continue what a killed or interrupted run, or one out of disk, has left.")
@json_option
def quantize(
    model: str,
    output: str,
    auto: bool,
    calib: str | None,
    report_file: str | None,
    resume: bool,
    as_json: bool,
    recipe: RecipeFlags,
    data: DataFlags,
    tuning: TuneFlags,
    run: RunFlags,
) -> None:
    """Quantize MODEL's MatMul weights.

    With --auto, or with --eval, configurations are judged against the float model: exit code 3 says that none was
    within the tolerance, and the best one is written all the same. Without --eval the judge is the mean KL divergence
    of language models (at most 0.05 nats per token) or the output SQNR of others (at least 15 dB), on data held out
    from calibration.

    With a target (--target-bpw, --target-size, --max-kl, --max-loss, or --objective pareto for all of them) every layer
    gets a grid of its own, by what it costs the model; --config says how they are solved. --auto then tries the
    predefined configurations beside the mixes.
    """
    from onnx_woq.report import terminal

    _check_report(report_file)
    mixing = wants_mix(tuning, recipe)
    if auto and not mixing and (recipe.config or recipe.recipe_file):
        raise RecipeError("--auto tries all predefined configurations: leave out --config and --recipe")
    if auto or mixing or tuning.evaluation:
        from onnx_woq.cli.recipe_flags import build_recipes  # brings the solvers

        recipes = build_recipes(recipe, auto=auto, mixing=mixing)
        chosen = _tune(model, output, calib, recipes, data, tuning, run)
        _write_report(report_file, chosen, model)
        print_result(chosen, as_json, terminal.tuning)
        if not chosen.met:
            sys.exit(FAULT if chosen.faults else TOLERANCE_NOT_MET)
    else:
        done = _quantize(model, output, calib, recipe, data, run, resume=resume)
        _write_report(report_file, done, model)
        print_result(done, as_json, terminal.quantization)


def _quantize(
    model: str, output: str, calib: str | None, recipe: RecipeFlags, data: DataFlags, run: RunFlags, *, resume: bool
) -> QuantizeReport:
    """Quantizes the model by the one recipe that the flags describe."""
    from onnx_woq.cli.recipe_flags import build_recipe  # brings the solvers
    from onnx_woq.engine.quantize import quantize

    with open_executor(run) as executor, progress_bar() as progress:
        return quantize(
            model,
            output,
            build_recipe(recipe),
            calib,
            **asdict(data),
            max_memory=run.max_memory,
            executor=executor,
            resume=resume,
            verify=run.verify,
            convert=run.convert,
            progress=progress,
            announce=announce,
        )


def _tune(
    model: str,
    output: str,
    calib: str | None,
    recipes: dict[str, Recipe],
    data: DataFlags,
    flags: TuneFlags,
    run: RunFlags,
) -> TuneResult:
    """Tries recipes, or mixes made with the first of them, and writes the model that wins."""
    from onnx_woq.report.frontier_plot import check_picture, draw_frontier
    from onnx_woq.tuning.work_folder import default_folder, discard

    if flags.frontier:
        check_picture(flags.frontier)
    with output_to_stderr():
        evaluation = load_metric(flags.evaluation)
    place = Path(output)
    workdir = Path(flags.workdir) if flags.workdir else default_folder(place)
    keywords = tune_keywords(flags, has_metric=evaluation is not None) | asdict(data)
    finished = f"finished trials are kept in {workdir}, the same command goes on from there"
    try:
        result = _try_recipes(
            model, evaluation, calib, run, configs=recipes, workdir=workdir, output=output, **keywords
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(finished) from interrupt
    except (DiskError, ResourceError) as error:
        raise type(error)(f"{error}; {finished}") from error
    if result.stopped == "timeout" and workdir.exists() and any(workdir.iterdir()):
        announce(f"the time was over: {finished}")
    elif not flags.workdir:  # the run is finished: nothing is left to resume
        discard(workdir)
    if flags.frontier:
        draw_frontier(result, flags.frontier)
    return result


def _try_recipes(
    model: str, evaluation: Callable[[Path], float] | None, calib: str | None, run: RunFlags, **keywords: Any
) -> TuneResult:
    """Runs `tune` where the flags say, with a progress bar."""
    from onnx_woq.tuning.tune import tune

    with output_to_stderr(), open_executor(run) as executor, progress_bar() as progress:
        return tune(
            model,
            evaluation,
            calib,
            max_memory=run.max_memory,
            executor=executor,
            verify=run.verify,
            convert=run.convert,
            progress=progress,
            announce=announce,
            **keywords,
        )


def tune_keywords(flags: TuneFlags, *, has_metric: bool) -> dict[str, Any]:
    """Names the flags as `tune` does: a tolerance is of the user's metric, or else the limit of the built-in judge."""
    same = ("criterion", "higher_is_better", "objective", *BUDGETS, "points", "max_trials", "timeout")
    tolerance = flags.tolerance
    return {name: getattr(flags, name) for name in same} | {
        "tolerance": 0.01 if tolerance is None or not has_metric else tolerance,
        "judge_limit": None if has_metric else tolerance,
    }


def open_executor(run: RunFlags) -> AbstractContextManager[Executor]:
    """Opens the executor that solves linear groups: a Dask cluster, or threads, processes or this thread."""
    from onnx_woq.engine.executors import built_in, dask_cluster

    if run.dask and run.executor:
        raise RecipeError("--dask and --executor both say where to solve: give one of them")
    return dask_cluster(run.dask) if run.dask else built_in(run.executor or "threads")


def _check_report(file: str | None) -> None:
    """Refuses, before the work, a report that could not be written after it."""
    if file:
        from onnx_woq.report.html_page import check_report

        check_report(Path(file))


def _write_report(file: str | None, result: QuantizeReport | TuneResult, model: str) -> None:
    """Writes the report that --report asks for, and announces where it is."""
    if file:
        from onnx_woq.report.html_page import write_report

        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        announce(f"report: {write_report(result, file, model=model, command=command)}")
