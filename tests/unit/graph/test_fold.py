"""What follows from constants alone; tests/acceptance/quantize/test_folded.py quantizes such weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from onnx_woq.errors import ModelError
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.fold import follows_from_constants
from onnx_woq.graph.io.model import clone, load
from tests.zoo.nodes import graph, node, random, value, write


def product_of(path, nodes, weights, inputs=()):
    main = graph([*nodes, node("MatMul", ["x", "w"], ["y"])], [value("x", ("b", 64)), *inputs], [value("y")], weights)
    return load(write(path, main))


def weight_of(model):
    return next(n for n in model.ir.graph if n.op_type == "MatMul").inputs[1]


def test_the_numbers_are_computed_each_time_they_are_read_and_never_before(tmp_path):
    a = random(64, 32)
    nodes = [node("Mul", ["a", "two"], ["b"]), node("Add", ["b", "two"], ["w"])]
    model = product_of(tmp_path / "m.onnx", nodes, {"a": a, "two": np.float32([2])})
    for one in (model, clone(model)):
        constant = resolve(weight_of(one))
        np.testing.assert_array_equal(constant.array(), 2 * a + 2)
    assert weight_of(model).name == "a_folded"
    assert [n.op_type for n in model.ir.graph] == ["MatMul"]
    assert set(model.ir.graph.initializers) == {"a_folded"}, "what it was made of is gone, as nothing else reads it"


@pytest.mark.parametrize("kept", ["an output", "another reader"])
def test_what_somebody_else_reads_stays(kept, tmp_path):
    nodes = [node("Mul", ["a", "two"], ["w"]), node("Neg", ["a" if kept == "another reader" else "w"], ["n"])]
    main = graph(
        [*nodes, node("MatMul", ["x", "w"], ["y"])],
        [value("x", ("b", 64))],
        [value("y"), value("n")],
        {"a": random(64, 32), "two": np.float32([2])},
    )
    model = load(write(tmp_path / "m.onnx", main))
    assert {"a", "a_folded"} <= set(model.ir.graph.initializers)
    assert resolve(weight_of(model)) is not None


def test_an_initializer_that_callers_may_replace_is_no_constant(tmp_path):
    weights = {"a": random(64, 32), "two": np.float32([2])}
    model = product_of(tmp_path / "m.onnx", [node("Mul", ["a", "two"], ["w"])], weights, [value("two", (1,))])
    assert not follows_from_constants(weight_of(model))
    assert [n.op_type for n in model.ir.graph] == ["Mul", "MatMul"]


def test_a_weight_that_cannot_be_computed_is_a_named_error(tmp_path, monkeypatch):
    weights = {"a": random(64, 32), "two": np.float32([2])}
    model = product_of(tmp_path / "m.onnx", [node("Mul", ["a", "two"], ["w"])], weights)

    def fails(*_):
        raise TypeError("no kernel")

    monkeypatch.setattr("onnx.reference.ReferenceEvaluator.run", fails)
    with pytest.raises(ModelError, match=r"weight 'w' cannot be computed from 'a' \(no kernel\): exclude it"):
        resolve(weight_of(model)).view()


@pytest.mark.parametrize(("count", "folded"), [(30, True), (3000, False)])
def test_long_chains_and_values_that_are_read_twice(count, folded, tmp_path):
    """Each node reads the one before twice: 2 to the power of 30 ways lead back."""
    names = ["a", *(f"b{i}" for i in range(count - 1)), "w"]
    nodes = [node("Max", [old, old], [new]) for old, new in pairwise(names)]
    model = product_of(tmp_path / "m.onnx", nodes, {"a": random(64, 32)})
    assert (weight_of(model).name == "a_folded") == folded
    if folded:
        np.testing.assert_array_equal(resolve(weight_of(model)).array(), random(64, 32))
