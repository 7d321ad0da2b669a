"""Inner values come out with the numbers the model computes with, wherever they are computed."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.errors import ModelError
from onnx_woq.graph.io.model import load, serialize
from onnx_woq.graph.rewrite.expose_values import expose
from tests.zoo.nodes import BOOL, FLOAT, INT64, graph, node, random, run, value, write

X, W, V = random(3, 20), random(20, 20, seed=1), random(20, 20, seed=2)


def fetch(path, names, feeds):
    """Exposes values by expose() and returns them, and checks that the model's own outputs did not change."""
    model = load(path)
    structure = serialize(model)
    copy, outputs = expose(model, names)
    assert serialize(model) == structure, "the model itself is untouched"
    own = [v.name for v in model.ir.graph.outputs]
    for before, after in zip(run(path, feeds), run(copy, feeds, own), strict=True):
        assert np.array_equal(before, after)
    return dict(zip(names, run(copy, feeds, [outputs[name] for name in names]), strict=True))


def test_values_of_the_main_graph(tmp_path):
    main = graph(
        [node("MatMul", ["x", "W"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "V"], ["y"])],
        [value("x", ("m", 20))],
        [value("y", ("m", 20))],
        {"W": W, "V": V},
    )
    got = fetch(write(tmp_path / "m.onnx", main), ["x", "h", "r", "y", "h"], {"x": X})
    assert np.array_equal(got["x"], X), "a graph input"
    assert np.array_equal(got["r"], np.maximum(got["h"], 0))
    np.testing.assert_allclose(got["y"], got["r"] @ V, rtol=1e-5)


def test_a_value_that_does_not_exist(tmp_path):
    main = graph([node("Relu", ["x"], ["y"])], [value("x", (3,))], [value("y", (3,))])
    with pytest.raises(ModelError, match="no value called 'z'"):
        expose(load(write(tmp_path / "m.onnx", main)), ["z"])


def branch(name, weight, inner):
    nodes = [node("Tanh", ["x"], [inner]), node("MatMul", [inner, weight], [f"{name}_out"])]
    return graph(nodes, [], [value(f"{name}_out", ("b", "m", 20))], name=name)


def test_both_branches_of_an_if(tmp_path):
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=branch("then", "W", "t"), else_branch=branch("other", "V", "e"))],
        [value("flag", (), BOOL), value("x", ("b", "m", 20))],
        [value("y", ("b", "m", 20))],
        {"W": W, "V": V},
    )
    path = write(tmp_path / "m.onnx", main)
    x = random(2, 3, 20)
    for flag in (True, False):
        got = fetch(path, ["t", "e"], {"flag": np.array(flag), "x": x})
        taken, other = ("t", "e") if flag else ("e", "t")
        np.testing.assert_allclose(got[taken], np.tanh(x).reshape(6, 20), rtol=1e-6)
        assert got[other].shape == (0, 20)


def loop(nodes, *, state=("h",), scans=(), weights=None, name="body"):
    """A Loop body over float states [m, 20], with an untyped set of nodes that makes `<state>_next` and the scans."""
    return graph(
        [node("Identity", [f"{name}_go"], [f"{name}_on"]), *nodes],
        [value(f"{name}_i", (), INT64), value(f"{name}_go", (), BOOL), *(value(s, (None, 20)) for s in state)],
        [value(f"{name}_on", (), BOOL), *(value(f"{s}_next") for s in state), *(value(s) for s in scans)],
        weights,
        name=name,
    )


def test_a_loop_body_with_outputs_behind_the_new_one(tmp_path):
    inner = loop(
        [node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "W"], ["h_next"]), node("Identity", ["t"], ["seen"])],
        scans=["seen"],
    )
    main = graph(
        [node("Loop", ["trips", "", "x"], ["y", "all"], body=inner), node("Identity", ["all"], ["copy"])],
        [value("trips", (), INT64), value("x", (3, 20))],
        [value("y", (3, 20)), value("all", ("t", 3, 20)), value("copy", ("t", 3, 20))],
        {"W": W},
    )
    path = write(tmp_path / "m.onnx", main)
    got = fetch(path, ["t", "all", "h", "copy"], {"trips": np.array(4), "x": X})
    assert got["t"].shape == (12, 20)
    assert np.array_equal(got["t"], got["all"].reshape(12, 20))
    assert np.array_equal(got["h"][:3], X)
    none = fetch(path, ["t"], {"trips": np.array(0), "x": X})
    assert none["t"].shape == (0, 20)


def test_loop_iterations_of_different_length(tmp_path):
    inner = loop([node("Concat", ["h", "h"], ["hh"], axis=0), node("MatMul", ["hh", "W"], ["h_next"])])
    main = graph(
        [node("Loop", ["trips", "", "x"], ["y"], body=inner)],
        [value("trips", (), INT64), value("x", ("m", 20))],
        [value("y", ("m", 20))],
        {"W": W * 0.1},
    )
    got = fetch(write(tmp_path / "m.onnx", main), ["hh"], {"trips": np.array(3), "x": X})
    assert got["hh"].shape == (6 + 12 + 24, 20)
    assert np.array_equal(got["hh"][:6], np.concatenate([X, X]))


def test_an_if_inside_a_loop_inside_an_if(tmp_path):
    choice = node(
        "If",
        ["even"],
        ["h_next"],
        then_branch=graph([node("MatMul", ["h", "W"], ["a"])], [], [value("a")], name="a"),
        else_branch=graph([node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "V"], ["b"])], [], [value("b")], name="b"),
    )
    parity = [node("Mod", ["body_i", "two"], ["rest"]), node("Cast", ["rest"], ["even"], to=BOOL)]
    inner = loop([*parity, choice])
    outer = graph([node("Loop", ["trips", "", "x"], ["z"], body=inner)], [], [value("z")], name="taken")
    other = graph([node("MatMul", ["x", "V"], ["z2"])], [], [value("z2")], name="other")
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=outer, else_branch=other)],
        [value("flag", (), BOOL), value("trips", (), INT64), value("x", (3, 20))],
        [value("y", ("m", 20))],
        {"W": W, "V": V, "two": np.array(2, np.int64)},
    )
    path = write(tmp_path / "m.onnx", main)
    feeds = {"trips": np.array(4), "x": X * np.float32(0.1)}
    got = fetch(path, ["h", "t", "x"], {"flag": np.array(True), **feeds})
    assert got["h"].shape == (12, 20)
    assert got["t"].shape == (6, 20), "two of four iterations take that branch"
    np.testing.assert_allclose(got["t"][:3], np.tanh(got["h"][:3]), rtol=1e-6)
    got = fetch(path, ["h", "t"], {"flag": np.array(False), **feeds})
    assert got["h"].shape == got["t"].shape == (0, 20)


def test_a_scan_body(tmp_path):
    inner = graph(
        [node("Add", ["s", "step"], ["h"]), node("MatMul", ["h", "W"], ["s_next"]), node("Identity", ["h"], ["each"])],
        [value("s", (3, 20)), value("step", (3, 20))],
        [value("s_next", (3, 20)), value("each", (3, 20))],
    )
    main = graph(
        [node("Scan", ["x", "steps"], ["y", "all"], body=inner, num_scan_inputs=1, scan_output_axes=[1])],
        [value("x", (3, 20)), value("steps", ("t", 3, 20))],
        [value("y", (3, 20)), value("all", (3, "t", 20))],
        {"W": W * 0.1},
    )
    steps = random(5, 3, 20)
    got = fetch(write(tmp_path / "m.onnx", main), ["h", "all"], {"x": X, "steps": steps})
    assert got["h"].shape == (5, 3, 20)
    assert np.array_equal(got["h"], got["all"].swapaxes(0, 1))


def test_an_operator_that_lets_nothing_out(tmp_path):
    inner = graph([node("MatMul", ["e", "W"], ["o"])], [value("e", (3, 20))], [value("o", (3, 20))])
    main = graph(
        [
            node("SequenceConstruct", ["x", "x"], ["s"]),
            node("SequenceMap", ["s"], ["t"], body=inner),
            node("ConcatFromSequence", ["t"], ["y"], axis=0),
        ],
        [value("x", (3, 20))],
        [value("y", (6, 20))],
        {"W": W},
    )
    with pytest.raises(ModelError, match="SequenceMap"):
        expose(load(write(tmp_path / "m.onnx", main)), ["e"])


def test_a_value_of_unknown_width(tmp_path):
    taken = graph([node("Tanh", ["x"], ["t"]), node("Relu", ["t"], ["u"])], [], [value("u")], name="taken")
    other = graph([node("Relu", ["x"], ["v"])], [], [value("v")], name="other")
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=taken, else_branch=other)],
        [value("flag", (), BOOL), value("x", None, FLOAT)],
        [value("y")],
    )
    with pytest.raises(ModelError, match="width of value 't'"):
        expose(load(write(tmp_path / "m.onnx", main)), ["t"])
