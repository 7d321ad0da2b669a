"""Names that a runtime looks up stay what they are: those of a body whose node is not ONNX's own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from onnx_woq.errors import NothingToQuantize
from tests.support import measure
from tests.zoo import generation

EIGHT = Spec(8, 32)
RECIPES = {
    "matmulnbits": Recipe("rtn", EIGHT),
    "tables": Recipe("rtn", EIGHT, embedding=EIGHT),
    "qdq at a newer opset": Recipe("rtn", EIGHT, target="qdq"),
}


def interfaces(path):
    """Of every body that a node of another domain owns, the names of inputs and outputs."""
    nodes = measure.nodes(onnx.load(path))
    graphs = [a.g for n in nodes if n.domain == "com.microsoft" for a in n.attribute if a.HasField("g")]
    return [([v.name for v in g.input], [v.name for v in g.output]) for g in graphs]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_generates_still_does(name, beside, tmp_path):
    model, out = generation.greedy_search(tmp_path / "m.onnx", beside=beside), tmp_path / "q.onnx"
    report = quantize(model, out, RECIPES[name])
    assert sum(len(row.nodes) for row in report.weights) == 2 + beside + (name == "tables")
    assert interfaces(out) == interfaces(model)
    feed = [generation.feed(beside=beside)]
    before, after = measure.run(model, feed), measure.run(out, feed)
    np.testing.assert_array_equal(after["sequences"], before["sequences"])
    if beside:
        assert measure.sqnr(before["y"], after["y"]) > 33


def test_what_calibration_cannot_see_stays_float_and_says_so(tmp_path):
    """The body's outputs are the node's interface: none may be added to them to look at an activation."""
    model, recipe = generation.greedy_search(tmp_path / "m.onnx", beside=True), Recipe("gptq", EIGHT)
    report = quantize(model, tmp_path / "q.onnx", recipe, [generation.feed(beside=True)])
    assert [row.nodes for row in report.groups] == [("y",)]
    reasons = {row.node_name: row.reason for row in report.skipped if row.op_type == "MatMul"}
    blind = "inside GreedySearch, where calibration cannot look: rtn and hqq quantize it"
    assert reasons == {"key": blind, "head": blind}
    assert report.skipped == inspect(model, recipe).skipped
    assert interfaces(tmp_path / "q.onnx") == interfaces(model)
    alone = generation.greedy_search(tmp_path / "alone.onnx")
    with pytest.raises(NothingToQuantize, match="inside GreedySearch, where calibration cannot look"):
        quantize(alone, tmp_path / "a.onnx", recipe, [generation.feed()])
