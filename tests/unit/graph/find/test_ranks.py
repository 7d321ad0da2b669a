"""Ranks: what follows from the inputs, whatever the file says of other values, and None where nobody knows."""

from __future__ import annotations

import onnx
import pytest

from onnx_woq.graph.find.ranks import Ranks
from onnx_woq.graph.io.model import load
from tests.zoo.nodes import BOOL, graph, node, random, value, write


@pytest.fixture
def model(tmp_path):
    """x [b, t, 8] -> relu -> sum over t -> If(flag: exp of it, else its log) -> y; and something foreign on the way."""
    bodies = [
        graph([node(op, ["sum"], [f"{op}_in"]), node("Neg", [f"{op}_in"], [f"{op}_out"])], [], [value(f"{op}_out")])
        for op in ("Exp", "Log")
    ]
    nodes = [
        node("Relu", ["x"], ["on"]),
        node("ReduceSum", ["on", "axes"], ["sum"], keepdims=0),
        node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
        node("Odd", ["x"], ["odd"], domain="foreign"),
        node("Neg", ["odd"], ["after"]),
    ]
    inputs = [value("x", ("b", "t", 8)), value("flag", [], BOOL)]
    weights = {"axes": onnx.numpy_helper.from_array(random(1).astype("int64") * 0 + 1, "axes")}
    wrong = [value("on", (8,)), value("after", ("b", 8))]
    main = graph(nodes, inputs, [value("y", ("b", 1, 8)), value("after")], weights, wrong)
    return load(write(tmp_path / "m.onnx", main, domains={"foreign": 1}))


def values(model):
    return {v.name: v for g in model.ir.graphs() for v in (*g.inputs, *(o for n in g for o in n.outputs))}


@pytest.mark.parametrize(("name", "rank"), [("x", 3), ("flag", 0), ("on", 3), ("sum", 2), ("Exp_in", 2), ("y", 2)])
def test_what_can_be_inferred_is_in_bodies_too(name, rank, model):
    assert Ranks(model).of(values(model)[name]) == rank


@pytest.mark.parametrize("name", ["odd", "after"])
def test_behind_a_foreign_operator_nobody_knows(name, model):
    assert Ranks(model).of(values(model)[name]) is None


def test_nothing_has_no_rank(model):
    assert Ranks(model).of(None) is None


def test_inference_runs_once_and_only_when_it_is_needed(model, monkeypatch):
    calls = []
    infer = onnx.shape_inference.infer_shapes
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda proto: calls.append(1) or infer(proto))
    ranks, found = Ranks(model), values(model)
    assert ranks.of(found["x"]) == 3
    assert calls == []
    assert [ranks.of(found[name]) for name in ("on", "sum", "odd")] == [3, 2, None]
    assert calls == [1]


def test_where_inference_fails_ranks_are_unknown(model, monkeypatch):
    def fails(proto):
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fails)
    assert Ranks(model).of(values(model)["on"]) is None
    assert Ranks(model).of(values(model)["x"]) == 3
