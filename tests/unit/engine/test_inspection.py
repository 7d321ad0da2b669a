"""A look at a model says what quantizing it would do, to the byte of every weight, and changes nothing."""

from __future__ import annotations

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.inspection import inspect
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.quantize import quantize
from onnx_woq.errors import ModelError, RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe
from tests.support import measure
from tests.zoo import small as zoo

RECIPES = [
    Recipe(),
    Recipe(spec=Spec(3, 64, symmetric=True), embedding=Spec(8, 32), exclude=("layer0.q",)),
    Recipe(spec=Spec(4, 24), target="qdq", lm_head=False),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["4 bits", "3 bits and tables", "qdq"])
def test_it_is_what_becomes_of_the_model(recipe, tied_lm, tmp_path):
    """Where no data are needed, every row is what it will be, and the files are nearly."""
    found, done = inspect(tied_lm, recipe), quantize(tied_lm, tmp_path / "q.onnx", recipe)
    assert found.weights == done.weights
    assert (found.skipped, found.copies, found.bytes_before) == (done.skipped, done.copies, done.bytes_before)
    # Each row has room for an error that is not measured without data, and places have names of another length.
    assert 0 <= found.bytes_after - done.bytes_after <= 32 * len(found.weights)


def test_rows_are_those_of_the_plan(lm):
    for recipe in RECIPES:
        plan = make_plan(load(lm), recipe)
        assert inspect(lm, recipe).weights == tuple(one.report() for one in (*plan.groups, *plan.embeddings))


def test_nothing_is_touched(tmp_path):
    model = zoo.language_model(tmp_path / "m.onnx", external="m.data")
    before = measure.listing(tmp_path)
    inspect(model, RECIPES[1])
    assert measure.listing(tmp_path) == before


def test_a_folder_and_the_name_of_a_preset_stand_for_model_and_recipe(tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx")
    found = inspect(tmp_path, "balanced_4bit")
    assert found == inspect(model, preset("BALANCED_4BIT"))
    assert found.recipe == preset("BALANCED_4BIT")
    with pytest.raises(RecipeError, match="unknown config"):
        inspect(tmp_path, "BALANCED_9BIT")
    with pytest.raises(ModelError):
        inspect(tmp_path / "other.onnx")
