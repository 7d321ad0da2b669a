"""The matrix that a written layer multiplies by, whatever stands between its input and its output."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.evaluation.effective_weight import acting_rows
from tests.zoo.nodes import FLOAT16, graph, lower, node, random, value, write

K, N = 32, 48
W = random(K, N)


def rows_of(model, entry="x", output="y", k=K):
    rows = acting_rows(model, Structure(model), entry, output, k)
    return None if rows is None else rows(range(k))


def model_of(path, nodes, weights, dtype=1):
    return load(write(path, graph(nodes, [value("x", ("b", "t", K), dtype)], [value("y", None, dtype)], weights)))


def test_a_float_layer_is_its_weight_without_its_bias(tmp_path):
    nodes = [node("MatMul", ["x", "W"], ["p"]), node("Add", ["p", "b"], ["y"])]
    model = model_of(tmp_path / "m.onnx", nodes, {"W": W, "b": random(N, seed=1)})
    np.testing.assert_allclose(rows_of(model), W, rtol=1e-5, atol=1e-5)
    rows = acting_rows(model, Structure(model), "x", "y", K)
    np.testing.assert_allclose(rows([5, 0, 5]), W[[5, 0, 5]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [Spec(4, 16), Spec(3, 32, True), Spec(8, -1)])
def test_codes_are_what_they_stand_for(spec, tmp_path):
    model = model_of(tmp_path / "m.onnx", [node("MatMul", ["x", "W"], ["y"])], {"W": W})
    _, (q,), _ = lower(model, Recipe(spec=spec))
    np.testing.assert_allclose(rows_of(model), q.dequantize(), rtol=1e-5, atol=1e-5)


def test_factors_and_scales_on_the_way_belong_to_it(tmp_path):
    s, a, b = 1 + random(K, seed=2) ** 2, random(K, 4, seed=3), random(4, N, seed=4)
    nodes = [
        node("Div", ["x", "s"], ["d"]), node("MatMul", ["d", "W"], ["p"]), node("MatMul", ["x", "A"], ["u"]),
        node("MatMul", ["u", "B"], ["v"]), node("Add", ["p", "v"], ["y"]),
    ]  # fmt: skip
    model = model_of(tmp_path / "m.onnx", nodes, {"W": W, "s": s, "A": a, "B": b})
    np.testing.assert_allclose(rows_of(model), W / s[:, None] + a @ b, rtol=1e-4, atol=1e-4)


def test_half_precision_is_looked_at_in_single(tmp_path):
    model = model_of(tmp_path / "m.onnx", [node("MatMul", ["x", "W"], ["y"])], {"W": W.astype(np.float16)}, FLOAT16)
    np.testing.assert_array_equal(rows_of(model), W.astype(np.float16).astype(np.float32))


def test_what_reads_something_else_or_lies_elsewhere_cannot_be_cut_out(tmp_path):
    nodes = [node("MatMul", ["x", "W"], ["p"]), node("Relu", ["x"], ["r"]), node("MatMul", ["r", "W"], ["q"])]
    nodes.append(node("Add", ["p", "q"], ["y"]))
    model = model_of(tmp_path / "m.onnx", nodes, {"W": W})
    assert rows_of(model, "r") is None, "y reads x as well"
    assert rows_of(model, "nothing") is None
    assert rows_of(model, "x", "W") is None
    np.testing.assert_allclose(rows_of(model, "r", "q"), W, rtol=1e-5, atol=1e-5)
    assert rows_of(model, k=K + 1) is None, "another width"
