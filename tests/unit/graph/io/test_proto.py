"""From protobuf to the graph and back: the same as with copies, and nothing left changed."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnx_woq.graph.edit import add_initializer, lift_constants
from onnx_woq.graph.io.model import load, memory_tensors, serialize, structure
from onnx_woq.graph.io.proto import copy_structure, from_proto, to_proto
from tests.zoo.nodes import BOOL, graph, lower, node, random, run, value, write

W = random(40, 40)


def rich(tmp_path):
    """A model with everything that must survive: bodies, a function, properties, annotations, an overridable weight."""
    relu = node("Relu", ["a"], ["b"])
    function = onnx.helper.make_function("local", "f", ["a"], ["b"], [relu], [onnx.helper.make_opsetid("", 21)])
    branches = {
        f"{name}_branch": graph(
            [node("MatMul", ["h", "w"], [f"{name}_y"])],
            [],
            [value(f"{name}_y")],
            {"w": random(40, 40, seed=i)},
            name=name,
        )
        for i, name in enumerate(("then", "else"))
    }
    nodes = [
        node("MatMul", ["x", "W"], ["a"], name="first"),
        node("Add", ["a", "small"], ["b"]),
        node("f", ["b"], ["h"], domain="local"),
        node("If", ["flag"], ["y"], **branches),
    ]
    inputs = [value("x", ("m", 40)), value("flag", (), BOOL), value("V", (40, 40))]
    weights = {"W": W, "V": W, "small": random(40)}
    main = graph(nodes, inputs, [value("y")], weights, [value("a", ("m", 40)), value("W", (40, 40))], name="main")
    main.doc_string = "what it is for"
    path = write(tmp_path / "m.onnx", main, functions=[function], domains={"local": 1})
    proto = onnx.load(path)
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "p", "1", "d", 7
    proto.doc_string = "model"
    proto.metadata_props.add(key="author", value="me")
    proto.graph.metadata_props.add(key="part", value="main")
    proto.graph.node[0].metadata_props.add(key="layer", value="0")
    note = proto.graph.quantization_annotation.add(tensor_name="W")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="small")
    onnx.save(proto, path)
    return load(path)


def place(name, tensor):
    return ir.ExternalTensor(
        "elsewhere", 64, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
    )


@pytest.mark.parametrize("names", [(), ("W",), ("W", "V", "small")])
def test_exchanged_tensors_give_what_a_changed_copy_gives(tmp_path, names):
    model = rich(tmp_path).ir
    before = ir.to_proto(model)
    values = dict(model.graph.initializers)
    tensors = {name: place(name, values[name].const_value) for name in names}
    found = to_proto(model, tensors)
    other = model.clone()
    for name in names:
        other.graph.initializers[name].const_value = tensors[name]
    assert found == ir.to_proto(other)
    assert ir.to_proto(model) == before, "the model is as it was"
    assert all(model.graph.initializers[name] is value for name, value in values.items())
    assert all(value.graph is model.graph for value in values.values())
    assert {
        i.name for i in found.graph.initializer if i.external_data and i.external_data[0].value == "elsewhere"
    } == set(names)


def test_metadata_and_version_are_those_of_the_result_only(tmp_path):
    model = rich(tmp_path).ir
    version = model.ir_version
    proto = to_proto(model, metadata={"recipe": "r", "author": "you"}, ir_version=version + 1)
    assert {p.key: p.value for p in proto.metadata_props} == {"author": "you", "recipe": "r"}
    assert len(proto.metadata_props) == 2
    assert proto.ir_version == version + 1
    assert (model.ir_version, model.metadata_props) == (version, {"author": "me"})


def test_the_collector_is_as_it_was(tmp_path):
    model = rich(tmp_path).ir
    assert gc.isenabled()
    copy_structure(model)
    to_proto(model)
    proto = onnx.ModelProto(ir_version=10)
    proto.graph.node.add(op_type="MatMul", output=["y"])
    proto.graph.node.add(op_type="MatMul", output=["y"])
    with pytest.raises(Exception, match="Error calling _deserialize_graph"):
        from_proto(proto)
    assert gc.isenabled()
    gc.disable()
    try:
        to_proto(model)
        assert not gc.isenabled()
    finally:
        gc.enable()


def constants():
    """Constant nodes of every kind, in the main graph and in a body."""

    def tensor(elements):
        return onnx.numpy_helper.from_array(np.arange(elements, dtype=np.float32))

    def kinds(prefix):
        return [
            node("Constant", [], [f"{prefix}big"], value=tensor(64)),
            node("Constant", [], [f"{prefix}small"], value=tensor(63)),
            node("Constant", [], [f"{prefix}ints"], value_ints=list(range(100))),
            node("Constant", [], [f"{prefix}out"], value=tensor(64)),
            node("Constant", [], [f"{prefix}foreign"], value=tensor(64), domain="other"),
            node("Neg", [f"{prefix}big"], [f"{prefix}n"]),
        ]

    outputs = {prefix: [value(f"{prefix}out", (64,)), value(f"{prefix}n", (64,))] for prefix in ("t", "e", "")}
    bodies = {f"{name}_branch": graph(kinds(name[0]), [], outputs[name[0]], name=name) for name in ("then", "else")}
    nodes = [*kinds(""), node("If", ["flag"], ["o", "p"], **bodies)]
    main = graph(nodes, [value("flag", (), BOOL)], [*outputs[""], value("o", (64,)), value("p", (64,))])
    return onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def test_constants_are_lifted_as_the_pass_of_onnx_ir_lifts_them():
    ours, theirs = ir.from_proto(constants()), ir.from_proto(constants())
    lift_constants(list(ours.graphs()), 64)
    LiftConstantsToInitializersPass(size_limit=64)(theirs)
    assert ir.to_proto(ours) == ir.to_proto(theirs)
    assert list(ours.graph.initializers) == ["big"]


def test_large_tensors_made_in_a_body_reach_the_session(tmp_path):
    """A structure says where each lies, and every one of them is an initializer of the main graph."""
    bodies = {
        f"{name}_branch": graph([node("MatMul", ["x", "W"], [f"{name}_y"])], [], [value(f"{name}_y")], name=name)
        for name in ("then", "else")
    }
    inputs = [value("x", (3, 40)), value("flag", (), BOOL)]
    main = graph([node("If", ["flag"], ["y"], **bodies)], inputs, [value("y", (3, 40))], {"W": W})
    model = load(write(tmp_path / "m.onnx", main))
    body = next(model.ir.graph.subgraphs())
    product = body[0]
    product.replace_input_with(1, add_initializer(body, "other", 2 * W))
    assert list(memory_tensors(model)) == ["other"]
    assert set(memory_tensors(model)) <= set(model.ir.graph.initializers)
    assert serialize(model) == structure(model).SerializeToString()
    x = random(3, 40)
    found = [run(model, {"x": x, "flag": np.array(flag)})[0] for flag in (True, False)]
    assert sorted(round(float(np.abs(y / (x @ W)).mean()), 3) for y in found) == [1.0, 2.0]


def test_a_lowered_model_is_the_same_through_a_copy(tmp_path):
    model = rich(tmp_path)
    lower(model)
    assert structure(model) == structure(replace(model, ir=copy_structure(model.ir)))
