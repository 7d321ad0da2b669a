"""Targets are chosen by what they can hold, and the oldest runtime of a model is that of its most demanding node."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.targets.registry import AUTO, TARGETS, choose, operator_of, required_runtime
from tests.zoo.nodes import BOOL, FLOAT16, graph, node, random, value, write

SPECS = [Spec(bits, group, symmetric, dim) for bits, group, symmetric, dim in itertools.product(
    (1, 3, 4, 8), (16, 24, 100, 128, -1), (False, True), (0, 1))]  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("name", [*TARGETS, AUTO])
def test_what_is_chosen_can_hold_the_format_and_what_cannot_is_refused(name, kind):
    """A refusal names a target that can, and choosing that is no error."""
    for spec in SPECS:
        holding = [target for target in TARGETS if not operator_of(target, kind).refusal(spec)]
        if name in holding or (name == AUTO and holding):
            assert choose(name, spec, kind) == (holding[0] if name == AUTO else name)
            continue
        with pytest.raises(RecipeError) as refused:
            choose(name, spec, kind)
        assert [one for one in TARGETS if f"--target {one}" in str(refused.value)] == holding[:1]


def test_only_one_target_holds_every_format():
    assert [name for name in TARGETS if not any(map(TARGETS[name].linears.refusal, SPECS))] == ["qdq"]
    assert next(iter(TARGETS)) == "matmulnbits"
    with pytest.raises(RecipeError, match=r"unknown target 'qqd': did you mean qdq"):
        choose("qqd", Spec(), "linear")


def low_bit(name, bits, *, level=0, half=False, zeros=True, output="y"):
    """A MatMulNBits by hand, [3, 32] by [32, 4], and what it reads."""
    inputs = ["x", f"{name}_codes", f"{name}_scales", *([f"{name}_zeros"] if zeros else [])]
    sizes = {"K": 32, "N": 4, "bits": bits, "block_size": 32}
    made = node("MatMulNBits", inputs, [output], domain="com.microsoft", accuracy_level=level, **sizes)
    weights = {
        f"{name}_codes": np.zeros((4, 1, 4 * bits), np.uint8),
        f"{name}_scales": np.ones((4, 1), np.float16 if half else np.float32),
    }
    return made, weights | ({f"{name}_zeros": np.zeros((4, 1), np.uint8)} if zeros else {})


def needed(path, nodes, weights, opset=21, kind=1):
    main = graph(nodes, [value("x", (3, 32), kind)], [value("y", (3, 4), kind)], weights)
    return required_runtime(load(write(path, main, opset=opset, domains={"com.microsoft": 1})))


@pytest.mark.parametrize(
    ("bits", "level", "half", "version"),
    [(4, 0, False, "1.20"), (4, 4, True, "1.20"), (8, 0, False, "1.23"), (8, 4, False, "1.22"), (2, 0, False, "1.24"),
     (2, 0, True, "1.28")],
)  # fmt: skip
def test_products_of_low_bit_weights(bits, level, half, version, tmp_path):
    made, weights = low_bit("w", bits, level=level, half=half)
    assert needed(tmp_path / "m.onnx", [made], weights, kind=FLOAT16 if half else 1) == version


@pytest.mark.parametrize(
    ("bits", "level", "zeros", "version"), [(2, 0, True, "1.24"), (4, 4, True, "1.29"), (4, 4, False, "1.20")]
)
def test_the_most_demanding_node_counts_wherever_it_is(bits, level, zeros, version, tmp_path):
    """In a branch of an If, where int8 products with zero points were wrong for long, beside 4 bits in the graph."""
    four, weights = low_bit("four", 4, output="a")
    inner, more = low_bit("inner", bits, level=level, zeros=zeros, output="b")
    then = helper.make_graph([inner], "then", [], [value("b", (3, 4))])
    other = helper.make_graph([node("Identity", ["a"], ["c"])], "else", [], [value("c", (3, 4))])
    choice = node("If", ["yes"], ["y"], then_branch=then, else_branch=other)
    inputs = [value("x", (3, 32)), value("yes", (), BOOL)]
    main = graph([four, choice], inputs, [value("y", (3, 4))], weights | more)
    assert required_runtime(load(write(tmp_path / "m.onnx", main, domains={"com.microsoft": 1}))) == version


@pytest.mark.parametrize(
    ("kind", "block", "opset", "version"),
    [("INT8", 0, 13, "1.19"), ("UINT4", 16, 21, "1.19"), ("UINT2", 0, 25, "1.24"), ("INT32", 0, 21, "")],
)
def test_dequantized_codes(kind, block, opset, version, tmp_path):
    codes = helper.make_tensor("codes", TensorProto.DataType.Value(kind), (32, 4), [1] * 128)
    scales = np.ones((2, 4) if block else 4, np.float32)
    places = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [node("DequantizeLinear", ["codes", "scales"], ["w"], **places), node("MatMul", ["x", "w"], ["y"])]
    assert needed(tmp_path / "m.onnx", nodes, {"codes": codes, "scales": scales}, opset) == version


def test_others_ask_for_nothing(tmp_path):
    """Float products, activations that are dequantized, and a MatMulNBits that somebody else has made."""
    assert needed(tmp_path / "f.onnx", [node("MatMul", ["x", "W"], ["y"])], {"W": random(32, 4)}) == ""
    made, weights = low_bit("w", 4)
    made.attribute.remove(next(one for one in made.attribute if one.name == "accuracy_level"))
    assert needed(tmp_path / "o.onnx", [made], weights) == ""
    quantized = [
        node("QuantizeLinear", ["x", "s"], ["q"]),
        node("DequantizeLinear", ["q", "s"], ["d"]),
        node("MatMul", ["d", "W"], ["y"]),
    ]
    path = tmp_path / "a.onnx"
    assert needed(path, quantized, {"W": random(32, 4), "s": np.array(0.1, np.float32)}) == ""
    onnx.checker.check_model(path)
