"""A summary says what the result says, in values that JSON can hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from onnx_woq import Recipe, Spec, quantize, write_report
from onnx_woq.errors import OutputError
from onnx_woq.report.html_page import page
from onnx_woq.report.summary import layers_of, summary
from tests.zoo import architectures as arch


def test_json_says_what_the_result_says(tuned, decoder, tmp_path):
    found = json.loads(write_report(tuned, tmp_path / "r.json", model=decoder, command="onnx-woq …").read_text())
    assert found["tuning"]["best"] == tuned.best.name
    assert [t["metric"] for t in found["tuning"]["trials"]] == [t.metric for t in tuned.trials]
    assert found["bytes_after"] == tuned.best.bytes
    assert found["command"] == "onnx-woq …"
    assert found["recipe"] == json.loads(json.dumps(tuned.best.recipe.to_dict()))
    assert json.dumps(found, allow_nan=False)


def test_layers_are_those_of_the_written_model(decoder, data, tmp_path):
    recipe = Recipe("gptq", Spec(4, 32), overrides={"down": Spec(8, 32)}, exclude=("layer2.o",))
    report = quantize(decoder, tmp_path / "q.onnx", recipe, data)
    rows = layers_of(report.output)
    assert [(r["name"], r["bits"], r["error"]) for r in rows] == [(t.name, t.spec.bits, t.error) for t in report.groups]
    found = summary(report)
    assert [row for row in found["layers"] if row["bits"] is not None] == json.loads(json.dumps(rows))
    (left,) = [row for row in found["layers"] if row["bits"] is None]
    assert (left["name"], left["layer"]) == ("layer2.o", 2)
    assert left["bytes"] == 4 * left["k"] * left["n"]
    assert {row["layer"] for row in found["layers"]} == {0, 1, 2, None}
    by_layer = [[row["kind"] for row in found["layers"] if row["layer"] == layer] for layer in (0, 1, 2)]
    assert by_layer[0] == by_layer[1] == by_layer[2]


def test_what_stays_float_and_embeddings_are_those_of_the_result(data, tmp_path):
    path = arch.decoder(tmp_path / "m.onnx", layers=2, tied=True)
    grid = {"bits": 4, "group_size": 32, "symmetric": False}
    recipe = Recipe.from_dict({"method": "rtn", "spec": grid, "embedding": grid, "exclude": ["down"]})
    report = quantize(path, tmp_path / "q.onnx", recipe)
    found = summary(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert found["skipped"] == plain["skipped"]
    assert found["embeddings"] == plain["embeddings"]
    assert "down" in page(found)


def test_a_result_that_names_no_model_needs_to_be_told_which(tuned, decoder):
    nameless = replace(tuned, model=None)
    with pytest.raises(OutputError, match=r"model=PATH"):
        summary(nameless)
    assert summary(nameless, decoder)["model"] == str(decoder)


def test_a_folder_stands_for_its_model_and_versions_are_said(tuned, decoder):
    found = summary(tuned, decoder.parent)
    assert found["kind"] == "tuning"
    assert {"python", "platform", "onnx-woq", "onnxruntime"} <= set(found["versions"])
    assert found["tuning"]["unit"] == "nats per token"


def test_a_model_that_we_have_not_written_has_no_rows(decoder):
    assert layers_of(decoder) == []
