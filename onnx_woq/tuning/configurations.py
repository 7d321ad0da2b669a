"""Configurations of a run: by name, and tried one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

from onnx_woq.engine.calibration_data import calibrated_on
from onnx_woq.engine.plan import Plan, make_plan
from onnx_woq.engine.statistics import SharedStatistics, weights_by_sources
from onnx_woq.errors import NothingToQuantize, RecipeError
from onnx_woq.graph.io.model import Model
from onnx_woq.presets import TUNED, preset
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.judge import Judge
from onnx_woq.tuning.options import CalibrationData, Objective, Search
from onnx_woq.tuning.results import SearchResult, Trial
from onnx_woq.tuning.trials import Run, drop, each_trial


def named_recipes(
    configs: str | Sequence[str | Recipe] | Mapping[str, Recipe] | None, data: CalibrationData
) -> dict[str, Recipe]:
    """Returns configurations by name, in tuning order, with the amount of calibration data that is asked for.

    Args:
        configs: preset names or recipes, or recipes by name; None for the presets in `TUNED`.
        data: tells samples and their length.

    Raises:
        RecipeError: a preset is unknown, or there is no configuration.
    """
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
    return {name: calibrated_on(recipe, data.samples, data.seqlen) for name, recipe in named.items()}


def require_work(source: Model, recipes: Mapping[str, Recipe]) -> None:
    """Refuses a run in which no recipe finds anything to quantize; where some do, the others become failed trials.

    Raises:
        NothingToQuantize: as the first recipe raises it.
    """
    problems = []
    for recipe in recipes.values():
        try:
            make_plan(source, recipe).require_work()
        except NothingToQuantize as error:
            problems.append(error)
    if len(problems) == len(recipes):
        raise problems[0]


def plan_of_all(source: Model, recipes: Iterable[Recipe], heaviest: Recipe) -> Plan:
    """Returns a plan of the linear groups that any of the recipes quantizes, for the memory that all of them take.

    Args:
        source: the float model.
        recipes: all configurations.
        heaviest: the recipe that takes the most memory.
    """
    largest = weights_by_sources([make_plan(source, recipe) for recipe in recipes])
    return replace(make_plan(source, heaviest), groups=tuple(largest.values()), embeddings=())


def try_all(
    run: Run,
    recipes: Mapping[str, Recipe],
    judge: Judge,
    shared: SharedStatistics,
    search: Search,
) -> SearchResult:
    """Tries configurations in order.

    Args:
        run: tells model, journal and resources.
        recipes: by name.
        judge: tells what is within the limit.
        shared: statistics of all of them.
        search: tells the objective and how many are tried.
    """
    trials: list[Trial] = []
    wanted = dict(islice(recipes.items(), search.max_trials))
    with closing(each_trial(run, wanted, judge, shared)) as finished:
        for trial in finished:
            trials = [run.leader if run.leader and one.name == run.leader.name else one for one in trials] + [trial]
            if trial.met and search.objective == "first":
                return SearchResult(trials, choose(trials, judge, search.objective), "met")
            best = run.leader = choose(trials, judge, search.objective)
            trials = [one if one is best else drop(one) for one in trials]  # no other models stay on the disk
    stopped = "all tried" if len(trials) == len(recipes) else "max_trials"
    if len(trials) < len(wanted):
        stopped = "timeout"
    return SearchResult(trials, choose(trials, judge, search.objective), stopped)


def choose(trials: Sequence[Trial], judge: Judge, objective: Objective) -> Trial | None:
    """Returns the trial to give back: within the limit by the objective, otherwise the best metric so far."""
    done = [trial for trial in trials if trial.metric is not None and not trial.dropped]
    met = [trial for trial in done if trial.met]
    if met and objective == "first":
        return met[0]
    if met and objective == "smallest":
        return min(met, key=lambda t: (t.bytes or 0, judge.rank(t.metric or 0.0)))
    return min(met or done, key=lambda t: judge.rank(t.metric or 0.0), default=None)
