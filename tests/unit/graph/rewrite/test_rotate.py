"""Rotation: other weights by the formula, the same outputs, and nothing changed where it is refused."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.core.rotation import rotation
from onnx_woq.errors import RotationError
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.io.model import load, serialize
from onnx_woq.graph.rewrite.rotate import SEED, rotate
from tests.zoo import architectures as arch
from tests.zoo.nodes import graph, node, random, run, value, write

D = 32
WEIGHTS = {
    "W": random(24, D), "b": random(D, seed=3), "G": random(D, 24, seed=4), "R": random(D, 8, seed=1),
    "T": random(6, D, seed=5), "gamma": 1 + random(D, seed=2) / 4, "axes": np.array([-1], np.int64),
}  # fmt: skip


def chain(tmp_path, *more, outputs=("y",)):
    """h = x·W + b + gemm(x, G, b); y = norm(h)·R."""
    nodes = [
        node("MatMul", ["x", "W"], ["p"], name="write"), node("Add", ["p", "b"], ["q"]),
        node("Gemm", ["x", "G", "b"], ["g"], transB=1, name="gemm"), node("Add", ["q", "g"], ["h"]),
        node("Pow", ["h", "two"], ["square"]), node("ReduceMean", ["square", "axes"], ["mean"]),
        node("Sqrt", ["mean"], ["root"]), node("Div", ["h", "root"], ["unit"]),
        node("Mul", ["unit", "gamma"], ["normed"]), node("MatMul", ["normed", "R"], ["y"], name="read"), *more,
    ]  # fmt: skip
    weights = {name: array for name, array in WEIGHTS.items() if name != "T"} | {"two": np.float32(2)}
    main = graph(nodes, [value("x", ("m", 24))], [value(name) for name in outputs], weights)
    return load(write(tmp_path / "m.onnx", main))


def layer_norm(tmp_path):
    """One LayerNorm as an operator."""
    main = graph([node("LayerNormalization", ["x", "gamma"], ["y"])], [value("x", ("m", D))], [value("y")],
                 {"gamma": WEIGHTS["gamma"]})  # fmt: skip
    return load(write(tmp_path / "m.onnx", main))


def weight(model, name, index=1):
    return resolve(next(n for n in model.ir.graph if n.name == name).inputs[index]).array()


def test_weights_are_those_of_the_formula(tmp_path):
    model, x = chain(tmp_path), random(5, 24, seed=9)
    before = run(model, {"x": x})[0]
    rotate(model)
    r = rotation(D, SEED).matrix().astype(np.float64)
    np.testing.assert_allclose(weight(model, "write"), WEIGHTS["W"] @ r, atol=1e-5)
    np.testing.assert_allclose(weight(model, "gemm"), r.T @ WEIGHTS["G"], atol=1e-5)
    np.testing.assert_allclose(weight(model, "gemm", 2), WEIGHTS["b"] @ r, atol=1e-5)
    np.testing.assert_allclose(weight(model, "read"), r.T @ (WEIGHTS["gamma"][:, None] * WEIGHTS["R"]), atol=1e-5)
    np.testing.assert_allclose(run(model, {"x": x})[0], before, rtol=1e-4, atol=1e-4)
    assert not {"W", "G", "R", "b", "gamma"} & set(model.ir.graph.initializers), "nobody reads them any more"


def test_the_same_model_is_always_rotated_the_same_way(tmp_path):
    one, other = chain(tmp_path), chain(tmp_path)
    rotate(one)
    rotate(other)
    assert serialize(one) == serialize(other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: chain(p, node("Relu", ["h"], ["r"], name="relu"), outputs=("y", "r")), "Relu 'relu' reads it"),
        (lambda p: chain(p, outputs=("y", "h")), "'h' is an output of the graph"),
        (layer_norm, "it has LayerNorm, which takes the mean away"),
        (lambda p: load(arch.funnel(p / "f.onnx")), "no RMSNorm"),
    ],
    ids=["a reader", "an output", "LayerNorm", "no norm"],
)
def test_what_cannot_be_rotated_is_left_as_it_was(build, message, tmp_path):
    model = build(tmp_path)
    before = serialize(model)
    with pytest.raises(RotationError, match=f"cannot be rotated: {message}; leave out rotation"):
        rotate(model)
    assert serialize(model) == before


@pytest.mark.parametrize("quantized", [False, True])
def test_a_table_that_the_head_shares_stays_unless_it_gets_codes(quantized, tmp_path):
    """As a float table it would be there twice; a MatMul by R, D² numbers, is behind its rows instead."""
    rows = 8 * D
    nodes = [
        node("Gather", ["E", "ids"], ["h"], name="gather"), node("Mul", ["h", "h"], ["square"]),
        node("ReduceMean", ["square", "axes"], ["mean"]), node("Sqrt", ["mean"], ["root"]),
        node("Div", ["h", "root"], ["unit"]), node("Mul", ["unit", "gamma"], ["normed"]),
        node("Gemm", ["normed", "E"], ["y"], transB=1, name="head"),
    ]  # fmt: skip
    weights = {"E": random(rows, D), "gamma": WEIGHTS["gamma"], "axes": WEIGHTS["axes"]}
    main = graph(nodes, [value("ids", ("m",), 7)], [value("y")], weights)
    model, feed = load(write(tmp_path / "m.onnx", main)), {"ids": np.arange(9)}
    before = run(model, feed)[0]
    rotate(model, {n for n in model.ir.graph if n.name in ("gather", "head")} if quantized else ())
    np.testing.assert_allclose(run(model, feed)[0], before, rtol=1e-4, atol=1e-3)
    sizes = sorted(v.const_value.size for v in model.ir.graph.initializers.values() if v.const_value.size > D)
    assert sizes == ([rows * D, rows * D] if quantized else [D * D, D * D, rows * D])
