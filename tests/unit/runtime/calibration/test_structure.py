"""The structure of a graph, and digests that are equal where the same is computed of the same."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.io.model import clone, load
from onnx_woq.runtime.calibration.structure import Structure, contents
from tests.zoo.chains import WEIGHTS, K, chain
from tests.zoo.nodes import BOOL, graph, node, random, value, write


@pytest.fixture
def model(tmp_path):
    return load(chain(tmp_path / "m.onnx"))


@pytest.fixture
def branched(tmp_path):
    """h = x·A; y = If(flag: h·B, else tanh(h))."""
    bodies = [
        graph([node("MatMul", ["h", "B"], ["p"])], [], [value("p")]),
        graph([node("Tanh", ["h"], ["t"])], [], [value("t")]),
    ]
    nodes = [
        node("MatMul", ["x", "A"], ["h"]),
        node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    weights = {"A": random(K, K), "B": random(K, K, seed=1)}
    inputs = [value("x", ("t", K)), value("flag", [], BOOL)]
    return load(write(tmp_path / "b.onnx", graph(nodes, inputs, [value("y")], weights)))


@pytest.mark.parametrize(
    ("values", "others", "depends"),
    [
        (["tc"], ["a"], True),
        (["a"], ["tc"], False),
        (["r", "n1"], ["b"], True),
        (["n1"], ["b"], False),
        ([], ["a"], False),
    ],
)
def test_what_is_computed_from_what(values, others, depends, model):
    assert Structure(model).depends(values, others) == depends


def test_a_value_in_a_body_stands_for_the_node_that_has_the_body(branched):
    structure = Structure(branched)
    assert structure.depends(["p"], ["h"])
    assert structure.weights(["x"], ["t"]) == 2 * 4 * K * K, "both branches may run"
    assert sorted(structure.named) == ["flag", "h", "x", "y"]


def test_what_crosses_is_what_was_costly_and_is_still_read(model):
    structure = Structure(model)
    assert set(structure.crossing(["n2"], ["tc", "s"])) == {"n2", "r"}
    assert structure.crossing(["n1"], ["ta"]) == [], "cheap to compute again"
    assert structure.crossing(["n1"], ["ta"], side=["n1"]) == ["n1"]
    assert set(structure.crossing(["n2"], ["s"], more=["a", "n1"])) == {"n2", "r", "a"}
    assert structure.crossing(["n2"], []) == []


def test_weights_on_the_way_stop_at_what_is_known(model):
    structure = Structure(model)
    sizes = {name: w.nbytes for name, w in WEIGHTS.items()}
    assert structure.weights(["x"], ["y"]) == sum(sizes.values())
    assert structure.weights(["x", "r"], ["y"]) == sizes["C"] + sizes["D"] + sizes["E"]
    assert structure.weights(["x", "y"], ["y"]) == 0


def test_the_part_between_reads_what_is_there_and_shares_nothing(model):
    structure = Structure(model)
    part = structure.between(["x", "r"], ["tc"])
    assert [v.name for v in part.inputs] == ["r"]
    assert [n.op_type for n in part] == ["Mul", "MatMul", "Tanh"]
    assert set(part.initializers) == {"g2", "C"}
    part.node(0).outputs[0].name = "other"
    assert "n2" in Structure(model).named


def test_an_output_that_is_fed_and_computed_again_gets_another_name(tmp_path):
    nodes = [node("Split", ["x"], ["left", "right"], axis=-1, num_outputs=2), node("Add", ["left", "right"], ["y"])]
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("t", 8))], [value("y")])))
    assert len({contents(model)[name] for name in ("x", "left", "right", "y")}) == 4
    part = Structure(model).between(["x", "left"], ["y"])
    assert {v.name for v in part.inputs} == {"x", "left"}
    assert [v.name for v in part.node(0).outputs] == ["left/again", "right"]


def test_digests_tell_what_an_edit_reaches(model):
    before, other = contents(model), clone(model)
    assert contents(other) == before
    for n in other.ir.graph:
        if n.op_type == "Tanh" and n.outputs[0].name == "tc":
            n.op_type = "Sigmoid"
    after = contents(other)
    assert {name for name in before if before[name] != after[name]} == {"tc", "d", "s", "y"}


def test_digests_see_attributes_and_bodies(branched, tmp_path):
    before = contents(branched)
    assert before["h"] != before["p"]
    body = next(n for n in branched.ir.graph if n.op_type == "If").attributes["else_branch"].as_graph()
    body.node(0).op_type = "Relu"
    after = contents(branched)
    assert {name for name in before if before[name] != after[name]} == {"t", "y"}
    digests = []
    for axis in (0, 1):
        main = graph([node("Softmax", ["x"], ["y"], axis=axis)], [value("x", (2, 3))], [value("y")])
        digests.append(contents(load(write(tmp_path / f"{axis}.onnx", main)))["y"])
    assert digests[0] != digests[1]


def test_constants_go_by_their_names_and_inputs_too(tmp_path):
    def digest(name, weight):
        main = graph([node("MatMul", ["x", name], ["y"])], [value("x", ("t", K))], [value("y")], {name: weight})
        return contents(load(write(tmp_path / "m.onnx", main)))["y"]

    assert digest("W", random(K, K)) == digest("W", np.zeros((K, K), np.float32))
    assert digest("W", random(K, K)) != digest("V", random(K, K))
