"""Squares summed over heads: what numpy makes of the whole probabilities, in every opset, with a batch axis or not."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.io.model import load
from onnx_woq.graph.rewrite.sum_over_heads import HEADS_AXIS, sum_over_heads
from tests.zoo.nodes import graph, node, random, run, value, write


def part(path, shape, opset):
    nodes = [node("Softmax", ["x"], ["p"], axis=-1), node("Neg", ["x"], ["other"])]
    return load(write(path, graph(nodes, [value("x", shape)], [value("p", shape), value("other", shape)]), opset=opset))


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 5, 7)])
def test_it_is_the_sum_of_squares(shape, opset, tmp_path):
    model, x = part(tmp_path / "m.onnx", shape, opset), random(*shape)
    probabilities, other = run(model, {"x": x})
    assert sum_over_heads(model, ["p"]) == {"p": "p_squares"}
    assert [v.name for v in model.ir.graph.outputs] == ["p_squares", "other"]
    summed, same = run(model, {"x": x})
    assert summed.shape == (*shape[:-3], *shape[-2:])
    np.testing.assert_allclose(summed, (probabilities.astype(np.float64) ** 2).sum(HEADS_AXIS), rtol=1e-5)
    np.testing.assert_array_equal(same, other)


def test_only_outputs_are_replaced_and_each_once(tmp_path):
    model = part(tmp_path / "m.onnx", (1, 2, 3, 3), 21)
    assert sum_over_heads(model, ["p", "x", "p", "nothing"]) == {"p": "p_squares"}
    assert [n.op_type for n in model.ir.graph] == ["Softmax", "Neg", "ReduceSumSquare"]


def test_new_names_are_not_those_of_other_values(tmp_path):
    nodes = [node("Softmax", ["p_squares"], ["p"], axis=-1)]
    main = graph(nodes, [value("p_squares", (1, 2, 3, 3))], [value("p")])
    model = load(write(tmp_path / "m.onnx", main))
    assert sum_over_heads(model, ["p"]) == {"p": "p_squares_2"}
