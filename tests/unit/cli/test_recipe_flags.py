"""Flags become recipes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from onnx_woq import PRESETS, Recipe, Spec
from onnx_woq.cli import recipe_flags
from onnx_woq.cli.options import RecipeFlags
from onnx_woq.cli.recipe_flags import (
    build_embedding_grid,
    build_named_recipe,
    build_recipe,
    build_recipes,
    parse_assignments,
    read_recipe,
)
from onnx_woq.errors import RecipeError
from onnx_woq.presets import TUNED
from onnx_woq.tuning.mixed.search import MIX


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_other_flags_is_itself(name):
    assert build_recipe(RecipeFlags(config=name.lower())) == PRESETS[name]
    assert build_named_recipe(RecipeFlags(config=name.lower())) == (name, PRESETS[name])


def test_without_flags_it_is_the_default():
    assert build_recipe(RecipeFlags()) == PRESETS["RTN_G32ASYM"]
    assert build_recipe(RecipeFlags(), default=MIX) == MIX
    assert build_recipe(RecipeFlags(config="AWQ_G32ASYM"), default=MIX) == PRESETS["AWQ_G32ASYM"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"bits": 3}, {"spec": Spec(3, 32, symmetric=False)}),
        ({"group_size": -1, "scheme": "sym"}, {"spec": Spec(4, -1, symmetric=True)}),
        ({"scheme": "asym"}, {"spec": Spec(4, 32, symmetric=False)}),
        ({"method": "HQQ"}, {"method": "hqq"}),
        ({"accuracy_level": 0}, {"accuracy_level": 0}),
        ({"include": ("a",), "exclude": ("b", "c")}, {"include": ("a",), "exclude": ("b", "c")}),
        ({"embedding_bits": 8}, {"embedding": Spec(8, 32, symmetric=False)}),
        ({"embedding_group": 64, "scheme": "sym"}, {"embedding": Spec(4, 64, symmetric=True)}),
    ],
    ids=str,
)
def test_a_flag_changes_its_part_of_the_recipe(flags, expected):
    recipe = build_recipe(RecipeFlags(**flags))
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_options_belong_to_the_method_they_were_chosen_for():
    assert build_recipe(RecipeFlags(config="BEST_4BIT", method="gptq")).options == PRESETS["BEST_4BIT"].options
    assert not build_recipe(RecipeFlags(config="BEST_4BIT", method="rtn")).options
    options = build_recipe(RecipeFlags(config="BEST_4BIT", options=("percdamp=0.1",))).options
    assert options == {**PRESETS["BEST_4BIT"].options, "percdamp": 0.1}


def test_expressions_are_added_to_those_of_the_file(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"exclude": ["head"]}))
    assert build_recipe(RecipeFlags(recipe_file=str(file), exclude=("up",))).exclude == ("head", "up")


def test_the_target_is_named_only_when_its_flag_is_given(monkeypatch):
    monkeypatch.setattr(recipe_flags, "Recipe", SimpleNamespace(from_dict=dict))
    before = PRESETS["RTN_G32ASYM"].to_dict()
    assert build_recipe(RecipeFlags()) == before
    assert build_recipe(RecipeFlags(target="qdq")) == before | {"target": "qdq"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"config": "RTN_G32ASYM", "recipe_file": "r.json"}, "--config and --recipe"),
        ({"config": "RTN_G32"}, "did you mean RTN_G32ASYM"),
        ({"scheme": "symm"}, "did you mean sym"),
        ({"scheme": ""}, "unknown scheme"),
        ({"method": "gptp"}, "did you mean gptq"),
        ({"options": ("percdamp",)}, "write NAME=VALUE"),
        ({"recipe_file": "nowhere.json"}, "cannot read the recipe"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(flags, says):
    with pytest.raises(RecipeError, match=says):
        build_recipe(RecipeFlags(**flags))


def test_an_embedding_follows_its_own_grid_before_that_of_the_weights():
    own = Recipe(embedding=Spec(8, 16))
    assert build_embedding_grid(RecipeFlags(), own, {"bits": 2, "symmetric": False}) == {
        **own.to_dict()["embedding"],
        "symmetric": False,
    }
    flags = RecipeFlags(embedding_bits=8)
    grid = build_embedding_grid(flags, Recipe(), {"bits": 2, "group_size": 64})
    assert (grid["bits"], grid["group_size"]) == (8, 64)
    assert build_embedding_grid(RecipeFlags(bits=2), Recipe(), {"bits": 2}) is None


@pytest.mark.parametrize("recipe", [Recipe(), PRESETS["BEST_2BIT"], Recipe("awq", Spec(8, -1), exclude=("a",))])
def test_a_recipe_file_gives_the_recipe_back(recipe, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert read_recipe(file) == recipe


def test_a_recipe_in_toml(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('method = "hqq"\n[spec]\nbits = 3\ngroup_size = 64\n')
    assert read_recipe(file) == Recipe("hqq", Spec(3, 64))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("r.json", "{", "neither JSON nor"),
        ("r.toml", "=", "neither JSON nor"),
        ("r.json", "[]", "must be a table"),
        ("r.json", '{"methd": "rtn"}', "did you mean method"),
    ],
)
def test_a_file_that_is_no_recipe(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_recipe(tmp_path / name)


def test_assignments_are_json_or_else_strings():
    pairs = ("a=1", "b=0.5", "c=true", "d=[1, 2]", "e=word", "f=x=y", "g=")
    parsed = {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "word", "f": "x=y", "g": ""}
    assert parse_assignments(pairs) == parsed


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "RTN_G32ASYM"),
        ({"bits": 3}, "3 bit g32 asym"),
        ({"config": "gptq_g32asym", "bits": 3}, "GPTQ_G32ASYM: 3 bit g32 asym"),
        ({"config": "gptq_g32asym", "method": "awq"}, "GPTQ_G32ASYM: AWQ 4 bit g32 asym"),
        ({"method": "hqq"}, "HQQ 4 bit g32 asym"),
    ],
    ids=str,
)
def test_a_row_is_named_by_what_differs_from_its_preset(flags, name):
    assert build_named_recipe(RecipeFlags(**flags))[0] == name


def test_what_a_tuning_run_tries():
    one = RecipeFlags(bits=8)
    assert build_recipes(one, auto=False, mixing=False) == dict([build_named_recipe(one)])
    tried = build_recipes(one, auto=True, mixing=False)
    assert len(tried) == len(TUNED)
    assert {recipe.spec.bits for recipe in tried.values()} == {8}


def test_what_mixes_are_made_with():
    mixed = build_recipes(RecipeFlags(), auto=False, mixing=True)
    assert list(mixed.values()) == [MIX]
    named = build_recipes(RecipeFlags(config="RTN_G32ASYM"), auto=False, mixing=True)
    base = PRESETS["RTN_G32ASYM"]
    assert named["RTN_G32ASYM"].embedding == base.spec, "embeddings are mixed as well"
    flags = RecipeFlags(config="RTN_G32ASYM", method="hqq", exclude=("head",))
    (name, *others) = build_recipes(flags, auto=True, mixing=True).items()
    assert name[0] == "RTN_G32ASYM: HQQ 4 bit g32 asym"
    assert [other for other, _ in others] == list(TUNED), "the presets keep their own methods"
    assert all(recipe.exclude == ("head",) for _, recipe in others)


def test_a_preset_that_mixes_are_made_with_is_tried_once_and_as_the_base():
    tried = build_recipes(RecipeFlags(config="GPTQ_G32ASYM"), auto=True, mixing=True)
    assert list(tried)[0] == "GPTQ_G32ASYM"  # noqa: RUF015 - the order is the point
    assert tried["GPTQ_G32ASYM"].embedding is not None
    assert len(tried) == len(TUNED)
