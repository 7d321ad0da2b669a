"""What a Gemm adds is split into a constant of the output channels and the rest, and the two make up all of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.session import make_session
from onnx_woq.targets.gemm_bias import corrected_bias, split_bias
from tests.zoo.nodes import BFLOAT16, FLOAT, FLOAT16, graph, node, random, value, write

K, N, ROWS = 32, 6, 3
SHAPES = [(), (1,), (N,), (1, 1), (1, N), (ROWS, 1), (ROWS, N)]


def gemm(path, c=None, *, beta=None, dtype=FLOAT, computed=False):
    """A loaded model `y = x @ W + beta * c`, and its Gemm; `computed`: c is an input."""
    inputs, weights = [value("x", (ROWS, K), dtype)], {"W": onnx.numpy_helper.from_array(random(K, N), "W")}
    if c is not None:
        weights["c"] = onnx.numpy_helper.from_array(c, "c")
    if dtype != FLOAT:
        kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
        weights = {name: onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one).astype(kind), name)
                   for name, one in weights.items()}  # fmt: skip
    if computed:
        inputs.append(value("c", c.shape, dtype))
        del weights["c"]
    extra = {} if beta is None else {"beta": beta}
    made = node("Gemm", ["x", "W", *(["c"] if c is not None else [])], ["y"], name="gemm", **extra)
    main = graph([made], inputs, [value("y", (ROWS, N), dtype)], weights)
    model = load(write(path, main))
    [linear] = make_plan(model, Recipe()).groups[0].source.linears
    return model, linear


def numbers(part):
    return np.float32(0) if part is None else resolve(part).array()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", [None, 1.0, -2.5, 0.0])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, BFLOAT16])
def test_both_parts_make_up_what_is_added(shape, beta, dtype, tmp_path):
    """A constant [N] of what is the same in every row; what is not is added behind the product."""
    c = np.round(8 * random(*shape)) / 8  # every type has these numbers
    model, linear = gemm(tmp_path / "m.onnx", c, beta=beta, dtype=dtype)
    bias, addend = split_bias(model, linear)
    want = np.broadcast_to(c * np.float32(1 if beta is None else beta), (ROWS, N))
    np.testing.assert_array_equal(np.broadcast_to(numbers(bias) + numbers(addend), (ROWS, N)), want)
    if beta == 0:
        assert (bias, addend) == (None, None)
    elif ROWS in shape:
        assert (bias, addend.dtype) == (None, linear.dtype)
    else:
        assert (addend, tuple(bias.shape.numpy())) == (None, (N,))
        assert bias.dtype == (ir.DataType.FLOAT if dtype == BFLOAT16 else linear.dtype), "bfloat16 has no kernel"


@pytest.mark.parametrize(("shape", "beta"), [((N,), 1.0), ((ROWS, N), 1.0), ((N,), None)], ids=str)
def test_what_is_right_already_is_not_copied(shape, beta, tmp_path):
    model, linear = gemm(tmp_path / "m.onnx", random(*shape), beta=beta)
    before = set(model.ir.graph.initializers)
    assert linear.node.inputs[2] in split_bias(model, linear)
    assert set(model.ir.graph.initializers) == before


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_what_is_computed_is_added_behind_by_its_factor(beta, tmp_path):
    model, linear = gemm(tmp_path / "m.onnx", random(N), beta=beta, computed=True)
    bias, addend = split_bias(model, linear)
    assert bias is None
    assert (addend is linear.node.inputs[2]) == (beta == 1.0)
    model.ir.graph.outputs[0] = addend
    addend.type, addend.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([N])
    c = random(N, seed=4)
    [got] = make_session(model).run(None, {"x": random(ROWS, K), "c": c})
    np.testing.assert_array_equal(got, np.float32(beta) * c)


def test_a_gemm_or_product_without_a_bias_adds_nothing(tmp_path):
    assert split_bias(*gemm(tmp_path / "m.onnx")) == (None, None)


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
def test_a_correction_is_added_to_the_constant_and_replaces_it(dtype, tmp_path):
    model, linear = gemm(tmp_path / "m.onnx", c := random(N), dtype=dtype)
    more = random(N, seed=5)
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    bias = corrected_bias(model, linear, linear.node.inputs[2], more)
    assert bias.dtype == linear.dtype
    np.testing.assert_array_equal(bias.const_value.numpy(), (c.astype(kind).astype(np.float32) + more).astype(kind))
    alone = corrected_bias(model, linear, None, more)
    np.testing.assert_array_equal(alone.const_value.numpy(), more.astype(kind))
    assert len({"c", bias.name, alone.name}) == 3, "neither takes the name of another"
    linear.node.replace_input_with(2, bias)
    corrected_bias(model, linear, linear.node.inputs[2], more)
    assert bias.name in model.ir.graph.initializers, "somebody reads it still"
