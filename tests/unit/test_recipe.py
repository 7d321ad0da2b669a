"""Recipes are refused early, name the nearest known thing, and survive the trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError
from onnx_woq.presets import MEANINGS, PRESETS, TUNED, preset
from onnx_woq.recipe import Recipe

SPECS = st.builds(
    Spec, bits=st.integers(1, 8), group_size=st.sampled_from([-1, 16, 32, 48, 128, 1024]), symmetric=st.booleans()
)


def test_the_published_five_come_first_and_mean_what_they_always_did():
    table = {
        "RTN_G32ASYM": ("rtn", 32, True),
        "GPTQ_G32ASYM": ("gptq", 32, True),
        "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": ("gptq", 32, False),
        "GPTQ_G128ASYM": ("gptq", 128, True),
        "AWQ_G32ASYM": ("awq", 32, True),
    }
    assert list(PRESETS) == list(MEANINGS)
    assert list(PRESETS)[:5] == list(TUNED)[:5] == list(table)
    for name, (method, group_size, lm_head) in table.items():
        recipe = preset(name.lower())
        assert recipe == Recipe(method, Spec(4, group_size, False), lm_head=lm_head)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_family_keeps_its_grid_and_takes_another_where_it_is_given(bits):
    fast, balanced, best = (preset(f"{effort}_{bits}bit") for effort in ("fast", "balanced", "best"))
    assert fast.spec == balanced.spec == best.spec
    assert fast.spec.bits == bits
    assert fast.nsamples < balanced.nsamples < best.nsamples
    assert best.with_spec(group_size=128).options == best.options


@given(
    SPECS,
    st.sampled_from(["rtn", "gptq", "awq"]),
    st.lists(st.sampled_from(["a", "^b$", "layers\\.3"]), unique=True),
    st.booleans(),
    st.sampled_from([0, 16, 64]),
)
def test_json_round_trip_keeps_every_field_and_the_fingerprint(spec, method, exclude, lm_head, rank):
    fields = {"lm_head": lm_head, "bias_correction": not lm_head, "lowrank": rank}
    recipe = Recipe(method, spec, exclude=tuple(exclude), overrides={"x": None, "y": Spec(8)}, **fields)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()
    assert again.fingerprint() == recipe.fingerprint()


def test_a_list_is_as_good_as_a_tuple():
    one, other = (Recipe("gptq", options={"mse_range": kind((0.5, 1.0, 0.1))}) for kind in (list, tuple))
    assert one == other


def test_fingerprint_tells_any_two_presets_apart():
    assert len({recipe.fingerprint() for recipe in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Spec(bits=9), "1 to 8"),
        (lambda: Spec(bits=0), "1 to 8"),
        (lambda: Spec(bits=True), "bits"),
        (lambda: Spec(group_size=-3), "group_size=-3"),
        (lambda: Spec(group_size=0), "group_size=0"),
        (lambda: Recipe("gptk"), "gptq"),
        (lambda: Recipe("gptq", options={"act_order": True}), "actorder"),
        (lambda: Recipe(accuracy_level=5), "0 to 4"),
        (lambda: Recipe(nsamples=0), "nsamples"),
        (lambda: Recipe(bias_correction=1), "bias_correction"),
        (lambda: Recipe(lowrank=8), "multiple of 16"),
        (lambda: Recipe(exclude=("(",)), "regular expression"),
        (lambda: Recipe.from_dict({"metod": "rtn"}), "method"),
        (lambda: Recipe.from_dict({"spec": {"groupsize": 32}}), "group_size"),
        (lambda: Recipe.from_dict({"spec": 4}), "table"),
        (lambda: preset("RTN_G32SYM"), "RTN_G32ASYM"),
    ],
)
def test_what_is_wrong_is_refused_by_name(make, names):
    with pytest.raises(RecipeError, match=names):
        make()


def test_recipe_fields_among_the_options_are_lifted():
    recipe = Recipe.from_dict({"method": "gptq", "options": {"actorder": True, "nsamples": 7, "lm_head": False}})
    assert dict(recipe.options) == {"actorder": True}
    assert (recipe.nsamples, recipe.lm_head) == (7, False)


def test_expressions_are_searched_in_every_name_and_the_last_override_wins():
    recipe = Recipe(include=("proj",), exclude=("down",), overrides={"q_": Spec(8), "layers.0": None})
    assert recipe.spec_for("", "/layers.1/q_proj_output", "w") == (Spec(8), "")
    assert recipe.spec_for("node", "value", "k_proj.weight") == (Spec(), "")
    assert recipe.spec_for("layers.0.q_proj")[0] is None
    assert "down" in recipe.spec_for("down_proj")[1]
    assert "include" in recipe.spec_for("head")[1]
    assert Recipe(exclude=("",)).spec_for("head") == (None, "excluded by ''"), "nothing is in every name"


@given(SPECS, st.integers(1, 300))
def test_a_group_is_never_longer_than_the_weight(spec, k):
    assert 1 <= spec.resolved_group(k) <= k


def test_names_of_version_0_1_are_read_and_written():
    """Hashes of recipes, and with them journals, follow from what is written."""
    old = {"method": "gptq", "both_streams": True, "stream_share": 0.5}
    new = {"method": "gptq", "asymmetric_calibration": True, "asymmetric_strength": 0.5}
    assert Recipe.from_dict(old) == Recipe.from_dict(new) == Recipe(**old) == Recipe(**new)
    written = Recipe.from_dict(new).to_dict()
    assert {name: written[name] for name in old} == old
    assert not {"asymmetric_calibration", "asymmetric_strength", "target"} & set(written)
    assert "group_dim" not in written["spec"]
    assert replace(Recipe(**old), nsamples=3) == Recipe(**old, nsamples=3)


def test_fingerprints_of_version_0_1_stand():
    """Of the first version, as its journals have them."""
    assert Recipe("gptq").fingerprint() == "ce98c2867c776211"
    assert Recipe("awq", Spec(3, 64, symmetric=True), both_streams=True).fingerprint() == "b7037200a47ac93a"
