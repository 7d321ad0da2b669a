"""A compensated layer computes `x·Ŵ + (x·A)·B` in the nodes of either target, and shares what can be shared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from onnx import helper

from onnx_woq.core.refine.low_rank import GRID
from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.session import make_session
from onnx_woq.targets.low_rank import factor_dims, lower_compensated
from onnx_woq.targets.registry import TARGETS
from tests.zoo.codes import rounded
from tests.zoo.nodes import BOOL, graph, node, random, value, write

K, RANK, SPEC = 48, 16, Spec(4, 16)
ROWS = 5


def planned(path, nodes, inputs, outputs, weights, target):
    model = load(write(path, graph(nodes, inputs, outputs, weights)))
    [weight] = make_plan(model, Recipe(spec=SPEC, lowrank=RANK, target=target)).groups
    return model, weight


def compensated(model, weight, *, bias=False):
    """Lowers a group with random factors; by the name of a weight what it is now, `Ŵ + A·B`, and its bias."""
    names = [part.name for part in weight.weight_sources()]
    shapes = factor_dims(weight.source, RANK)
    parts = [rounded(np.float32(part.read()), SPEC) for part in weight.weight_sources()]
    down, *ups = [rounded(random(*shape, seed=20 + i) / 4, GRID) for i, shape in enumerate(shapes)]
    added = [random(q.codes.shape[1], seed=30 + i) for i, q in enumerate(parts)] if bias else []
    pack = lambda some: [weight.operator.pack(q, weight.storage) for q in some]  # noqa: E731
    lower_compensated(
        model, weight.source, pack(parts), pack([down, *ups]), TARGETS[weight.target].linears,
        accuracy_level=0, bias=added,
    )  # fmt: skip
    whole = [q.dequantize() + down.dequantize() @ up.dequantize() for q, up in zip(parts, ups, strict=True)]
    return dict(zip(names, zip(whole, added or [np.float32(0)] * len(parts), strict=True), strict=True))


def outputs(model, feeds):
    names = [one.name for one in model.ir.graph.outputs]
    return dict(zip(names, make_session(model, for_calibration=True).run(names, feeds), strict=True))


EVERY = pytest.mark.parametrize("target", TARGETS)


def test_shapes_of_factors_are_those_of_the_group(tmp_path):
    weights = {"A": random(K, 20), "B": random(K, 7)}
    nodes = [node("MatMul", ["x", name], [name.lower()]) for name in weights]
    results = [value("a", (ROWS, 20)), value("b", (ROWS, 7))]
    _, weight = planned(tmp_path / "m.onnx", nodes, [value("x", (ROWS, K))], results, weights, "matmulnbits")
    assert factor_dims(weight.source, 5) == [(K, 5), (5, 20), (5, 7)]
    assert factor_dims(weight.source, 0) == []


@EVERY
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_read_one_activation_share_the_first_factor(target, bias, tmp_path):
    """The product with A is there once, that with B for each weight; values keep their names."""
    weights = {"A": random(K, 20), "B": random(24, K, seed=1), "c": random(24, seed=2)}
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Gemm", ["x", "B", "c"], ["b"], transB=1, alpha=0.5)]
    results = [value("a", (ROWS, 20)), value("b", (ROWS, 24))]
    model, weight = planned(tmp_path / "m.onnx", nodes, [value("x", (ROWS, K))], results, weights, target)
    made = compensated(model, weight, bias=bias)
    (first, one), (second, other) = made["A"], made["B"]
    x = random(ROWS, K, seed=3)
    found = outputs(model, {"x": x})
    np.testing.assert_allclose(found["a"], x @ first + one, atol=1e-4)
    np.testing.assert_allclose(found["b"], x @ second + weights["c"] + other, atol=1e-4)
    assert thin_products(model, target) == 1 + 2


@EVERY
def test_linears_that_share_a_weight_share_the_second_factor(target, tmp_path):
    """Two activations make two products with A; B is stored once."""
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("MatMul", ["z", "A"], ["b"])]
    inputs = [value("x", (ROWS, K)), value("z", (ROWS, K))]
    results = [value("a", (ROWS, 20)), value("b", (ROWS, 20))]
    model, weight = planned(tmp_path / "m.onnx", nodes, inputs, results, {"A": random(K, 20)}, target)
    whole, _ = compensated(model, weight)["A"]
    x, z = random(ROWS, K, seed=3), random(ROWS, K, seed=4)
    found = outputs(model, {"x": x, "z": z})
    np.testing.assert_allclose(found["a"], x @ whole, atol=1e-4)
    np.testing.assert_allclose(found["b"], z @ whole, atol=1e-4)
    assert thin_products(model, target) == 2 + 2
    stored = [name for name in model.ir.graph.initializers if name.endswith(("_down_Q8", "_up_Q8"))]
    assert sorted(stored) == ["A_down_Q8", "A_up_Q8"]


@EVERY
@pytest.mark.parametrize("choice", [False, True])
def test_each_branch_of_an_if_computes_its_own(target, choice, tmp_path):
    """What one branch has computed is not there in the other."""
    branches = [
        helper.make_graph([node("MatMul", ["x", name], [out])], out, [], [value(out, (ROWS, 20))])
        for name, out in (("A", "t"), ("B", "e"))
    ]
    nodes = [node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1])]
    inputs = [value("x", (ROWS, K)), value("yes", (), BOOL)]
    weights = {"A": random(K, 20), "B": random(K, 20, seed=1)}
    model, weight = planned(tmp_path / "m.onnx", nodes, inputs, [value("y", (ROWS, 20))], weights, target)
    whole, _ = compensated(model, weight)["A" if choice else "B"]
    x = random(ROWS, K, seed=3)
    found = outputs(model, {"x": x, "yes": np.array(choice)})
    np.testing.assert_allclose(found["y"], x @ whole, atol=1e-4)


@EVERY
def test_without_factors_it_is_the_operator_alone(target, tmp_path):
    made = []
    for compensating in (False, True):
        results = [value("y", (ROWS, 20))]
        nodes = [node("MatMul", ["x", "A"], ["y"])]
        model, weight = planned(
            tmp_path / "m.onnx", nodes, [value("x", (ROWS, K))], results, {"A": random(K, 20)}, target
        )
        operator = TARGETS[target].linears
        packed = [operator.pack(rounded(weight.source.weight(), SPEC), weight.storage)]
        if compensating:
            lower_compensated(model, weight.source, packed, [], operator, accuracy_level=0)
        else:
            operator.lower(model, weight.source, packed, accuracy_level=0)
        made.append(Counter((one.op_type, one.name) for one in model.ir.graph))
    assert made[0] == made[1]


def thin_products(model, target):
    """How many products have rank many inputs or outputs."""
    if target == "matmulnbits":
        low = [one for one in model.ir.graph if one.op_type == "MatMulNBits"]
        return sum(RANK in (one.attributes["K"].as_int(), one.attributes["N"].as_int()) for one in low)
    products = [one for one in model.ir.graph if one.op_type in ("MatMul", "Gemm")]
    return sum(RANK in tuple(one.inputs[1].shape.numpy()) for one in products)
