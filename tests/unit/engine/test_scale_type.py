"""Scales are float16 where that is asked for and holds them; weights are looked at once."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.engine import scale_type as module
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import clone, load
from onnx_woq.recipe import Recipe
from tests.zoo import nodes
from tests.zoo import small as zoo


def types(model, recipe):
    return [weight.storage.scale_dtype for weight in make_plan(model, recipe).groups]


@pytest.mark.parametrize(
    ("dtype", "magnitude", "half", "found"),
    [
        (np.float32, 1, False, np.float32),
        (np.float32, 1, True, np.float16),
        (np.float32, 1e-9, True, np.float32),
        (np.float32, 1e9, True, np.float32),
        (np.float16, 1, False, np.float16),
        (np.float16, 1e-6, True, np.float16),
    ],
)
def test_the_type_of_scales(dtype, magnitude, half, found, tmp_path):
    weight = (zoo.weight(1, 64, 32) * magnitude).astype(dtype)
    model = load(nodes.linear(tmp_path / "m.onnx", weight))
    assert types(model, Recipe(half_scales=half)) == [found]


def test_weights_are_looked_at_once_and_only_if_it_matters(tmp_path, monkeypatch):
    seen = []
    original = module.holds
    monkeypatch.setattr(module, "holds", lambda *arguments: seen.append(1) or original(*arguments))
    weights = {"a": zoo.weight(1, 64, 32), "b": 1e-9 * zoo.weight(2, 64, 32)}
    model = load(zoo.siblings(tmp_path / "m.onnx", weights))
    assert types(model, Recipe()) == [np.float32]
    assert not seen
    for again in (model, clone(model), model):
        assert types(again, Recipe(half_scales=True)) == [np.float32], "one of them is enough"
    assert len(seen) == 2
    assert types(load(model.path), Recipe(half_scales=True)) == [np.float32], "another file might be there by now"
    assert len(seen) == 4
