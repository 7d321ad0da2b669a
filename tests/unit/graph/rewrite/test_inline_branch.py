"""A branch written out computes what the If computes when it takes that branch."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.find.blocks import reach
from onnx_woq.graph.io.model import load
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches, untaken_values
from tests.zoo.nodes import BOOL, graph, node, random, run, value, write

K = 32


@pytest.fixture
def merged(tmp_path):
    """y, z = If(flag): both products in one branch, one and the input itself in the other; and a product behind it."""
    then = graph(
        [node("MatMul", ["x", "A"], ["t1"]), node("MatMul", ["t1", "inner"], ["t2"])],
        [],
        [value("t1"), value("t2")],
        {"inner": random(K, K, seed=1)},
    )
    other = graph([node("MatMul", ["x", "A"], ["e1"]), node("Identity", ["x"], ["e2"])], [], [value("e1"), value("e2")])
    nodes = [
        node("If", ["flag"], ["y", "h"], name="if", then_branch=then, else_branch=other),
        node("MatMul", ["h", "B"], ["z"]),
    ]
    inputs = [value("flag", [], BOOL), value("x", ("t", K))]
    weights = {"A": random(K, K, seed=2), "B": random(K, K, seed=3)}
    return load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y"), value("z")], weights)))


@pytest.mark.parametrize("flag", [True, False])
def test_it_computes_the_same(flag, merged):
    feed = {"flag": np.array(flag), "x": random(5, K)}
    assert find_conditions(merged) == {"y": "flag"}
    flat = inline_branches(merged, {"y": flag})
    assert "If" not in [n.op_type for n in flat.ir.graph]
    for one, other in zip(run(flat, feed), run(merged, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert [v.name for v in flat.ir.graph.outputs] == ["y", "z"]
    names = {v.name for n in flat.ir.graph for v in n.outputs}
    assert ({"t1", "t2"} <= names) == flag
    assert untaken_values(merged, {"y": flag}) == ({"e1", "e2"} if flag else {"t1", "t2"})
    assert "If" in [n.op_type for n in merged.ir.graph], "the model itself is left as it was"


def test_nothing_taken_is_the_model_itself(merged):
    assert inline_branches(merged, {}) is merged


def test_a_condition_that_costs_something_is_none(tmp_path):
    """What must run half the model to be known decides nothing beforehand."""
    then = graph([node("MatMul", ["x", "A"], ["t"])], [], [value("t")])
    other = graph([node("MatMul", ["h", "A"], ["e"])], [], [value("e")])
    nodes = [
        node("MatMul", ["x", "A"], ["h"]),
        node("ReduceSum", ["h"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["flag"], to=BOOL),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    main = graph(nodes, [value("x", ("t", K))], [value("y")], {"A": random(K, K)})
    assert find_conditions(load(write(tmp_path / "m.onnx", main))) == {}


def test_how_far_each_value_lies_within_its_branch(merged):
    """As when the branch is written out: the If is not one lump."""
    matrix = 4 * K * K
    found = reach(merged)
    assert [found[name] for name in ("t1", "t2", "e1", "y", "z")] == [matrix * n for n in (1, 2, 1, 2, 3)]
    for flag, names in ((True, ("t1", "t2")), (False, ("e1",))):
        flat = reach(inline_branches(merged, {"y": flag}))
        assert all(flat[name] == found[name] for name in names)
