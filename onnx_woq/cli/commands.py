"""The command line. Exit codes: 0 done, 2 usage or bad input, 3 tolerance not met (the best is still written)."""

from __future__ import annotations

import functools
import importlib
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_woq.cli.options import TARGET_OPTIONS, Size, wants_mix
from onnx_woq.errors import OnnxWoqError, RecipeError, nearest
from onnx_woq.presets import MEANINGS, PRESETS, TUNED, preset
from onnx_woq.recipe import Recipe

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from onnx_woq.progress import Progress

TOLERANCE_NOT_MET = 3
INTERRUPTED = 130


class BadInput(click.ClickException):
    """A named error on its way to the user: the message alone, exit code 2."""

    exit_code = 2


# A misspelt value is answered with the nearest known one, which click.Choice does not do: presets and methods are
# checked by the recipe, not here.
_SPEC_OPTIONS = (
    click.option("--config", "config", metavar="NAME", help="A predefined configuration: see `onnx-woq configs`."),
    click.option("--recipe", "recipe_file", metavar="FILE", type=click.Path(), help="A recipe in JSON or TOML."),
    click.option("--algorithm", metavar="NAME", help="RTN, GPTQ, AWQ, TEQ or HQQ."),
    click.option("--bits", type=int, help="Bits per weight, 1 to 8 (2, 4 and 8 are native)."),
    click.option("--group-size", type=int, help="Input channels per scale; -1 for one scale per output channel."),
    click.option("--scheme", metavar="sym|asym", help="Symmetric grid, or one zero point per group."),
    click.option("--embedding-bits", type=int, metavar="N", help="Quantize embeddings too: 2, 4 or 8 bits are native."),
    click.option("--embedding-group", type=int, metavar="N", help="Columns of an embedding per scale."),
    click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the algorithm."),
    click.option("--include", multiple=True, metavar="REGEX", help="Quantize only what this finds. Repeatable."),
    click.option("--exclude", multiple=True, metavar="REGEX", help="Leave float what this finds. Repeatable."),
    click.option("--accuracy-level", type=int, help="0: compute in float; 4: int8 activations (fast, default)."),
)
_DATA_OPTIONS = (
    click.option("--samples", type=click.IntRange(1), help="Samples used; an error when there are fewer."),
    click.option("--seqlen", type=click.IntRange(1), help="Tokens per sample, for text."),
    click.option("--tokenizer", type=click.Path(), metavar="DIR", help="When it is not beside the model."),
)
_RUN_OPTIONS = (
    click.option("--max-memory", type=Size(), help="What the process may take, such as 3GB, 800MB or 512MiB."),
    click.option("--executor", metavar="threads|processes|serial", help="Where taps are solved; threads by default."),
    click.option("--dask", metavar="ADDRESS", help="Solve on the workers of this Dask scheduler."),
)


def _with(options: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, option: option(f), reversed(options), function)

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
spec_options = _with(_SPEC_OPTIONS)
data_options = _with(_DATA_OPTIONS)
run_options = _with(_RUN_OPTIONS)
target_options = _with(TARGET_OPTIONS)


def _named_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns named errors into exit code 2 and an interrupt into 130, without a traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OnnxWoqError as error:
            raise BadInput(str(error)) from error
        except KeyboardInterrupt as interrupt:
            click.echo(f"interrupted: {interrupt}" if interrupt.args else "interrupted: nothing was written", err=True)
            sys.exit(INTERRUPTED)

    return guarded


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="onnx-woq")
def main() -> None:
    """Turn float ONNX models into low-bit ones that ONNX Runtime runs natively."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Windows writes to files and pipes in an old code page
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


@main.command()
@click.argument("model", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="OUT", help="An .onnx file, or a folder.")
@click.option("--auto", is_flag=True, help="Try the predefined configurations until the accuracy holds.")
@spec_options
@click.option("--calib", metavar="PATH", help="Calibration data: text, JSONL, .npz, .npy, a folder; or `random`.")
@data_options
@click.option("--eval", "evaluation", metavar="MODULE:FUNCTION", help="Your metric: takes a path, gives a number.")
@click.option("--higher-is-better/--lower-is-better", default=True, help="Direction of --eval's metric.")
@click.option("--tolerance", type=float, help="Accepted loss of --eval's metric (0.01); without --eval, of the judge.")
@click.option("--criterion", default="relative", metavar="relative|absolute", help="What the tolerance is of.")
@click.option("--objective", default="first", metavar="first|smallest|best|pareto", help="Which configuration wins.")
@target_options
@click.option("--max-trials", type=int, help="Configurations tried at most.")
@click.option("--timeout", type=float, metavar="SECONDS", help="No trial starts later.")
@click.option("--workdir", type=click.Path(), metavar="DIR", help="Journal and trial models; a killed run resumes.")
@run_options
@click.option("--report", "report_file", type=click.Path(), metavar="FILE", help="A page (.html) or JSON of the run.")
@click.option("--resume", is_flag=True, help="Continue what a killed or interrupted run, or one out of disk, has left.")
@json_option
@_named_errors
def quantize(model: str, output: str, auto: bool, calib: str | None, as_json: bool, **given: Any) -> None:
    """Quantize MODEL's MatMul weights.

    With --auto, or with --eval, configurations are judged against the float model: exit code 3 says that none was
    within the tolerance, and the best one is written all the same. Without --eval the judge is the mean KL divergence
    of language models (at most 0.05 nats per token) or the output SQNR of others (at least 15 dB), on data held out
    from calibration.

    With a target (--target-bpw, --target-size, --max-kl, --max-loss, or --objective pareto for all of them) every layer
    gets a grid of its own, by what it costs the model; --config says how they are solved. --auto then tries the
    predefined configurations beside the mixes.
    """
    from onnx_woq.report import terminal as report

    if given["report_file"]:
        from onnx_woq.report.html_page import check_report

        check_report(Path(given["report_file"]))
    mixing = wants_mix(given)
    if auto and not mixing and (given["config"] or given["recipe_file"]):
        raise RecipeError("--auto tries all predefined configurations: leave out --config and --recipe")
    if auto or mixing or given["evaluation"]:
        recipes = _mixed_recipes(given, auto) if mixing else None
        recipes = recipes or dict(_named_recipe(given, name) for name in (TUNED if auto else [None]))
        result = _tune(model, output, calib, recipes, given)
        _write_report(given, result, model)
        _print(as_json, result, report.tuning)
        if not result.met:
            sys.exit(TOLERANCE_NOT_MET)
        return
    from onnx_woq.engine.quantize import quantize as run

    with _executor(given) as executor, progress_bar() as progress:
        done = run(
            model,
            output,
            _recipe(given),
            calib,
            samples=given["samples"],
            seqlen=given["seqlen"],
            tokenizer=given["tokenizer"],
            max_memory=given["max_memory"],
            executor=executor,
            resume=given["resume"],
            progress=progress,
            announce=_announce,
        )
    _write_report(given, done, model)
    _print(as_json, done, report.quantization)


@main.command()
@click.argument("model", type=click.Path())
@click.option("--reference", required=True, type=click.Path(), metavar="FLOAT", help="The float original.")
@click.option("--data", required=True, metavar="PATH", help="Text, JSONL, .npz, .npy, a folder; or `random`.")
@data_options
@json_option
@_named_errors
def evaluate(
    model: str,
    reference: str,
    data: str,
    samples: int | None,
    seqlen: int | None,
    tokenizer: str | None,
    as_json: bool,
) -> None:
    """Say how far MODEL is from its float original on data.

    Language models: mean KL divergence, same top-1, perplexities. Others: SQNR and cosine of the outputs.
    """
    from onnx_woq.report import terminal as report
    from onnx_woq.runtime.evaluation import compare as examine

    with progress_bar() as progress:
        metrics = examine.evaluate(
            model, reference, data, samples=samples, seqlen=seqlen or 512, tokenizer=tokenizer, progress=progress
        )
    _print(as_json, metrics, report.evaluation)


@main.command()
@click.argument("model", type=click.Path())
@spec_options
@json_option
@_named_errors
def inspect(model: str, as_json: bool, **given: Any) -> None:
    """Show what would be quantized in MODEL, what not and why, and the bytes before and after."""
    from onnx_woq.engine import inspection as examine
    from onnx_woq.report import terminal as report

    _print(as_json, examine.inspect(model, _recipe(given)), report.inspection)


@main.command()
@json_option
def configs(as_json: bool) -> None:
    """List the predefined configurations in tuning order, with what each means."""
    if as_json:
        click.echo(json.dumps({name: recipe.to_dict() for name, recipe in PRESETS.items()}, indent=2))
        return
    width = max(map(len, PRESETS))
    for name in PRESETS:
        click.echo(f"{name:<{width}}  {MEANINGS[name]}")


def _write_report(given: dict[str, Any], result: Any, model: str) -> None:
    """Writes the report that --report asks for, if there is a model to report on."""
    if given["report_file"]:
        from onnx_woq.report.html_page import write_report

        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        _announce(f"report: {write_report(result, given['report_file'], model=model, command=command)}")


def _named_recipe(given: dict[str, Any], name: str | None) -> tuple[str, Recipe]:
    """A recipe with what its row in the table is called: as the preset it is, or by what the flags made of it."""
    from onnx_woq.report.terminal import spec_name

    recipe = _recipe(given, name)
    if given["recipe_file"]:
        return Path(given["recipe_file"]).stem, recipe
    base = (name or given["config"] or "RTN_G32ASYM").upper()
    was, grid = PRESETS[base], spec_name(recipe.spec)
    what = grid if recipe.method == was.method else f"{recipe.method.upper()} {grid}"
    if (recipe.method, recipe.spec) == (was.method, was.spec):
        return base, recipe
    return (f"{base}: {what}" if name or given["config"] else what), recipe


def _mixed_recipes(given: dict[str, Any], auto: bool) -> dict[str, Recipe]:
    """What mixes are made with, and the predefined configurations where they are to be tried beside them."""
    from onnx_woq.report.terminal import spec_name
    from onnx_woq.tuning.mixed.search import MIX

    if given["config"] or given["recipe_file"]:
        name, recipe = _named_recipe(given, None)
        if given["config"] and recipe.embedding is None:  # tables are units as well, unless --exclude names them
            recipe = replace(recipe, embedding=recipe.spec)
        base = {name: recipe}
    else:
        recipe = _recipe(given, default=MIX)
        base = {f"{recipe.method.upper()} {spec_name(recipe.spec)}": recipe}
    as_they_are = {**given, "config": None, "recipe_file": None, "algorithm": None, "options": ()}
    others = [_named_recipe(as_they_are, name) for name in (TUNED if auto else ())]
    return base | {name: recipe for name, recipe in others if name not in base}


def _recipe(given: dict[str, Any], name: str | None = None, default: Recipe | None = None) -> Recipe:
    """The recipe that the command line describes: a base (preset, file or default) and what the flags change."""
    if given["config"] and given["recipe_file"]:
        raise RecipeError("--config and --recipe both name a recipe: give one of them")
    base = (
        _read_recipe(Path(given["recipe_file"]))
        if given["recipe_file"]
        else default
        if default and not name and not given["config"]
        else preset(name or given["config"] or "RTN_G32ASYM")
    )
    scheme = given["scheme"]
    if scheme not in (None, "sym", "asym"):
        raise RecipeError(f"unknown scheme {scheme!r}: {nearest(scheme, ('sym', 'asym'))}")
    level = {} if given["accuracy_level"] is None else {"accuracy_level": given["accuracy_level"]}
    grid = {k: given[k] for k in ("bits", "group_size") if given[k] is not None}
    if scheme:
        grid["symmetric"] = scheme == "sym"
    method = (given["algorithm"] or base.method).lower()
    options = dict(base.options) if method == base.method else {}
    return Recipe.from_dict(
        base.to_dict()
        | {"method": method, "options": options | _assignments(given["options"])}
        | {"spec": base.to_dict()["spec"] | grid, "embedding": _embedding(given, base, grid)}
        | {"include": [*base.include, *given["include"]], "exclude": [*base.exclude, *given["exclude"]]}
        | level
    )


def _embedding(given: dict[str, Any], base: Recipe, grid: dict[str, Any]) -> dict[str, Any] | None:
    """The grid of embeddings: what the recipe says of them, else what it says of everything, and the flags."""
    flags = {"bits": given["embedding_bits"], "group_size": given["embedding_group"]}
    flags = {name: value for name, value in flags.items() if value is not None}
    if base.embedding is None and not flags:
        return None
    told = base.to_dict()["embedding"] or base.to_dict()["spec"] | grid
    return told | {name: value for name, value in grid.items() if name == "symmetric"} | flags


def _read_recipe(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        if path.suffix == ".toml":
            toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
            return Recipe.from_dict(toml.loads(text))
        return Recipe.from_dict(json.loads(text))
    except ValueError as error:
        raise RecipeError(f"{path} is neither JSON nor (by its name) TOML: {error}") from error


def _assignments(pairs: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise RecipeError(f"--option {pair!r}: write NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _tune(model: str, output: str, calib: str | None, recipes: dict[str, Recipe], given: dict[str, Any]) -> Any:
    import shutil

    from onnx_woq.report.frontier_plot import check_picture, draw_frontier
    from onnx_woq.tuning.tune import tune

    if given["frontier"]:
        check_picture(given["frontier"])
    evaluation = _evaluation(given["evaluation"])
    tolerance = given["tolerance"]
    place = Path(output)
    workdir = Path(given["workdir"]) if given["workdir"] else place.with_name(f".{place.name}.onnx-woq-tune")
    try:
        with _executor(given) as executor, progress_bar() as progress:
            result = tune(
                model,
                evaluation,
                calib,
                configs=recipes,
                tolerance=0.01 if tolerance is None or evaluation is None else tolerance,
                judge_limit=tolerance if evaluation is None else None,
                criterion=given["criterion"],
                higher_is_better=given["higher_is_better"],
                objective=given["objective"],
                **{name: given[name] for name in ("target_bpw", "target_size", "max_kl", "max_loss", "points")},
                max_trials=given["max_trials"],
                timeout=given["timeout"],
                samples=given["samples"],
                seqlen=given["seqlen"],
                tokenizer=given["tokenizer"],
                workdir=workdir,
                output=output,
                max_memory=given["max_memory"],
                executor=executor,
                progress=progress,
                announce=_announce,
            )
    except KeyboardInterrupt as interrupt:
        finished = f"finished trials are kept in {workdir}, the same command goes on from there"
        raise KeyboardInterrupt(finished) from interrupt
    if not given["workdir"]:  # the run is finished: nothing is left to resume
        shutil.rmtree(workdir, ignore_errors=True)
    if given["frontier"]:
        draw_frontier(result, given["frontier"])
    return result


def _executor(given: dict[str, Any]) -> AbstractContextManager[Executor]:
    """Where taps are solved, as the flags say."""
    from onnx_woq.engine.executors import built_in, dask_cluster

    if given["dask"] and given["executor"]:
        raise RecipeError("--dask and --executor both say where to solve: give one of them")
    return dask_cluster(given["dask"]) if given["dask"] else built_in(given["executor"] or "threads")


def _announce(line: str) -> None:
    click.echo(line, err=True)


def _evaluation(name: str | None) -> Callable[[Path], float] | None:
    """Imports `module:function`; the current folder comes first, as for `python -m`."""
    if name is None:
        return None
    module, sign, function = name.partition(":")
    if not sign or not module or not function:
        raise RecipeError(f"--eval {name!r}: write MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"--eval {name}: {error}") from error
    if not callable(found):
        raise RecipeError(f"--eval {name} is not a function")
    return found


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

        yield progress


def _print(as_json: bool, result: Any, table: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(_finite(result.to_dict()), indent=2))
    else:
        table(result)


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
