"""From flags to recipes: a base (preset, recipe file or default) and what the flags change in it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_woq.cli.options import RecipeFlags
from onnx_woq.errors import RecipeError, nearest
from onnx_woq.presets import PRESETS, TUNED, preset
from onnx_woq.recipe import Recipe

DEFAULT = "RTN_G32ASYM"
"""The preset that flags change where they name no other."""

_SCHEMES = {"sym": True, "asym": False}


def build_recipe(flags: RecipeFlags, name: str | None = None, default: Recipe | None = None) -> Recipe:
    """Builds the recipe that the flags describe.

    Args:
        flags: what the command line says.
        name: a preset that takes the place of `--config`.
        default: the base where neither the flags nor `name` name one; the preset `DEFAULT` when None.

    Raises:
        RecipeError: contradicting flags, a file that is no recipe, an unknown name or a value out of range.
    """
    base = _base(flags, name, default)
    before = base.to_dict()
    grid = _grid(flags)
    method = (flags.method or base.method).lower()
    options = dict(base.options) if method == base.method else {}
    return Recipe.from_dict(
        before
        | {"method": method, "options": options | parse_assignments(flags.options)}
        | {"spec": before["spec"] | grid, "embedding": build_embedding_grid(flags, base, grid)}
        | {"include": [*base.include, *flags.include], "exclude": [*base.exclude, *flags.exclude]}
        | _given(accuracy_level=flags.accuracy_level, target=flags.target)
    )


def build_named_recipe(flags: RecipeFlags, name: str | None = None) -> tuple[str, Recipe]:
    """Builds a recipe and the name of its row in tables: the preset's, the file's, or what the flags made of it."""
    from onnx_woq.report.terminal import spec_name

    recipe = build_recipe(flags, name)
    if flags.recipe_file:
        return Path(flags.recipe_file).stem, recipe
    base = (name or flags.config or DEFAULT).upper()
    was, grid = PRESETS[base], spec_name(recipe.spec)
    if (recipe.method, recipe.spec) == (was.method, was.spec):
        return base, recipe
    changes = grid if recipe.method == was.method else f"{recipe.method.upper()} {grid}"
    return (f"{base}: {changes}" if name or flags.config else changes), recipe


def build_recipes(flags: RecipeFlags, *, auto: bool, mixing: bool) -> dict[str, Recipe]:
    """Builds the recipes that a tuning run tries, by name.

    Args:
        flags: what the command line says.
        auto: try the presets that are tuned by default; otherwise the one recipe of the flags.
        mixing: start with the recipe that mixes are made with.
    """
    if mixing:
        return _mixed_recipes(flags, auto=auto)
    return dict(build_named_recipe(flags, name) for name in (TUNED if auto else (None,)))


def _mixed_recipes(flags: RecipeFlags, *, auto: bool) -> dict[str, Recipe]:
    """Builds the recipe that mixes are made with, and the presets beside it where those are tried as well."""
    from onnx_woq.report.terminal import spec_name
    from onnx_woq.tuning.mixed.search import MIX

    if flags.config or flags.recipe_file:
        name, recipe = build_named_recipe(flags)
        if flags.config and recipe.embedding is None:  # tables are mixed as well, unless --exclude names them
            recipe = replace(recipe, embedding=recipe.spec)
    else:
        recipe = build_recipe(flags, default=MIX)
        name = f"{recipe.method.upper()} {spec_name(recipe.spec)}"
    unchanged = replace(flags, config=None, recipe_file=None, method=None, options=())
    presets = dict(build_named_recipe(unchanged, tuned) for tuned in (TUNED if auto else ()))
    return {name: recipe} | presets | {name: recipe}  # first in order, and not overwritten by a preset of its name


def _base(flags: RecipeFlags, name: str | None, default: Recipe | None) -> Recipe:
    """Finds the recipe that the flags start from."""
    if flags.config and flags.recipe_file:
        raise RecipeError("--config and --recipe both name a recipe: give one of them")
    if flags.recipe_file:
        return read_recipe(Path(flags.recipe_file))
    name = name or flags.config
    if default and not name:
        return default
    return preset(name or DEFAULT)


def _grid(flags: RecipeFlags) -> dict[str, Any]:
    """Collects the fields of a grid that the flags give."""
    if flags.scheme is not None and flags.scheme not in _SCHEMES:
        raise RecipeError(f"unknown scheme {flags.scheme!r}: {nearest(flags.scheme, _SCHEMES)}")
    symmetric = None if flags.scheme is None else _SCHEMES[flags.scheme]
    return _given(bits=flags.bits, group_size=flags.group_size, symmetric=symmetric, group_dim=flags.group_dim)


def build_embedding_grid(flags: RecipeFlags, base: Recipe, grid: dict[str, Any]) -> dict[str, Any] | None:
    """Builds the grid of embeddings, or returns None when they stay float.

    It starts from the embedding grid of the recipe, else from its grid of weights with the flags (`grid`) applied;
    the flags of embeddings and the scheme, which holds for both, come last.
    """
    changes = _given(bits=flags.embedding_bits, group_size=flags.embedding_group)
    if base.embedding is None and not changes:
        return None
    start = base.to_dict()["embedding"] or base.to_dict()["spec"] | grid
    return start | {name: value for name, value in grid.items() if name == "symmetric"} | changes


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe file: TOML when its name ends in .toml, JSON otherwise.

    Raises:
        RecipeError: the file cannot be read, is in neither format, or is no recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        if path.suffix == ".toml":
            toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
            return Recipe.from_dict(toml.loads(text))
        return Recipe.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is neither JSON nor (by its name) TOML: {error}") from error


def parse_assignments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parses `NAME=VALUE` pairs; a value that is no JSON is a string.

    Raises:
        RecipeError: a pair without an equals sign.
    """
    options = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise RecipeError(f"--option {pair!r}: write NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _given(**flags: Any) -> dict[str, Any]:
    """Drops the flags that were not given."""
    return {name: value for name, value in flags.items() if value is not None}
