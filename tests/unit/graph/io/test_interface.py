"""Interfaces of bodies: renamed in memory, in the file as they were, also after edits that take over an output."""

from __future__ import annotations

import onnx

from onnx_woq.graph.edit import insert_after
from onnx_woq.graph.io.model import clone, load, structure
from tests.zoo import generation
from tests.zoo.nodes import BOOL, graph, node, random, value, write


def body_of(proto: onnx.ModelProto) -> onnx.GraphProto:
    return next(a.g for n in proto.graph.node for a in n.attribute if a.HasField("g"))


def interface(body: onnx.GraphProto) -> list[list[str]]:
    return [[v.name for v in side] for side in (body.input, body.output)]


def test_a_foreign_body_keeps_its_names_in_files_and_every_value_has_its_own_in_memory(tmp_path):
    path = generation.greedy_search(tmp_path / "m.onnx")
    model = load(path)
    names = [v.name for g in model.ir.graphs() for v in (*g.inputs, *(o for n in g for o in n.outputs))]
    assert len(set(names)) == len(names)
    for copy in (model, clone(model)):
        assert interface(body_of(structure(copy))) == interface(body_of(onnx.load(path)))
    assert [v.name for g in model.ir.graphs() for v in (*g.inputs, *(o for n in g for o in n.outputs))] == names


def test_an_output_that_a_new_node_takes_over_keeps_its_name_in_the_file(tmp_path):
    path = generation.greedy_search(tmp_path / "m.onnx")
    model = load(path)
    head = next(n for n in model.ir.graph.all_nodes() if n.name == "head")
    insert_after(head, "Relu", [], "inner")
    body = body_of(structure(model))
    assert interface(body) == interface(body_of(onnx.load(path)))
    made = {name: n.op_type for n in body.node for name in n.output}
    assert made["logits"] == "Relu"


def test_the_names_in_a_body_of_onnx_itself_mean_nothing(tmp_path):
    """The branches of an If may have equal names, of which one is new in memory and in the file."""

    def branch(name):
        return graph([node("MatMul", ["x", "W"], ["y"])], [], [value("y")], name=name)

    nodes = [node("If", ["c"], ["z"], then_branch=branch("a"), else_branch=branch("b"))]
    main = graph(nodes, [value("x", ("m", 40)), value("c", (), BOOL)], [value("z")], {"W": random(40, 8)})
    proto = structure(load(write(tmp_path / "m.onnx", main)))
    assert {v.name for a in proto.graph.node[0].attribute for v in a.g.output} == {"y", "y_2"}
