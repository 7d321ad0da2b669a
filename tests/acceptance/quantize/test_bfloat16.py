"""Models in bfloat16, for which the CPU has next to no kernels: what is quantized runs, whatever is done to it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from onnx_woq import Recipe, Spec, quantize
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, value, write

K, N = 96, 64
X = [{"x": zoo.correlated(seed, 40, K)} for seed in range(2)]
W = zoo.weight(1, K, N).astype(ml_dtypes.bfloat16)
C = zoo.weight(2, 1, N).astype(ml_dtypes.bfloat16)
RECIPES = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "teq": {"method": "teq"},
    "awq with a bias": {"method": "awq", "bias_correction": True},
    "awq with factors": {"method": "awq", "lowrank": 16},
    "gptq with a scale": {"method": "gptq", "options": {"scaling": "awq"}},
    "awq, sequential": {"method": "awq", "true_sequential": True},
}


def product(path, *, gemm: bool):
    """x -> Cast -> MatMul or Gemm with a bias, in bfloat16 -> Cast -> y."""
    inner = node("Gemm", ["xb", "W", "C"], ["yb"]) if gemm else node("MatMul", ["xb", "W"], ["yb"])
    nodes = [node("Cast", ["x"], ["xb"], to=TensorProto.BFLOAT16), inner, node("Cast", ["yb"], ["y"], to=1)]
    weights = {"W": W} | ({"C": C[0]} if gemm else {})
    return write(path, graph(nodes, [value("x", ("b", K))], [value("y", ("b", N))], weights))


@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_gives_a_model_that_runs(name, target, gemm, tmp_path):
    model, out = product(tmp_path / "m.onnx", gemm=gemm), tmp_path / "q.onnx"
    quantize(model, out, Recipe(spec=Spec(8, 32), target=target, accuracy_level=0, **RECIPES[name]), X)
    wanted = np.concatenate([x["x"] for x in X]).astype(ml_dtypes.bfloat16).astype(np.float64) @ W.astype(np.float64)
    assert measure.sqnr(wanted + (C.astype(np.float64) if gemm else 0), measure.run(out, X)["y"]) > 33


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
def test_a_bias_of_a_gemm_that_is_computed_is_added_in_float32(target, correction, tmp_path):
    nodes = [
        *(node("Cast", [name], [f"{name}b"], to=TensorProto.BFLOAT16) for name in ("x", "c")),
        node("Gemm", ["xb", "W", "cb"], ["yb"], beta=1.0),
        node("Cast", ["yb"], ["y"], to=1),
    ]
    inputs = [value("x", ("b", K)), value("c", ("b", N))]
    model, out = write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y", ("b", N))], {"W": W})), tmp_path / "q.onnx"
    data = [x | {"c": zoo.correlated(9, 40, N)} for x in X]
    recipe = Recipe("rtn", Spec(8, 32), target=target, accuracy_level=0, bias_correction=correction)
    quantize(model, out, recipe, data)
    wanted = np.concatenate([x["x"] @ W.astype(np.float32) + x["c"] for x in data])
    assert measure.sqnr(wanted, measure.run(out, data)["y"]) > 33


@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
def test_two_products_of_one_activation_share_the_cast_and_the_factor(target, tmp_path):
    nodes = [
        node("Cast", ["x"], ["xb"], to=TensorProto.BFLOAT16),
        *(node("MatMul", ["xb", f"W{i}"], [f"yb{i}"]) for i in (0, 1)),
        *(node("Cast", [f"yb{i}"], [f"y{i}"], to=1) for i in (0, 1)),
    ]
    outputs = [value(f"y{i}", ("b", N)) for i in (0, 1)]
    model = write(tmp_path / "m.onnx", graph(nodes, [value("x", ("b", K))], outputs, {"W0": W, "W1": -W}))
    recipe = Recipe("awq", Spec(8, 32), target=target, accuracy_level=0)
    (row,) = quantize(model, tmp_path / "q.onnx", recipe, X).groups
    assert row.scaling == "mul"
    found = measure.run(tmp_path / "q.onnx", X)
    assert measure.sqnr(found["y0"], -found["y1"]) > 33
