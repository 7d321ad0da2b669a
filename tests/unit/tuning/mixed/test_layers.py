"""The layers of a mix: what may be chosen for each, and the bytes that each choice takes in the file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.quantize import quantize
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed import layers as module
from onnx_woq.tuning.mixed.candidates import MixCandidates
from onnx_woq.tuning.mixed.layers import BITS, GROUPS, bytes_on, freed, made_bytes, mixed_layers
from tests.support import measure
from tests.unit.tuning.mixed.conftest import BASE
from tests.zoo import small as zoo
from tests.zoo.nodes import INT64, graph, node, random, value, write

EVERY = [Spec(bits, group, symmetric) for group in GROUPS for bits in BITS for symmetric in (False, True)]


def test_a_layer_for_each_group_and_the_tied_table_goes_with_its_head(tied):
    layers = mixed_layers(tied, BASE)
    plan = make_plan(tied, BASE)
    assert [layer.name for layer in layers] == [group.name for group in plan.groups]
    assert [layer.table is not None for layer in layers] == [False] * (len(layers) - 1) + [True]
    assert all(layer.specs[-1] is None and not layer.settled for layer in layers)


def test_a_table_of_its_own_is_a_layer_and_one_that_stays_float_is_none(tmp_path):
    model = load(zoo.language_model(tmp_path / "m.onnx", layers=1))
    with_tables, without = mixed_layers(model, BASE), mixed_layers(model, Recipe("rtn"))
    assert [layer.name for layer in with_tables[:-1]] == [layer.name for layer in without]
    assert (with_tables[-1].group, with_tables[-1].name) == (None, "tokens")


def test_a_table_that_a_product_reads_the_same_way_round_is_left_to_the_recipe(tmp_path):
    nodes = [node("Gather", ["T", "ids"], ["rows"]), node("MatMul", ["x", "T"], ["y"])]
    inputs = [value("ids", ("n",), INT64), value("x", ("m", 160))]
    main = graph(nodes, inputs, [value("rows"), value("y")], {"T": random(160, 160)})
    model = load(write(tmp_path / "m.onnx", main))
    assert [table.source.counted for table in make_plan(model, BASE).embeddings] == [True]
    assert [(layer.name, layer.table) for layer in mixed_layers(model, BASE)] == [("y", None)]


def test_what_the_recipe_names_is_settled(tied):
    layers = {layer.name: layer for layer in mixed_layers(tied, Recipe("rtn", overrides={"down": Spec(8, 64)}))}
    settled = [layer for layer in layers.values() if layer.settled]
    assert [layer.name for layer in settled] == ["layer0.down"]
    assert settled[0].specs == (Spec(8, 64),)
    assert settled[0].stored == (settled[0].group.bytes,)


@given(st.dictionaries(st.sampled_from(EVERY), st.integers(1, 9), min_size=len(EVERY), max_size=len(EVERY)))
def test_only_what_nothing_beats_in_no_more_bytes_is_a_choice(sizes):
    kept = module._worthwhile(sizes.__getitem__)
    beats = lambda a, b: (  # noqa: E731
        a != b and a.symmetric == b.symmetric and a.bits >= b.bits and a.group_size <= b.group_size
        and sizes[a] <= sizes[b]
    )  # fmt: skip
    assert set(kept) == {spec for spec in EVERY if not any(beats(other, spec) for other in EVERY)}
    assert list(kept) == [spec for spec in EVERY if spec in kept]


def test_the_bytes_of_a_choice_are_those_of_a_plan_that_has_it(tied):
    for layer, pick in itertools.product(mixed_layers(tied, BASE), (0, 5)):
        spec = layer.specs[pick]
        plan = make_plan(tied, Recipe("gptq", spec, embedding=spec))
        group = next(one for one in plan.groups if one.name == layer.name)
        table = plan.embeddings[0] if layer.table else None
        assert layer.stored[pick] == made_bytes(layer, [group], table) == bytes_on(layer.group, layer.table, spec)
        assert layer.stored[-1] == bytes_on(layer.group, layer.table, None) == layer.main.weight_bytes


def test_float_weights_that_stay_for_others_cost_nothing(tied):
    """The head of a table that stays float: its float numbers are in the file in any case."""
    *_, head = mixed_layers(tied, Recipe("gptq"))
    assert head.table is None
    assert (head.written[-1], freed(tied, head)) == (0, 0)
    assert head.stored[-1] == 4 * zoo.VOCAB * zoo.HIDDEN
    *_, together = mixed_layers(tied, BASE)
    assert together.written[-1] == together.stored[-1] == freed(tied, together)


@pytest.mark.parametrize("base", [BASE, Recipe("rtn")], ids=["tables too", "products alone"])
def test_what_is_freed_are_the_float_weights_that_leave_the_file(base, tied, tmp_path):
    """One layer quantized, and everything else left float by the recipe."""
    before = float_bytes(tied.path)
    layers = mixed_layers(tied, base)
    for place, layer in enumerate(layers):
        picks = [len(one.specs) - 1 for one in layers]
        picks[place] = 0
        recipe = MixCandidates(tied, base, tuple(layers), ("", ""), None).recipe(picks)
        out = tmp_path / f"{place}.onnx"
        quantize(tied.path, out, replace(recipe, method="rtn", options={}))
        assert before - float_bytes(out) == freed(tied, layer)


def float_bytes(path):
    """Of the float matrices of a model."""
    return sum(array.nbytes for name, array in measure.tensors(onnx.load(path)).items() if is_float_weight(name, array))


def is_float_weight(name, array):
    return array.dtype == np.float32 and array.ndim == 2 and "_Q" not in name


def test_a_layer_without_a_weight_is_a_mistake():
    with pytest.raises(ValueError, match="without a weight"):
        bytes_on(None, None, Spec())
