"""Shapes that a file notes beside its values and that are wrong: ONNX Runtime passes over them, and quantizing does."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo.nodes import BOOL, graph, node, random, value, write

X = {"x": random(7, 64)}
METHODS = ("rtn", "gptq", "awq")


def outputs(path, feed=X):
    return measure.session(path).run(None, feed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("shape", [(1, "b", 64), ("b", 63), ()])
def test_wrong_shapes_of_inner_values_and_outputs(shape, target, method, tmp_path):
    nodes = [
        node("Relu", ["x"], ["h"]),
        node("MatMul", ["h", "stacked"], ["y"]),
        node("MatMul", ["h", "plain"], ["z"]),
        node("Neg", ["z"], ["out"]),
    ]
    weights = {"stacked": random(1, 64, 48), "plain": random(64, 48, seed=1)}
    wrong = [value("h", shape), value("z", shape)]
    main = graph(nodes, [value("x", ("b", 64))], [value("y", (1, "b", 48)), value("out", shape)], weights, wrong)
    model, out = write(tmp_path / "m.onnx", main), tmp_path / "q.onnx"
    report = quantize(model, out, Recipe(method, Spec(8, 16), target=target, accuracy_level=0), [X])
    before, after = outputs(model), outputs(out)
    assert [a.shape for a in after] == [b.shape for b in before] == [(1, 7, 48), (7, 48)]
    assert all(measure.sqnr(b.astype(np.float64), a) > 33 for b, a in zip(before, after, strict=True))
    assert report.skipped == inspect(model, Recipe(method, Spec(8, 16), target=target, accuracy_level=0)).skipped
    assert [row.name for row in report.groups] == ["z"]


@pytest.mark.parametrize("rank", [3, 4])
def test_a_rank_that_follows_from_the_inputs_is_enough(rank, tmp_path):
    nodes = [node("Relu", ["x"], ["h"]), node("MatMul", ["h", "W"], ["y"])]
    inputs = [value("x", (*range(2, rank + 1), 64))]
    main = graph(nodes, inputs, [value("y")], {"W": random(1, 64, 48)}, [value("h", ("b", 64))])
    model = write(tmp_path / "m.onnx", main)
    assert [row.name for row in quantize(model, tmp_path / "q.onnx").groups] == ["y"]
    feed = {"x": random(*range(2, rank + 1), 64)}
    assert outputs(tmp_path / "q.onnx", feed)[0].shape == outputs(model, feed)[0].shape


def test_an_activation_in_a_branch_is_taken_out_by_the_width_of_its_weight(tmp_path):
    """Calibration flattens it to [tokens, K]: a K from a wrong shape would make other rows of it."""

    def branch(name):
        nodes = [node("Relu", ["x"], [f"h_{name}"]), node("MatMul", [f"h_{name}", "W"], [f"y_{name}"])]
        return graph(nodes, [], [value(f"y_{name}")], None, [value(f"h_{name}", (14, 32))], name)

    nodes = [node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b"))]
    inputs = [value("x", ("b", 64)), value("flag", (), BOOL)]
    model = write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y")], {"W": random(64, 48)}))
    data = [X | {"flag": np.array(flag)} for flag in (True, False)]
    (row,) = quantize(model, tmp_path / "q.onnx", Recipe("gptq", Spec(8, 16)), data).groups
    assert row.error is not None
    assert row.error < 1e-3
