"""A widened part computes in float32 what the half-precision one computes, but for that one's rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnx_woq.graph.io.model import clone, load, memory_tensors
from onnx_woq.graph.rewrite.upcast import HALF, upcast
from tests.zoo.nodes import BFLOAT16, BOOL, FLOAT16, graph, node, random, run, value, write

K = 32
KINDS = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


@pytest.fixture(params=KINDS)
def half(request, tmp_path):
    """Casts to and from the half type, a constant in a node, one in a body, one on disk."""
    kind, dtype = request.param, KINDS[request.param]
    small = numpy_helper.from_array(np.array(0.5, dtype), "half")
    body = lambda name, op: graph([node(op, ["h", "c"], [name])], [], [value(name, None, kind)])  # noqa: E731
    nodes = [
        node("Constant", [], ["c"], value=small),
        node("Cast", ["x"], ["a"], to=kind),
        node("MatMul", ["a", "W"], ["h"]),
        node("If", ["flag"], ["i"], then_branch=body("t", "Mul"), else_branch=body("e", "Add")),
        node("Shape", ["i"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.ones(1, dtype), "one")),
        node("Add", ["i", "ones"], ["s"]),
        node("Cast", ["s"], ["y"], to=helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))),
    ]
    weight = numpy_helper.from_array(random(K, K).astype(dtype), "W")
    inputs = [value("x", ("t", K)), value("flag", [], BOOL)]
    main = graph(nodes, inputs, [value("y", ("t", K))], {"W": weight})
    return load(write(tmp_path / "m.onnx", main, external=True)), random(K, K).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("flag", [True, False])
def test_it_computes_in_float32(flag, half):
    model, weight = half
    part = clone(model)
    upcast(part)
    x = random(5, K, seed=3)
    h = x @ weight
    (y,) = run(part, {"x": x, "flag": np.array(flag)})
    np.testing.assert_allclose(y, (h * 0.5 if flag else h + 0.5) + 1, rtol=1e-5, atol=1e-5)


def test_nothing_half_is_left_and_the_model_is_as_it_was(half):
    model, _ = half
    part = clone(model)
    upcast(part)
    left = [v.name for g in part.ir.graphs() for n in g for v in n.outputs if v.dtype in HALF]
    assert not left
    assert part.ir.graph.initializers["W"].const_value.dtype == ir.DataType.FLOAT
    assert model.ir.graph.initializers["W"].const_value.dtype in HALF
    assert next(n for n in model.ir.graph if n.op_type == "Cast").attributes["to"].as_int() in HALF
    assert next(n for n in part.ir.graph if n.op_type == "Cast").attributes["to"].as_int() == ir.DataType.FLOAT


def test_large_weights_are_widened_when_a_session_wants_them(half):
    model, weight = half
    part = clone(model)
    upcast(part)
    assert isinstance(part.ir.graph.initializers["W"].const_value, ir.LazyTensor)
    assert np.array_equal(memory_tensors(part)["W"], weight)
