"""Products in other forms: quantized, and the numbers are those of the form as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, value, write

MS = "com.microsoft"
W, T = zoo.weight(1, 64, 48), zoo.weight(2, 48, 64)
X = zoo.correlated(3, 20, 64)

# a form -> (its nodes, the activation that they read)
FORMS = {
    "Gemm, transA": ([node("Gemm", ["x", "W", "c"], ["y"], transA=1, name="p")], X.T),
    "Gemm, all of it": ([node("Gemm", ["x", "T", "c"], ["y"], transA=1, transB=1, alpha=0.5, beta=2.0)], X.T),
    "FusedMatMul": ([node("FusedMatMul", ["x", "W"], ["y"], domain=MS)], X),
    "FusedMatMul, alpha": ([node("FusedMatMul", ["x", "W"], ["y"], domain=MS, alpha=0.25)], X),
    "FusedMatMul, transB": ([node("FusedMatMul", ["x", "T"], ["y"], domain=MS, transB=1)], X),
    "FusedMatMul, both": ([node("FusedMatMul", ["x", "T"], ["y"], domain=MS, transB=1, alpha=3.0)], X),
    "FusedMatMul, three dimensions": ([node("FusedMatMul", ["x", "T"], ["y"], domain=MS, transB=1)], X[None]),
}


def written(path, nodes, x):
    read = {name for n in nodes for name in n.input}
    weights = {name: w for name, w in {"W": W, "T": T, "c": zoo.weight(4, 1, 48)[0]}.items() if name in read}
    dims = [f"d{i}" if size == 20 else size for i, size in enumerate(x.shape)]
    return write(path, graph(nodes, [value("x", dims)], [value("y")], weights), opset=17, domains={MS: 1})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_quantized(name, target, method, tmp_path):
    nodes, x = FORMS[name]
    model, out = written(tmp_path / "m.onnx", nodes, x), tmp_path / "q.onnx"
    feed = [{"x": np.ascontiguousarray(x)}]
    recipe = Recipe(method, Spec(8, 16), target=target, accuracy_level=0)
    (row,) = quantize(model, out, recipe, feed).groups
    assert (row.k, row.n) == (64, 48)
    assert measure.sqnr(*(measure.run(path, feed)["y"] for path in (model, out))) > 33
    quantize(model, tmp_path / "f.onnx", Recipe("rtn", exclude=("",)))
    left = measure.run(tmp_path / "f.onnx", feed)["y"]
    np.testing.assert_allclose(left, measure.run(model, feed)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attribute", ["transA", "transBatchA", "transBatchB"])
def test_what_turns_the_activation_of_any_rank_is_refused_by_name(attribute, tmp_path):
    nodes = [node("FusedMatMul", ["x", "W"], ["y"], domain=MS, **{attribute: 1})]
    (left,) = inspect(written(tmp_path / "m.onnx", nodes, X.T)).skipped
    assert "FusedMatMul of this form is not supported" in left.reason
    assert left.weight_bytes == W.nbytes


def test_a_product_of_two_activations_stays_what_it_is(tmp_path):
    nodes = [node("FusedMatMul", ["x", "x"], ["y"], domain=MS, transB=1, alpha=0.5)]
    path = written(tmp_path / "m.onnx", [*nodes, node("MatMul", ["x", "W"], ["z"])], X)
    quantize(path, tmp_path / "q.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert "FusedMatMul" in kinds
