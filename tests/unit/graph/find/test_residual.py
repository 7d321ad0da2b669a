"""The residual stream: everything that a rotation has to change is found, and what stands in its way is named."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.find.residual import find_residual_streams, has_layer_norm, linear_weight, output_axis
from onnx_woq.graph.io.model import load
from tests.zoo import architectures as arch
from tests.zoo.nodes import FLOAT, graph, node, random, value, write

D = 16
NORM = [
    node("Mul", ["h", "h"], ["square"], name="square"),
    node("ReduceMean", ["square", "axes"], ["mean"]),
    node("Sqrt", ["mean"], ["root"]),
    node("Div", ["h", "root"], ["unit"]),
    node("Mul", ["unit", "gamma"], ["normed"]),
    node("MatMul", ["normed", "R"], ["y"], name="read"),
]
WEIGHTS = {
    "W": random(24, D), "R": random(D, 8, seed=1), "gamma": random(D, seed=2), "bias": random(D, seed=3),
    "axes": np.array([-1], np.int64), "G": random(D, 24, seed=4), "half": np.float32(0.5),
}  # fmt: skip


def streams(tmp_path, nodes, outputs=("y",), inputs=None):
    used = {name for n in nodes for name in n.input}
    weights = {name: array for name, array in WEIGHTS.items() if name in used}
    inputs = inputs or [value("x", ("m", 24))]
    main = graph(nodes, inputs, [value(name) for name in outputs], weights)
    return find_residual_streams(load(write(tmp_path / "m.onnx", main)))


def names(nodes):
    return sorted(n.name for n in nodes)


@pytest.mark.parametrize("build", [arch.decoder, arch.fused_decoder], ids=["written out", "as operators"])
def test_a_decoder_is_one_stream(build, tmp_path):
    (stream,) = find_residual_streams(load(build(tmp_path / "m.onnx", layers=3)))
    assert stream.problems == []
    assert stream.width == arch.D
    assert len(stream.norms) == 2 * 3 + 1
    assert names(stream.writes) == sorted(f"node/layer{i}.{kind}" for i in range(3) for kind in ("o", "down"))
    reads = [f"node/layer{i}.{kind}" for i in range(3) for kind in ("q", "k", "v", "gate", "up")]
    assert names(stream.reads) == sorted([*reads, "node/logits"])
    assert len(stream.tables) == 1
    assert all(gamma.shape == (arch.D,) for gamma in stream.reads.values())


def test_vectors_that_are_added_are_rotated_too(tmp_path):
    before = [
        node("MatMul", ["x", "W"], ["p"], name="write"), node("Add", ["p", "bias"], ["q"]),
        node("Gemm", ["x", "G", "bias"], ["g"], transB=1, name="gemm"), node("Add", ["q", "g"], ["h"]),
    ]  # fmt: skip
    (stream,) = streams(tmp_path, [*before, *NORM])
    assert (stream.problems, names(stream.writes), names(stream.reads)) == ([], ["gemm", "write"], ["read"])
    assert sorted(n.op_type for n, _ in stream.vectors) == ["Add", "Gemm"]
    assert {v.name for v in stream.normed} == {"normed"}
    assert {v.name for v in stream.values} == {"h", "q", "p", "g", "unit"}


@pytest.mark.parametrize(
    ("more", "outputs", "problem"),
    [
        ([node("Relu", ["h"], ["r"], name="relu")], ["y", "r"], "Relu 'relu' reads it"),
        ([node("Tanh", ["normed"], ["t"], name="tanh")], ["y", "t"], "Tanh 'tanh' reads the output of a norm"),
        ([], ["y", "h"], "'h' is an output of the graph"),
        ([], ["y", "normed"], "'normed' is an output of the graph"),
    ],
)
def test_what_stands_in_the_way_is_named(more, outputs, problem, tmp_path):
    (stream,) = streams(tmp_path, [node("MatMul", ["x", "W"], ["h"]), *NORM, *more], outputs)
    assert stream.problems == [problem]


def test_what_writes_by_no_known_rule_is_named(tmp_path):
    (stream,) = streams(tmp_path, [node("MatMul", ["x", "W"], ["p"]), node("Exp", ["p"], ["h"], name="exp"), *NORM])
    assert stream.problems == ["Exp 'exp' writes to it"]
    centred = [
        node("MatMul", ["x", "W"], ["p"]), node("ReduceMean", ["p", "axes"], ["m"]), node("Sub", ["p", "m"], ["h"])
    ]  # fmt: skip
    (stream,) = streams(tmp_path, [*centred, *NORM])
    assert "LayerNorm" in stream.problems[0]


def test_an_input_of_the_model_may_be_the_stream(tmp_path):
    nodes = [node("Mul", ["x", "half"], ["h"]), *NORM]
    (stream,) = streams(tmp_path, nodes, inputs=[value("x", ("m", D))])
    assert ([v.name for v in stream.entrances], stream.problems) == (["x"], [])


def test_without_rms_norm_there_is_none(tmp_path):
    assert streams(tmp_path, [node("MatMul", ["x", "W"], ["y"])]) == []
    norm = node("LayerNormalization", ["x", "gamma"], ["y"])
    main = graph([norm], [value("x", ("m", D))], [value("y")], {"gamma": WEIGHTS["gamma"]})
    fused = load(write(tmp_path / "n.onnx", main))
    assert (find_residual_streams(fused), has_layer_norm(fused)) == ([], True)
    assert not has_layer_norm(load(arch.decoder(tmp_path / "d.onnx")))


@pytest.mark.parametrize(
    ("made", "weight", "shape", "axis"),
    [
        (node("MatMul", ["x", "A"], ["y"]), random(D, 3), (D, 3), 1),
        (node("MatMul", ["x", "A"], ["y"]), random(1, D, 3), (1, D, 3), 1),
        (node("MatMul", ["x", "A"], ["y"]), random(2, D, 3), None, 1),
        (node("MatMul", ["x", "A"], ["y"]), random(D), None, 1),
        (node("Gemm", ["x", "A"], ["y"]), random(D, 3), (D, 3), 1),
        (node("Gemm", ["x", "A"], ["y"], transB=1), random(3, D), (3, D), 0),
        (node("Gemm", ["x", "A"], ["y"], transA=1), random(D, 3), (D, 3), 1),  # behind a Transpose of its own
        (node("Add", ["x", "A"], ["y"]), random(D, D), None, 1),
    ],
)
def test_the_weight_of_a_linear_and_where_its_outputs_lie(made, weight, shape, axis, tmp_path):
    main = graph([made], [value("x", None, FLOAT)], [value("y")], {"A": weight})
    *_, last = load(write(tmp_path / "m.onnx", main)).ir.graph
    found = linear_weight(last)
    assert (found and found.shape, output_axis(last)) == (shape, axis)


def test_a_weight_that_a_caller_may_replace_is_none(tmp_path):
    main = graph([node("MatMul", ["x", "A"], ["y"])], [value("x", ("m", D)), value("A", (D, D))], [value("y")],
                 {"A": random(D, D)})  # fmt: skip
    (only,) = load(write(tmp_path / "m.onnx", main)).ir.graph
    assert linear_weight(only) is None
