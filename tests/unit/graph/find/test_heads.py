"""The head is the product that the output is made of, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.find.heads import find_heads
from onnx_woq.graph.io.model import load
from tests.zoo.nodes import BOOL, INT64, graph, node, random, value, write

K = 16
PRODUCTS = [node("MatMul", ["x", "A"], ["h"], name="first"), node("MatMul", ["h", "B"], ["p"], name="last")]
WEIGHTS = {"A": random(K, K), "B": random(K, K, seed=1), "c": random(K, seed=2), "axes": np.array([0], np.int64)}


def heads(tmp_path, nodes, outputs, extra=()):
    used = {name for n in nodes for name in n.input} | {"A", "B"}
    weights = {name: array for name, array in WEIGHTS.items() if name in used}
    inputs = [value("x", ("m", K)), *extra]
    main = load(write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, weights))).ir.graph
    products = [n for n in main.all_nodes() if n.op_type in ("MatMul", "Gemm")]
    return sorted(n.name for n in find_heads(main, products))


@pytest.mark.parametrize(
    "tail",
    [
        [],
        [node("Add", ["p", "c"], ["y"])],
        [node("Mul", ["c", "p"], ["y"])],
        [node("Tanh", ["p"], ["t"]), node("Unsqueeze", ["t", "axes"], ["u"]), node("Softmax", ["u"], ["y"], axis=-1)],
        [node("Sub", ["p", "x"], ["y"])],
    ],
    ids=lambda tail: "-".join(n.op_type for n in tail) or "nothing",
)
def test_what_stands_behind_the_head_is_seen_through(tail, tmp_path):
    later = node("MatMul", ["x", "A"], ["side"], name="later")  # the head of a model in which none is found
    outputs = [value("y" if tail else "p"), value("side")]
    assert heads(tmp_path, [*PRODUCTS, *tail, later], outputs) == ["last"]


def test_the_first_float_output_counts(tmp_path):
    nodes = [*PRODUCTS, node("ArgMax", ["p"], ["best"], axis=-1), node("Relu", ["h"], ["state"])]
    outputs = [value("best", None, INT64), value("p"), value("state")]
    assert heads(tmp_path, nodes, outputs) == ["last"]
    nodes = [*PRODUCTS, node("Tanh", ["h"], ["state"])]
    assert heads(tmp_path, nodes, [value("state"), value("p")]) == ["first"]


def test_where_two_computed_values_meet_the_way_ends(tmp_path):
    """The sum of two products has no head of its own; then it is the last product of the graph."""
    nodes = [*PRODUCTS, node("Add", ["h", "p"], ["y"])]
    assert heads(tmp_path, nodes, [value("y")]) == ["last"]
    nodes = [*PRODUCTS, node("MatMul", ["p", "A"], ["side"], name="later"), node("Add", ["h", "p"], ["y"])]
    assert heads(tmp_path, nodes, [value("y"), value("side")]) == ["later"]


def test_each_branch_of_an_if_has_its_own(tmp_path):
    bodies = [
        graph([node("MatMul", ["x", w], [f"{w}_p"], name=f"in {w}"), node("Tanh", [f"{w}_p"], [f"{w}_y"])], [],
              [value(f"{w}_y")])
        for w in "AB"
    ]  # fmt: skip
    nodes = [node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])]
    assert heads(tmp_path, nodes, [value("y", ("m", K))], [value("flag", [], BOOL)]) == ["in A", "in B"]


def test_without_products_there_is_none(tmp_path):
    assert heads(tmp_path, [node("Relu", ["x"], ["y"])], [value("y")]) == []
