"""A preset's name says its grid, its line for people says no other one, and no preset can be changed."""

from __future__ import annotations

import re

import pytest

from onnx_woq.core.methods.registry import METHODS
from onnx_woq.errors import RecipeError
from onnx_woq.presets import MEANINGS, PRESETS, TUNED, preset
from onnx_woq.recipe import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_says_the_grid(name):
    spec = PRESETS[name].spec
    if published := re.match(r"(RTN|GPTQ|AWQ)_G(\d+)(A?SYM)", name):
        assert PRESETS[name].method == published[1].lower()
        assert (spec.bits, spec.group_size, spec.symmetric) == (4, int(published[2]), published[3] == "SYM")
    else:
        assert spec.bits == int(re.fullmatch(r"(?:FAST|BALANCED|BEST)_(\d)BIT", name)[1])


@pytest.mark.parametrize("name", PRESETS)
def test_the_line_for_people_says_the_same_grid(name):
    spec, line = PRESETS[name].spec, MEANINGS[name]
    assert "\n" not in line
    assert {int(bits) for bits in re.findall(r"(\d+) bits", line)} <= {spec.bits}
    assert {int(size) for size in re.findall(r"groups of (\d+)", line)} <= {spec.group_size}
    assert ("needs no calibration data" in line) == (not PRESETS[name].needs_data)
    for other in re.findall(r"as (\w+_\dBIT)", line):
        assert PRESETS[other].options.keys() <= PRESETS[name].options.keys()


def test_every_preset_survives_json_and_is_unlike_the_others():
    assert len({recipe.fingerprint() for recipe in PRESETS.values()}) == len(PRESETS)
    for recipe in PRESETS.values():
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_tuning_tries_presets_each_once():
    assert set(TUNED) <= set(PRESETS)
    assert len(set(TUNED)) == len(TUNED)


def test_names_are_found_in_any_case_and_unknown_ones_answered():
    assert preset("best_4bit") is preset("BEST_4BIT")
    with pytest.raises(RecipeError, match="unknown config 'GPTQ_G64ASYM': did you mean GPTQ_G"):
        preset("GPTQ_G64ASYM")


def test_presets_are_not_to_be_changed():
    with pytest.raises(TypeError):
        PRESETS["MINE"] = Recipe()
    assert all(recipe.method in METHODS for recipe in PRESETS.values())
