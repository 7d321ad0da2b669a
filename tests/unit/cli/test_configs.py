"""`configs`: the predefined configurations."""

from __future__ import annotations

from onnx_woq import PRESETS, Recipe
from onnx_woq.presets import MEANINGS
from tests.unit.cli.conftest import strict_json


def test_each_configuration_is_a_line_with_its_meaning(run):
    lines = run("configs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(line.endswith(MEANINGS[line.split()[0]]) for line in lines)
    assert len({line.index(MEANINGS[line.split()[0]]) for line in lines}) == 1, "meanings stand in one column"


def test_json_gives_the_recipes_back(run):
    listed = strict_json(run("configs", "--json").stdout)
    assert {name: Recipe.from_dict(recipe) for name, recipe in listed.items()} == PRESETS
