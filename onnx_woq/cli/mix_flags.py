"""The flags of mixed precision: how they ask for a mix, and what contradicts them.

`onnx_woq.tuning.budget` has the same rules for the keywords of `tune`. They are stated again here because a user of the
command line must read of flags; what can be said without naming another flag, such as a budget that is no number above
0, is left to it.
"""

from __future__ import annotations

from typing import Any

from onnx_woq.cli.options import RecipeFlags, TuneFlags
from onnx_woq.errors import RecipeError

BUDGETS = ("target_bpw", "target_size", "max_kl", "max_loss")
"""Flags that bound the size or the loss of a mix; keywords of `tune` by the same names."""

_OF_MIXES = ("frontier", "points")
_DECIDED_BY_A_MIX = ("bits", "group_size", "group_dim", "scheme", "embedding_bits", "embedding_group")


def wants_mix(tuning: TuneFlags, recipe: RecipeFlags) -> bool:
    """Tells if the flags ask for mixed precision.

    Raises:
        RecipeError: they contradict each other, or say what a mix decides by itself.
    """
    asked = [_option(name) for name in BUDGETS if getattr(tuning, name) is not None]
    asked += ["--objective pareto"] if tuning.objective == "pareto" else []
    if len(asked) > 1:
        raise RecipeError(f"{' and '.join(asked)} are different targets: give one of them")
    if asked:
        _check_metric(tuning)
        _check_choice(asked[0], tuning, recipe)
    elif idle := _first_given(tuning, _OF_MIXES):
        raise RecipeError(
            f"{idle} is about mixed precision: add --objective pareto, or a target such as --target-bpw 4.25"
        )
    return bool(asked)


def _check_metric(tuning: TuneFlags) -> None:
    """Refuses a budget that is counted in another metric than the one that judges."""
    if tuning.max_kl is not None and tuning.evaluation:
        raise RecipeError("--max-kl is judged without --eval: leave one of them out, or use --max-loss")
    if tuning.max_loss is not None and not tuning.evaluation:
        raise RecipeError("--max-loss is a loss of --eval's metric: add --eval, or use --max-kl")


def _check_choice(asked: str, tuning: TuneFlags, recipe: RecipeFlags) -> None:
    """Refuses flags that choose what a mix chooses: the grid of a layer, or the configuration that wins."""
    if fixed := _first_given(recipe, _DECIDED_BY_A_MIX):
        raise RecipeError(f"{asked} chooses the grid of each layer: leave out {fixed}")
    if tuning.objective not in ("first", "pareto"):
        raise RecipeError(f"{asked} and --objective {tuning.objective} are different ways to choose: give one")


def _first_given(flags: Any, names: tuple[str, ...]) -> str | None:
    """Finds the first of some flags that was given, as the user writes it."""
    return next((_option(name) for name in names if getattr(flags, name) is not None), None)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
