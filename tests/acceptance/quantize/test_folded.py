"""Weights behind nodes that compute them from constants: constants all of them, and quantized as such."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import BOOL, INT64, graph, node, random, value, write

EIGHT = {"spec": Spec(8, 16), "accuracy_level": 0}
W = zoo.weight(1, 64, 48)
X = [{"x": zoo.correlated(seed, 20, 64)} for seed in range(2)]
CUT = {"starts": np.array([1]), "ends": np.array([65]), "axes": np.array([0])}

# what stands in between -> (nodes that make w, constants)
BETWEEN = {
    "Reshape": ([node("Reshape", ["a", "s"], ["w"])], {"a": W.ravel(), "s": np.array([64, 48])}),
    "Squeeze": ([node("Squeeze", ["a", "s"], ["w"])], {"a": W[None], "s": np.array([0])}),
    "Unsqueeze": ([node("Unsqueeze", ["a", "s"], ["u"]), node("Squeeze", ["u", "s"], ["w"])],
                  {"a": W, "s": np.array([0])}),
    "Gather": ([node("Gather", ["a", "s"], ["w"], axis=0)], {"a": np.stack([W + 1, W]), "s": np.array(1)}),
    "Split": ([node("Split", ["a"], ["v", "w"], axis=1, num_outputs=2)], {"a": np.concatenate([W + 1, W], 1)}),
    "Slice": ([node("Slice", ["a", *CUT], ["w"])], {"a": np.concatenate([W[:1], W]), **CUT}),
    "Concat": ([node("Concat", ["a", "b"], ["w"], axis=0)], {"a": W[:32], "b": W[32:]}),
    "Mul": ([node("Mul", ["a", "s"], ["w"])], {"a": W, "s": np.float32(2)}),
    "Sub": ([node("Sub", ["a", "s"], ["w"])], {"a": W, "s": np.float32(0.1)}),
    "a Transpose behind a Reshape": (
        [node("Reshape", ["a", "s"], ["r"]), node("Transpose", ["r"], ["w"], perm=[1, 0])],
        {"a": W.T.ravel(), "s": np.array([48, 64])},
    ),
    "fake quantization": (
        [node("QuantizeLinear", ["a", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["w"])],
        {"a": W, "s": np.float32(0.004), "z": np.int8(0)},
    ),
    "a Constant node": (
        [node("Constant", [], ["a"], value=onnx.numpy_helper.from_array(W.ravel())),
         node("Reshape", ["a", "s"], ["w"])],
        {"s": np.array([64, 48])},
    ),
}  # fmt: skip


def product(path, nodes, constants, *, external=False):
    tensors = {name: np.asarray(array) for name, array in constants.items()}
    made = [*nodes, node("MatMul", ["x", "w"], ["y"], name="product")]
    main = graph(made, [value("x", ("b", 64))], [value("y", ("b", 48))], tensors)
    write(path, main, opset=18)
    if external:  # shapes stay inside, where runtimes want them
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=1024)
    return path


def as_written(path):
    """A session that fuses nothing: others multiply by the codes of fake quantization, with int8 activations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_follows_from_constants_is_quantized(name, external, method, tmp_path):
    (tmp_path / "in").mkdir()
    model, out = product(tmp_path / "in" / "m.onnx", *BETWEEN[name], external=external), tmp_path / "q.onnx"
    promised = inspect(model, Recipe(method, **EIGHT))
    report = quantize(model, out, Recipe(method, **EIGHT), X)
    assert [row.nodes for row in report.groups] == [("y",)]
    assert promised.bytes_after == pytest.approx(report.bytes_after, abs=256)
    assert [n.op_type for n in onnx.load(out).graph.node] == ["MatMulNBits"], "and nothing of it stays"
    assert measure.sqnr(*(measure.run(path, X)["y"] for path in (model, out))) > 33


@pytest.mark.parametrize("name", BETWEEN)
def test_one_that_is_left_out_computes_the_same(name, tmp_path):
    model, out = product(tmp_path / "m.onnx", *BETWEEN[name]), tmp_path / "q.onnx"
    quantize(model, out, Recipe("rtn", exclude=("product",)))
    wanted = np.concatenate([as_written(model).run(None, x)[0] for x in X])
    np.testing.assert_allclose(measure.run(out, X)["y"], wanted, rtol=1e-5, atol=1e-6)


def test_parts_of_one_constant_and_parts_that_two_products_share(tmp_path):
    """q, k and v in one: each product reads a part, and the first two the same one, by nodes of their own."""
    nodes = [node("Split", ["a"], [f"w{i}", f"v{i}", f"u{i}"], axis=1, num_outputs=3) for i in (0, 1)]
    nodes += [node("MatMul", ["x", w], [y]) for w, y in (("w0", "y0"), ("w1", "y1"), ("v1", "y2"), ("u0", "y3"))]
    stacked = {"a": random(64, 144)}
    outputs = [value(f"y{i}") for i in range(4)]
    model = write(tmp_path / "m.onnx", graph(nodes, [value("x", ("b", 64))], outputs, stacked), opset=18)
    (row,) = quantize(model, tmp_path / "q.onnx", Recipe("rtn", **EIGHT)).groups
    assert (row.n, row.bytes_before) == (144, 64 * 144 * 4)
    for name, array in measure.run(model, X).items():
        assert measure.sqnr(array, measure.run(tmp_path / "q.onnx", X)[name]) > 33


def test_in_a_body(tmp_path):
    def branch(name, sign):
        nodes = [node("Reshape", ["a", f"s{name}"], [f"w{name}"]), node("MatMul", ["x", f"w{name}"], [f"h{name}"])]
        return graph([*nodes, node(sign, [f"h{name}"], [name])], [], [value(name)], {f"s{name}": np.array([64, 48])})

    choice = node("If", ["c"], ["y"], then_branch=branch("p", "Neg"), else_branch=branch("q", "Abs"))
    inputs = [value("x", ("b", 64)), value("c", (), BOOL)]
    main = graph([choice], inputs, [value("y", ("b", 48))], {"a": W.ravel()})
    model, data = write(tmp_path / "m.onnx", main), [x | {"c": np.array(i == 0)} for i, x in enumerate(X)]
    report = quantize(model, tmp_path / "q.onnx", Recipe("gptq", **EIGHT), data)
    assert sum(len(row.nodes) for row in report.groups) == 2
    assert measure.sqnr(*(measure.run(path, data)["y"] for path in (model, tmp_path / "q.onnx"))) > 33


def test_a_table(tmp_path):
    nodes = [node("Reshape", ["a", "s"], ["w"]), node("Gather", ["w", "ids"], ["y"])]
    constants = {"a": random(512 * 64), "s": np.array([512, 64])}
    model = write(tmp_path / "m.onnx", graph(nodes, [value("ids", ("n",), INT64)], [value("y")], constants))
    (row,) = quantize(model, tmp_path / "q.onnx", Recipe("rtn", embedding=Spec(8, 32))).embeddings
    assert (row.n, row.k) == (512, 64)


NEVER = {
    "random": ([node("RandomNormalLike", ["a"], ["w"])], {"a": W}, "both inputs are computed"),
    "larger": (
        [node("Tile", ["a", "s"], ["w"])],
        {"a": W[:32], "s": np.array([2, 1])},
        "by Tile: computed, it takes more bytes",
    ),
    "codes": (
        [node("DequantizeLinear", ["a", "s"], ["w"])],
        {"a": np.ones((64, 48), np.int8), "s": np.float32(0.1)},
        "quantized already",
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_folded_says_why(name, tmp_path):
    nodes, constants, reason = NEVER[name]
    rows = {row.name: row.reason for row in inspect(product(tmp_path / "m.onnx", nodes, constants)).skipped}
    assert reason in rows["y"]


def test_nothing_is_computed_when_a_model_is_loaded(tmp_path, monkeypatch):
    from onnx.reference import ReferenceEvaluator

    from onnx_woq.graph.io.model import load

    model = product(tmp_path / "m.onnx", *BETWEEN["Mul"])
    monkeypatch.setattr(ReferenceEvaluator, "run", lambda *_: pytest.fail("it was computed"))
    load(model)
    inspect(model)
