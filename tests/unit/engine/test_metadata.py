"""What a written model says of itself has the keys of version 0.1, and what a run follows from is all of it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine import metadata as module
from onnx_woq.engine.metadata import layers_json, metadata, run_key, warn_of_old_runtime
from onnx_woq.engine.results import WeightReport
from onnx_woq.recipe import Recipe

ROW = WeightReport(
    "y", "linear", ("y", "z"), Spec(3, 32), 64, 48, 12288, 1500, error=0.25, scaling="norm", rank=16, target="qdq"
)
KEYS = ["name", "sites", "bits", "group_size", "symmetric", "k", "n", "bytes", "error", "scaling"]


def test_a_layer_has_the_keys_of_version_0_1_and_no_others():
    [row] = json.loads(layers_json([ROW]))
    assert list(row) == KEYS
    assert [row[key] for key in KEYS] == ["y", ["y", "z"], 3, 32, False, 64, 48, 1500, 0.25, "norm"]
    [turned] = json.loads(layers_json([WeightReport("y", "linear", ("y",), Spec(group_dim=0), 1, 1, 4, 1)]))
    assert set(turned) - set(KEYS) == {"group_dim"}, "what came later is said where it differs"
    assert json.loads(layers_json([])) == []


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("gptq", Spec(3, 16), exclude=("a.b",), embedding=Spec(8))])
def test_the_recipe_of_a_model_can_be_read_back(recipe):
    said = metadata(recipe, "the model", "the data")
    assert Recipe.from_dict(json.loads(said["onnx_woq.recipe"])) == recipe
    assert said["onnx_woq.source"] == "the model"
    assert said["onnx_woq.calibration"] == ("the data" if recipe.needs_data else ""), "RTN looks at no data"
    assert all(isinstance(text, str) for text in said.values())


def test_a_run_follows_from_each_of_what_it_is_known_by():
    said = metadata(Recipe("gptq"), "the model", "the data")
    key = run_key(said)
    changed = {name: run_key(said | {name: "another"}) for name in said}
    different = {name: [part for part in key if key[part] != other[part]] for name, other in changed.items()}
    assert sorted(different.values()) == [["calibration data"], ["model"], ["package version"], ["recipe"]]
    assert run_key(said | {module.LAYERS: "[]", module.RUNTIME: "1.24"}) == key, "not what is known only afterwards"
    with pytest.raises(KeyError):
        run_key({})


@pytest.mark.parametrize(
    ("installed", "needed", "warned"),
    [("1.23.2", "1.24", True), ("1.24.0", "1.24", False), ("1.9.0", "1.10", True), ("1.32.1", "1.24", False),
     ("2.0.0", "1.24", False), ("1.20.0", "", False)],
)  # fmt: skip
def test_an_older_runtime_than_the_result_needs_is_named(installed, needed, warned, monkeypatch, caplog):
    monkeypatch.setattr(module, "version_of", lambda _: installed)
    warn_of_old_runtime(needed)
    assert [installed in record.getMessage() and needed in record.getMessage() for record in caplog.records] == (
        [True] if warned else []
    )


def test_of_another_distribution_nothing_is_said(monkeypatch, caplog):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version_of", missing)
    warn_of_old_runtime("99.0")
    assert not caplog.records
