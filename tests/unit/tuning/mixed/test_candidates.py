"""Mixes of a model: what they add up to, and recipes that name each layer and no other."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import ModelError
from onnx_woq.graph.io.model import file_bytes, load
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed.candidates import MixCandidates
from onnx_woq.tuning.mixed.layers import mixed_layers
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, random, value, write


def picks_of(mixer, seed):
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(len(layer.specs))) for layer in mixer.layers)


@pytest.mark.parametrize("seed", range(5))
def test_the_recipe_of_a_mix_makes_it(seed, mixer):
    picks = picks_of(mixer, seed)
    recipe = mixer.recipe(picks)
    plan = make_plan(mixer.source, recipe)
    made = {weight.name: weight.spec for weight in plan.groups}
    wanted = {layer.name: layer.specs[pick] for layer, pick in zip(mixer.layers, picks, strict=True)}
    assert made == {name: spec for name, spec in wanted.items() if spec is not None}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    chosen = mixer.layer_choices(recipe)
    assert [(layer.name, layer.spec) for layer in chosen] == list(wanted.items())
    assert math.fsum(layer.predicted for layer in chosen) == pytest.approx(mixer.loss(picks))
    assert 8 * sum(layer.bytes for layer in chosen) / mixer.weights == pytest.approx(mixer.bits_per_weight(picks))


def test_the_frontier_rises_in_bytes_and_falls_in_loss(mixer):
    points = mixer.points
    for one, other in itertools.pairwise(points):
        assert one.bytes < other.bytes
        assert one.loss > other.loss
    assert points[0].bytes == mixer.smallest("written").bytes
    assert all(any(u.specs[p] for u, p in zip(mixer.layers, point.picks, strict=True)) for point in points)
    for point in points[:: len(points) // 5]:
        assert mixer.loss(point.picks) == pytest.approx(point.loss)


def test_the_best_within_a_budget(mixer):
    smallest = mixer.smallest("stored")
    assert mixer.within_bytes(smallest.bytes - 1, "stored") is None
    assert sum(u.stored[p] for u, p in zip(mixer.layers, smallest.picks, strict=True)) == smallest.bytes
    for budget in (smallest.bytes, 2 * smallest.bytes):
        found = mixer.within_bytes(budget, "stored")
        assert found.bytes <= budget
    middle = mixer.points[len(mixer.points) // 2]
    found = mixer.within_loss(middle.loss)
    assert found.loss <= middle.loss
    assert found.bytes <= middle.bytes


def test_everything_float_is_no_mix(mixer):
    nearest = mixer.nearest_float()
    kept = [(u, p) for u, p in zip(mixer.layers, nearest.picks, strict=True) if u.specs[p] is not None]
    assert len(kept) == 1
    every = [loss for u in mixer.layers for loss, spec in zip(u.losses, u.specs, strict=True) if spec is not None]
    assert nearest.loss == kept[0][0].losses[kept[0][1]] == min(every)
    assert mixer.within_loss(0.0) == nearest
    assert mixer.within_bytes(1 << 40, "written") == nearest


def test_bytes_that_are_added_up_are_near_those_of_the_file(mixer):
    picks = picks_of(mixer, 1)
    planned = mixer.planned(mixer.recipe(picks))
    assert mixer.written(picks) == pytest.approx(planned, rel=0.2)
    floats = tuple(len(layer.specs) - 1 for layer in mixer.layers)
    assert mixer.written(floats) == file_bytes(mixer.source)
    assert mixer.final(mixer.source.path) == file_bytes(mixer.source)


def test_what_is_settled_is_left_to_the_recipe(mixer):
    settled = replace(mixer.layers[0], specs=(Spec(8, 32),), stored=(1,), written=(1,), losses=(0.5,))
    one = replace(mixer, layers=(settled, *mixer.layers[1:]))
    recipe = one.recipe((0,) * len(one.layers))
    assert not any(re.search(expression, settled.name) for expression in recipe.overrides)
    assert any(re.search(expression, mixer.layers[1].name) for expression in recipe.overrides)


def test_nodes_whose_every_name_is_another_ones_too_cannot_be_told_apart(tmp_path):
    nodes = [
        node("MatMul", ["x", "w1"], ["o1"], name="o2"), node("MatMul", ["y", "w2"], ["o2"], name="o1"),
        node("MatMul", ["z", "w3"], ["o3"], name="w1"),
    ]  # fmt: skip
    weights = {f"w{i}": random(64, 64, seed=i) for i in (1, 2, 3)}
    main = graph(nodes, [value(name, ("m", 64)) for name in "xyz"], [value(f"o{i}") for i in (1, 2, 3)], weights)
    model = load(write(tmp_path / "m.onnx", main))
    layers = tuple(mixed_layers(model, Recipe("rtn")))
    with pytest.raises(ModelError, match="around 'o1' share their names with other products"):
        MixCandidates(model, Recipe("rtn"), layers, ("", ""), None).recipe((0, 0, 0))


@pytest.mark.parametrize("weighted", [False, True], ids=["joined", "apart"])
def test_a_recipe_that_groups_linears_otherwise_is_counted_once(weighted, tmp_path):
    """4 bits in groups of 32 with scale and zero point are 4 + 36/32 bits, whether q stands with k and v or not."""
    model = load(zoo.language_model(tmp_path / "kvq.onnx", layers=1, projections="kvq"))
    base, other = (Recipe("gptq", Spec(4, 32), attention_weighted=on) for on in (weighted, not weighted))
    mixer = MixCandidates(model, base, tuple(mixed_layers(model, base)), ("", ""), None)
    for recipe in (base, other):
        found = mixer.layer_choices(recipe)
        assert {layer.bits for layer in found if layer.k == 64} == {5.125}
        assert sum(layer.bytes for layer in found) == sum(group.bytes for group in make_plan(model, recipe).groups)
    q_finer = replace(other, overrides={"q$": Spec(8, 32)})
    mean = (2 * 5.125 + 8 + 40 / 32) / 3
    apart = {"layer0.k": 5.125, "layer0.q": 9.25} if weighted else {"layer0.k": pytest.approx(mean)}
    found = {layer.name: layer.bits for layer in mixer.layer_choices(q_finer) if layer.name in apart}
    assert found == apart
    q_float = replace(other, exclude=("q$",))
    apart |= {"layer0.q": 32} if weighted else {"layer0.k": pytest.approx((2 * 5.125 + 32) / 3)}
    assert {layer.name: layer.bits for layer in mixer.layer_choices(q_float) if layer.name in apart} == apart
