"""Loading: what is accepted, what is said about the rest, and what the model looks like afterwards."""

from __future__ import annotations

import logging

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.errors import ModelError
from onnx_woq.graph.edit import fresh_name
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.find.quantized import low_bit_nodes
from onnx_woq.graph.io.model import Model, clone, file_bytes, load, memory_tensors, serialize
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import BFLOAT16, BOOL, FLOAT, INT64, graph, linear, lower, node, random, run, value, write

W = random(40, 9)


def refusal(path) -> str:
    with pytest.raises(ModelError) as error:
        load(path)
    return str(error.value)


def test_a_path_that_is_no_model_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.onnx")
    (tmp_path / "broken.onnx").symlink_to("gone")
    assert "broken link" in refusal(tmp_path / "broken.onnx")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no .onnx file in it" in refusal(folder)
    linear(folder / "m.onnx", W)
    assert "name the .onnx file in it: m.onnx" in refusal(folder)
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    assert "check the path" in refusal(tmp_path / "loop.onnx")


def test_a_named_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refusal(tmp_path / "pipe.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an ONNX model, or is truncated"),
        (b"hello, this is text and not a protobuf\n" * 50, "not an ONNX model, or is truncated"),
        (b"PK\x03\x04" + bytes(200), "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"\x10\0\0\0ORTM" + bytes(100), "ORT-format"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, content, message):
    (tmp_path / "m.onnx").write_bytes(content)
    assert message in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, share):
    path = linear(tmp_path / "m.onnx", W)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(("opset", "message"), [(12, "older than 13"), (26, "newer than 25")])
def test_an_opset_out_of_range(tmp_path, opset, message):
    path = linear(tmp_path / "m.onnx", W)
    proto = onnx.load(path)
    proto.opset_import[0].version = opset
    onnx.save(proto, path)
    assert message in refusal(path)
    del proto.opset_import[:]
    proto.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(proto, path)
    assert "does not say which version" in refusal(path)


def test_an_invalid_graph(tmp_path):
    nodes = [node("MatMul", ["x", "W"], ["y"]), node("MatMul", ["x", "W"], ["y"])]
    path = tmp_path / "m.onnx"
    main = graph(nodes, [value("x", (3, 40))], [value("y")], {"W": W})
    path.write_bytes(onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)]).SerializeToString())
    assert "not a valid ONNX model: Output 'y' is redeclared" in refusal(path)


def test_sparse_initializers(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    proto = onnx.load(path)
    values = onnx.helper.make_tensor("S", FLOAT, (1,), [1.0])
    indices = onnx.helper.make_tensor("S_i", INT64, (1,), [3])
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [10]))
    onnx.save(proto, path)
    assert "dense" in refusal(path)


def test_an_embedded_tensor_without_its_data(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    proto = onnx.load(path)
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].dims[0] = 1 << 40
    onnx.save(proto, path)
    assert "has no data" in refusal(path)


def test_an_embedded_tensor_of_the_wrong_size(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    proto = onnx.load(path)
    proto.graph.initializer[0].dims[0] = 41
    onnx.save(proto, path)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("MatMul", ["x"], ["y"])], "input size"),
        ([node("Gemm", ["x", "W"], ["y"], transB=1.0)], "transB"),
        ([node("Cast", ["W"], ["w"]), node("MatMul", ["x", "w"], ["y"])], "Required attribute 'to'"),
        ([node("If", ["f"], ["y"], then_branch=graph([node("MatMul", ["x"], ["z"])], [], [value("z")]))], "input size"),
    ],
)
def test_malformed_nodes(tmp_path, nodes, message):
    inputs = [value("x", (3, 40)), value("f", (), BOOL)]
    assert message in refusal(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y")], {"W": W})))


def test_a_transpose_that_is_no_permutation(tmp_path):
    nodes = [node("Transpose", ["W"], ["w"], perm=[0, 5]), node("MatMul", ["x", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x", (3, 40))], [value("y")], {"W": W}))
    _, (skipped,) = find_linear_groups(load(path), Recipe())
    assert skipped.reason.startswith("the weight is made of constants by Transpose")


@pytest.mark.parametrize("external", [False, True])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, external):
    """Whatever a few changed bytes do, no other exception comes out."""
    data = linear(tmp_path / "m.onnx", random(20, 9), external=external, name="a").read_bytes()
    random_bytes = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.onnx", 0
    for _ in range(300):
        changed = bytearray(data)
        for place in random_bytes.integers(0, len(data), 2):
            changed[place] = random_bytes.integers(256)
        damaged.write_bytes(changed)
        try:
            for group in find_linear_groups(load(damaged), Recipe())[0]:
                group.weight()
        except ModelError:
            refused += 1
    assert refused > 20


def weights(model):
    return [v.const_value for v in model.ir.graph.initializers.values()]


@pytest.mark.parametrize("external", [False, True])
def test_weights_stay_on_disk(tmp_path, external):
    path = linear(tmp_path / "m.onnx", random(300, 300), external=external)
    model = load(path)
    assert all(isinstance(w, ir.ExternalTensor) for w in weights(model))
    assert model.path == path
    assert file_bytes(model) == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert len(serialize(model)) < 1000
    assert memory_tensors(model) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("raw", [False, True])
def test_float_types_however_stored(tmp_path, dtype, raw):
    weight = W.astype(dtype)
    kind = {np.float32: FLOAT, np.float16: onnx.TensorProto.FLOAT16}.get(dtype, BFLOAT16)
    data = weight.tobytes() if raw else weight.astype(np.float32)
    tensor = onnx.helper.make_tensor("W", kind, W.shape, data, raw=raw)
    inputs, outputs = [value("x", (3, 40), kind)], [value("y", (3, 9), kind)]
    main = graph([node("MatMul", ["x", "W"], ["y"])], inputs, outputs, {"W": tensor})
    (group,), _ = find_linear_groups(load(write(tmp_path / "m.onnx", main)), Recipe())
    assert group.weight().dtype == np.float32
    np.testing.assert_array_equal(group.weight(), weight.astype(np.float32))
    assert group.kernel_dtype is (np.float16 if dtype is np.float16 else np.float32)


def named_branches(tmp_path):
    """Both branches, and the main graph after them, use the same value names."""

    def branch(name):
        nodes = [node("MatMul", ["x", "w"], ["h"], name="n"), node("Relu", ["h"], [f"{name}_y"])]
        return graph(nodes, [], [value(f"{name}_y")], {"w": random(40, 40, seed=len(name))}, name=name)

    main = graph(
        [
            node("If", ["flag"], ["z"], then_branch=branch("one"), else_branch=branch("other")),
            node("MatMul", ["z", "W"], ["h"], name="n"),
            node("Identity", ["h"], ["y"]),
        ],
        [value("flag", (), BOOL), value("x", (3, 40))],
        [value("y", (3, 9))],
        {"W": W},
    )
    proto = onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_value_names_become_unique_and_the_main_graph_keeps_its_own(tmp_path):
    model = load(named_branches(tmp_path))
    names = [v.name for n in model.ir.graph.all_nodes() for v in n.outputs]
    assert len(names) == len(set(names))
    assert [v.name for v in model.ir.graph.outputs] == ["y"]
    assert [n.outputs[0].name for n in model.ir.graph] == ["z", "h", "y"]
    groups, _ = find_linear_groups(model, Recipe())
    assert [group.name for group in groups] == ["h_2", "h"]
    assert [s.name for s in groups[0].linears] == ["h_2", "h_3"]
    assert fresh_name(model.ir.graph, "h") == "h_4"
    assert fresh_name(clone(model).ir.graph, "h") == "h_5"


def test_names_of_a_model_made_by_hand():
    x = ir.Value(name="x")
    main = ir.Graph([x], [], nodes=[ir.node("Relu", [x], outputs=[ir.Value(name="y")])], opset_imports={"": 21})
    assert [fresh_name(main, n) for n in ("x", "y", "z")] == ["x_2", "y_2", "z"]


def test_nodes_in_any_order(tmp_path):
    main = graph(
        [node("MatMul", ["h", "W"], ["y"]), node("Relu", ["x"], ["h"])], [value("x", (3, 40))], [value("y")], {"W": W}
    )
    proto = onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    model = load(path)
    assert [n.op_type for n in model.ir.graph] == ["Relu", "MatMul"]
    assert clone(model).ir.graph.num_nodes() == 2


def test_functions_that_cannot_be_inlined_stay_with_a_warning(tmp_path, caplog):
    imports = [onnx.helper.make_opsetid("", 18)]
    inside, call = node("MatMul", ["a", "w"], ["b"]), node("proj", ["x", "W"], ["y"], domain="local")
    function = onnx.helper.make_function("local", "proj", ["a", "w"], ["b"], [inside], imports)
    main = graph([call], [value("x", (3, 40))], [value("y", (3, 9))], {"W": W})
    path = write(tmp_path / "m.onnx", main, functions=[function], domains={"local": 1})
    with caplog.at_level(logging.WARNING):
        model = load(path)
    assert "cannot be inlined" in caplog.text
    groups, (skipped,) = find_linear_groups(model, Recipe())
    assert groups == []
    assert "inside the function proj" in skipped.reason


def test_a_clone_shares_tensors_and_nothing_else(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    copy = clone(model)
    lower(copy)
    assert [n.op_type for n in model.ir.graph] == ["MatMul"]
    assert weights(model)[0].numpy() is not None
    assert weights(clone(model))[0] is weights(model)[0]


def test_a_lowered_model_runs_from_memory(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(300, 200)))
    _, (q,), _ = lower(model)
    assert len(serialize(model)) < 2000
    assert sum(a.nbytes for a in memory_tensors(model).values()) > 300 * 200 / 2
    x = random(3, 300)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ q.dequantize(), rtol=1e-3, atol=1e-4)


def test_tensors_in_memory_are_one_array_each_that_a_session_may_point_at(tmp_path):
    tensor = onnx.helper.make_tensor("W", FLOAT, W.shape, W)  # a list of floats, which no file offset can stand for
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", (3, 40))], [value("y", (3, 9))], {"W": tensor})
    model = load(write(tmp_path / "m.onnx", main))
    assert memory_tensors(model)["W"] is memory_tensors(clone(model))["W"]
    x = random(3, 40)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ W, rtol=1e-4)


def test_low_bit_nodes(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    model = load(path)
    assert low_bit_nodes(model) == 0
    lower(model)
    assert low_bit_nodes(model) == 1
    packed = onnx.helper.make_tensor("Q", onnx.TensorProto.UINT4, (40, 9), np.ones(360, np.uint8))
    eight = onnx.numpy_helper.from_array(np.ones((40, 9), np.uint8), "E")
    main = graph(
        [
            node("DequantizeLinear", ["Q", "s"], ["w4"]),
            node("DequantizeLinear", ["E", "s"], ["w8"]),
            node("MatMul", ["x", "w4"], ["a"]),
            node("MatMul", ["x", "w8"], ["b"]),
            node("Add", ["a", "b"], ["y"]),
        ],
        [value("x", (3, 40))],
        [value("y", (3, 9))],
        {"Q": packed, "E": eight, "s": np.float32([0.1])[0]},
    )
    model = load(write(tmp_path / "q.onnx", main))
    assert low_bit_nodes(model) == 2, "the weight of 4 bits and that of 8"
    _, skipped = find_linear_groups(model, Recipe())
    assert {s.reason for s in skipped} == {"the weight is quantized already (DequantizeLinear)"}


def test_a_model_object_is_small(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    assert isinstance(model, Model)
    assert model.files == (tmp_path / "m.onnx",)
