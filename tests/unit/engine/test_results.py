"""Rows and reports: two kinds of weights apart, and in JSON the keys of version 0.1."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.results import Inspection, QuantizeReport, WeightReport
from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.find.linears import Skipped
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe

LINEAR = WeightReport("q", "linear", ("q", "k"), Spec(), 64, 96, 24576, 4000, error=0.01, scaling="mul", rank=16)
TABLE = WeightReport(
    "rows", "embedding", ("rows",), Spec(8), 64, 2100, 0, 0, weight_name="embedding", shared_with="logits"
)
SKIPPED = (Skipped("y", "", "MatMul", "both inputs are computed", 0),)
REPORT = QuantizeReport(
    Path("m.onnx"), Path("q.onnx"), Recipe("awq"), (LINEAR, TABLE), SKIPPED, {"W": 12}, 100, 50, "abc", 1.5
)


def test_a_row_has_the_names_of_version_0_1():
    assert LINEAR.sites == LINEAR.nodes == ("q", "k")
    assert TABLE.gathers == TABLE.nodes
    assert (TABLE.rows, TABLE.columns) == (2100, 64)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (LINEAR, ["name", "sites", "spec", "k", "n", "bytes_before", "bytes_after", "error", "scaling", "rank"]),
        (TABLE, ["name", "gathers", "weight_name", "spec", "rows", "columns", "bytes_before", "bytes_after",
                 "shared_with"]),
    ],
    ids=["linear", "table"],
)  # fmt: skip
def test_the_keys_of_a_row_are_those_of_version_0_1(row, keys):
    """A target came later: it is said where it is another one."""
    said = row.to_dict()
    assert list(said) == keys
    assert all(said[key] == getattr(row, key) for key in keys if key != "spec")
    assert Spec.from_dict(said["spec"]) == row.spec
    assert list(replace(row, target="qdq").to_dict()) == [*keys, "target"]


def test_kinds_are_told_apart_and_none_is_lost():
    for report in (REPORT, Inspection(*[None] * 2, (TABLE, LINEAR, TABLE), *[None] * 5)):
        assert report.taps == report.groups == (LINEAR,)
        assert set(report.embeddings) == {TABLE}
        assert len(report.groups) + len(report.embeddings) == len(report.weights)


def test_a_report_is_json_and_says_what_its_rows_say():
    said = json.loads(json.dumps(REPORT.to_dict()))
    assert said["taps"] == json.loads(json.dumps([LINEAR.to_dict()]))
    assert said["embeddings"] == json.loads(json.dumps([TABLE.to_dict()]))
    assert said["skipped"][0]["reason"] == "both inputs are computed"
    assert (said["copies"], said["bytes_before"], said["bytes_after"]) == ({"W": 12}, 100, 50)
    assert Recipe.from_dict(said["recipe"]) == REPORT.recipe
    assert (said["model"], said["output"]) == ("m.onnx", "q.onnx")


def test_an_inspection_says_how_the_graph_is_cut(lm):
    found = Inspection(lm, Recipe(), (LINEAR,), SKIPPED, {}, 100, 50, tuple(cuts(load(lm))))
    said = json.loads(json.dumps(found.to_dict()))
    assert [cut["kind"] for cut in said["cuts"]] == [cut.kind for cut in found.cuts]
    for cut, kept in zip(said["cuts"], found.cuts, strict=True):
        assert [block["weight_bytes"] for block in cut["blocks"]] == [block.weight_bytes for block in kept.blocks]
        assert all(set(block) == {"outputs", "weight_bytes"} for block in cut["blocks"])
