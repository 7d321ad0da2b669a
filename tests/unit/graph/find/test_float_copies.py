"""Float weights that stay beside their codes: named, with their bytes, the same before and after lowering."""

from __future__ import annotations

from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import FLOAT16, INT64, graph, lower, node, random, value, write

W = random(40, 40)


def model(tmp_path, nodes, outputs, weights, inputs):
    return load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value(name) for name in outputs], weights)))


def test_float_copies_that_stay(tmp_path):
    nodes = [
        node("Gather", ["E", "i"], ["e"]),
        node("MatMul", ["e", "W"], ["h"], name="body"),
        node("MatMul", ["h", "V"], ["g"], name="other"),
        node("Neg", ["V"], ["v"]),
        node("Gemm", ["g", "E"], ["y"], transB=1, name="head"),
    ]
    weights = {"E": random(70, 40), "W": W, "V": random(40, 40)}
    m = model(tmp_path, nodes, ["y", "v"], weights, [value("i", (3,), INT64)])
    groups, _ = find_linear_groups(m, Recipe())
    copies = {"E": 70 * 40 * 4, "V": 40 * 40 * 4}
    assert float_copy_bytes(m, groups) == copies
    assert float_copy_bytes(m, groups[:1]) == {}
    lower(m)
    assert float_copy_bytes(m, groups) == copies, "the same after lowering"
    assert sorted(n for n in m.ir.graph.initializers if n in "EWV") == ["E", "V"]


def test_a_weight_that_is_an_output_of_the_model_stays(tmp_path):
    m = model(tmp_path, [node("MatMul", ["x", "W"], ["y"])], ["y", "W"], {"W": W}, [value("x", ("m", 40))])
    assert float_copy_bytes(m, find_linear_groups(m, Recipe())[0]) == {"W": W.nbytes}


def test_a_product_that_stays_float_keeps_its_weight_for_the_others(tmp_path):
    nodes = [node("MatMul", [x, "W"], [f"y{x}"], name=f"by_{x}") for x in "ab"]
    m = model(tmp_path, nodes, ["ya", "yb"], {"W": W}, [value(x, ("m", 40)) for x in "ab"])
    assert float_copy_bytes(m, find_linear_groups(m, Recipe())[0]) == {}
    assert float_copy_bytes(m, find_linear_groups(m, Recipe(exclude=("by_b",)))[0]) == {"W": W.nbytes}


def test_bytes_are_those_that_are_stored(tmp_path):
    """A weight of half precision that is cast before it is read takes two bytes a number."""
    nodes = [
        node("Cast", ["W"], ["wide"], to=1),
        node("MatMul", ["x", "wide"], ["y"]),
        node("Cast", ["W"], ["z"], to=FLOAT16),
    ]
    m = model(tmp_path, nodes, ["y", "z"], {"W": W.astype("float16")}, [value("x", ("m", 40))])
    assert float_copy_bytes(m, find_linear_groups(m, Recipe())[0]) == {"W": 2 * W.size}
