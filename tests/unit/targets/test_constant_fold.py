"""What is folded are the numbers that the nodes compute, bit for bit; what is computed from inputs is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import clone, load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.session import make_session
from onnx_woq.targets.base import Storage
from onnx_woq.targets.constant_fold import fold_constants
from onnx_woq.targets.registry import operator_of
from tests.zoo.codes import random_codes
from tests.zoo.nodes import FLOAT, FLOAT16, INT64, graph, linear, node, random, value, write

TYPES = {
    TensorProto.INT8: (-128, 128),
    TensorProto.UINT8: (0, 256),
    TensorProto.INT4: (-8, 8),
    TensorProto.UINT4: (0, 16),
}
K, N = 48, 20
FORMS = {
    "of all": ((), {}),
    "by row": ((K,), {"axis": 0}),
    "by column": ((N,), {}),
    "from the end": ((N,), {"axis": -1}),
    "blocks of rows": ((4, N), {"axis": 0, "block_size": 14}),
    "blocks of columns": ((K, 5), {"axis": 1, "block_size": 4}),
}


def outputs(model, feeds):
    """What the nodes compute as they are written, with no optimization."""
    return make_session(model, for_calibration=True).run(None, feeds)


def folded(model):
    copy = clone(model)
    fold_constants(copy)
    return copy


def kinds(model):
    return sorted(one.op_type for one in model.ir.graph.all_nodes())


def constant(name, kind, shape, seed):
    numbers = np.random.default_rng(seed).integers(*TYPES[kind], shape)
    return helper.make_tensor(name, kind, shape, np.asarray(numbers).reshape(-1).tolist())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TYPES, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_dequantized_constant_is_what_the_runtime_makes_of_it(form, kind, half, tmp_path):
    """With zero points and without, of scales in both types; the sum with nothing shows every number."""
    shape, attributes = FORMS[form]
    dtype, proto = (np.float16, FLOAT16) if half else (np.float32, FLOAT)
    scales = np.random.default_rng(1).uniform(-2, 2, shape).astype(dtype)
    for zeros in ([], [constant("zeros", kind, shape, 2)]):
        tensors = [constant("codes", kind, (K, N), 3), numpy_helper.from_array(scales, "scales"), *zeros]
        nodes = [
            node("DequantizeLinear", [one.name for one in tensors], ["w"], **attributes),
            node("Add", ["x", "w"], ["y"]),
        ]
        weights = {one.name: one for one in tensors}
        main = graph(nodes, [value("x", (K, N), proto)], [value("y", (K, N), proto)], weights)
        model = load(write(tmp_path / "m.onnx", main))
        done = folded(model)
        assert kinds(done) == ["Add"]
        assert set(done.ir.graph.initializers) == {"w"}, "nothing else reads what it was made from"
        x = np.zeros((K, N), dtype)
        for got, want in zip(outputs(done, {"x": x}), outputs(model, {"x": x}), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_lowered_product_is_the_same_on_folded_constants(target, bits, symmetric, tmp_path):
    """Codes in planes, scales in half precision: every node around the product goes, and its numbers stay."""
    model = load(linear(tmp_path / "m.onnx", random(96, N)))
    [weight] = make_plan(model, Recipe(spec=Spec(bits, 32, symmetric), target=target)).groups
    packed = weight.operator.pack(random_codes(96, N, weight.spec, half=True), Storage(np.float16, 21))
    weight.operator.lower(model, weight.source, [packed], accuracy_level=0)
    assert len(kinds(model)) > 1
    done = folded(model)
    assert kinds(done) == (["MatMulNBits"] if target == "matmulnbits" else ["MatMul"])
    x = random(5, 96, seed=3)
    np.testing.assert_array_equal(*(outputs(one, {"x": x})[0] for one in (model, done)))


@pytest.mark.parametrize("alone", [False, True])
def test_a_table_that_shares_the_codes_of_its_head(alone, tmp_path):
    """It reads them behind a Reshape, and in a part of the graph that the head is in or not."""
    nodes = [
        node("Gather", ["T", "ids"], ["y"]),
        node("Transpose", ["T"], ["turned"]),
        node("MatMul", ["x", "turned"], ["logits"]),
    ]
    inputs = [value("ids", (3,), INT64), value("x", (2, 64))]
    main = graph(nodes, inputs, [value("y", (3, 64)), value("logits", (2, 2100))], {"T": random(2100, 64)})
    model = load(write(tmp_path / "m.onnx", main))
    plan = make_plan(model, Recipe(spec=Spec(3, 32), embedding=Spec(3, 32)))
    [head], [table] = plan.groups, plan.embeddings
    packed = head.operator.pack(random_codes(64, 2100, head.spec), head.storage)
    head.operator.lower(model, head.source, [packed], accuracy_level=0)
    operator_of("matmulnbits", "embedding").share(model, table.source, None)
    if alone:
        model.ir.graph.outputs.pop()
        model.ir.graph.remove(head.source.linears[0].node, safe=True)
    done = folded(model)
    assert {"BitShift", "BitwiseAnd", "Concat"} & set(kinds(model))
    assert not {"BitShift", "BitwiseAnd", "Concat"} & set(kinds(done))
    feeds = {"ids": np.array([0, 2099, 7]), "x": random(2, 64, seed=3)}
    assert len(outputs(model, feeds)) == 2 - alone
    for got, want in zip(outputs(done, feeds), outputs(model, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_is_computed_or_read_elsewhere_stays(tmp_path):
    """Codes of an activation; and codes that are an output as well, which stay beside what is made of them."""
    scale = np.array(0.1, np.float32)
    nodes = [
        node("QuantizeLinear", ["x", "s"], ["q"]),
        node("DequantizeLinear", ["q", "s"], ["d"]),
        node("DequantizeLinear", ["codes", "s"], ["w"]),
        node("Mul", ["d", "w"], ["y"]),
        node("Identity", ["codes"], ["seen"]),
    ]
    codes = np.arange(-3, 3, dtype=np.int8)
    results = [value("y", (6,)), value("seen", (6,), TensorProto.INT8)]
    main = graph(nodes, [value("x", (6,))], results, {"s": scale, "codes": codes})
    model = load(write(tmp_path / "m.onnx", main))
    done = folded(model)
    assert kinds(done) == ["DequantizeLinear", "Identity", "Mul", "QuantizeLinear"]
    assert {"s", "codes", "w"} == set(done.ir.graph.initializers)
    x = random(6)
    for got, want in zip(outputs(done, {"x": x}), outputs(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(got, want)
    fold_constants(again := clone(done))
    assert kinds(again) == kinds(done)
