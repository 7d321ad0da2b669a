"""Edits of a graph: no name twice, nothing removed that is read, and the same numbers afterwards."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_woq.graph import edit
from onnx_woq.graph.io.model import clone, load
from tests.zoo.nodes import BOOL, graph, node, random, run, value, write

K = 16
W = random(K, K)


@pytest.fixture
def model(tmp_path):
    """y = relu(x·W)·W."""
    nodes = [node("MatMul", ["x", "W"], ["h"], name="one"), node("Relu", ["h"], ["on"])]
    nodes.append(node("MatMul", ["on", "W"], ["y"], name="two"))
    return load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("m", K))], [value("y", ("m", K))], {"W": W})))


def named(model, name):
    return next(n for n in model.ir.graph.all_nodes() if n.name == name)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_name_is_given_once(loaded, model):
    main = model.ir.graph
    if not loaded:
        for one in model.ir.graphs():
            one.meta.clear()
    assert [edit.fresh_name(main, name) for name in ("new", "new", "new", "W", "x", "new_2")] == [
        "new", "new_2", "new_3", "W_2", "x_2", "new_2_2"
    ]  # fmt: skip


def test_what_a_clone_takes_its_original_does_not_know_of(model):
    copy = clone(model)
    assert edit.fresh_name(copy.ir.graph, "new") == "new"
    assert edit.fresh_name(model.ir.graph, "new") == "new"
    assert edit.fresh_name(copy.ir.graph, "h") == "h_2"


def test_a_node_put_in_behind_another_takes_over_its_output(model):
    scale = edit.add_initializer(model.ir.graph, "scale", np.float32(3).reshape(()))
    inner = edit.insert_after(named(model, "two"), "Mul", [scale], "raw")
    edit.insert_after(named(model, "one"), "Neg", [], "raw", label="turn")
    assert (inner.name, [v.name for v in model.ir.graph.outputs]) == ("y_raw", ["y"])
    assert [(n.op_type, n.name) for n in model.ir.graph] == [
        ("MatMul", "one"), ("Neg", "one_turn"), ("Relu", model.ir.graph[2].name), ("MatMul", "two"), ("Mul", "two_Mul"),
    ]  # fmt: skip
    x = random(3, K, seed=4)
    np.testing.assert_allclose(run(model, {"x": x})[0], 3 * np.maximum(-x @ W, 0) @ W, rtol=1e-4, atol=1e-4)


def test_nodes_go_where_they_are_told(model):
    main = model.ir.graph
    one = named(model, "one")
    edit.add_node("Neg", [main.inputs[0]], "early", before=one)
    edit.add_node("Neg", [one.outputs[0]], "early", after=one)
    edit.add_node("Neg", [one.outputs[0]], "late", end_of=main)
    assert [n.outputs[0].name for n in main] == ["early", "h", "early_2", "on", "y", "late"]
    with pytest.raises(ValueError, match="say where"):
        edit.add_node("Neg", [main.inputs[0]], "nowhere")
    main.remove(one, safe=False)
    with pytest.raises(ValueError, match="not in a graph"):
        edit.graph_of(one)


def test_pruning_stops_where_something_is_still_read(tmp_path):
    nodes = [
        node("Cast", ["H"], ["wide"], to=1),
        node("Transpose", ["wide"], ["turned"]),
        node("MatMul", ["x", "turned"], ["y"], name="mm"),
        node("Neg", ["wide"], ["n"], name="other"),
    ]
    main = graph(nodes, [value("x", ("m", K))], [value("y"), value("n")], {"H": W.astype(np.float16)})
    model = load(write(tmp_path / "m.onnx", main))
    graph_ = model.ir.graph
    for reader, left in (("mm", {"Cast", "Neg", "MatMul"}), ("other", {"Neg", "MatMul"})):
        reads = named(model, reader)
        old = reads.inputs[0 if reader == "other" else 1]
        edit.prune(old)
        assert "Cast" in {n.op_type for n in graph_}, "somebody reads it"
        reads.replace_input_with(0 if reader == "other" else 1, graph_.inputs[0])
        edit.prune(old)
        assert {n.op_type for n in graph_} == left
    assert list(graph_.initializers) == []


def test_inputs_and_outputs_are_not_pruned(tmp_path):
    nodes = [node("Identity", ["W"], ["w"]), node("Neg", ["x"], ["y"])]
    main = graph(nodes, [value("x", (K,)), value("W", (K, K))], [value("y"), value("w")], {"W": W})
    model = load(write(tmp_path / "m.onnx", main))
    edit.prune(model.ir.graph.outputs[1])
    edit.prune(model.ir.graph.initializers["W"])
    assert ([n.op_type for n in model.ir.graph], list(model.ir.graph.initializers)) == (["Identity", "Neg"], ["W"])


@pytest.mark.parametrize(("elements", "large"), [(256, False), (257, True)])
def test_a_tensor_is_large_beyond_so_many_bytes(elements, large):
    assert edit.is_large(ir.Tensor(np.zeros(elements, np.float32))) == large


def test_text_belongs_into_the_structure_however_long_it_is():
    assert not edit.is_large(ir.StringTensor([b"long"] * 2000, shape=ir.Shape([2000])))


def test_constant_nodes_of_many_elements_become_initializers(tmp_path):
    def constant(name, array):
        return node("Constant", [], [name], value=ir.to_proto(ir.Tensor(array, name=f"{name}_t")))

    nodes = [
        constant("big", W),
        constant("small", np.ones(3, np.float32)),
        constant("shown", W + 1),
        node("MatMul", ["x", "big"], ["h"]),
        node("ReduceSum", ["small"], ["sum"], keepdims=0),
        node("Mul", ["h", "sum"], ["y"]),
    ]
    outputs = [value("y", ("m", K)), value("shown", (K, K))]
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x", ("m", K))], outputs))
    model, x = load(path), random(2, K, seed=1)  # the limit of `load` is 64 elements
    assert list(model.ir.graph.initializers) == ["big"]
    edit.lift_constants([model.ir.graph], 3)
    assert list(model.ir.graph.initializers) == ["big", "small"]
    for got, want in zip(run(model, {"x": x}), run(path, {"x": x}), strict=True):
        np.testing.assert_array_equal(got, want)


def test_large_constants_of_bodies_move_to_the_main_graph(tmp_path):
    large = random(K, K + 1)  # one number more than the structure takes would do
    bodies = [
        graph([node("MatMul", ["x", "W"], [out]), node("Gather", [out, "i"], [f"{out}_y"])], [], [value(f"{out}_y")],
              {"W": large * factor, "i": np.array([0], np.int64)})
        for factor, out in ((1, "a"), (2, "b"))
    ]  # fmt: skip
    nodes = [node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])]
    main = graph(nodes, [value("x", (3, K)), value("flag", [], BOOL)], [value("y", (1, K + 1))])
    path = write(tmp_path / "m.onnx", main)
    model = load(path)
    assert sorted(model.ir.graph.initializers) == ["W", "W_2"]
    assert {name for g in model.ir.graph.subgraphs() for name in g.initializers} == {"i", "i_2"}
    for flag in (True, False):
        feed = {"x": random(3, K, seed=2), "flag": np.array(flag)}
        np.testing.assert_array_equal(run(model, feed)[0], run(path, feed)[0])
