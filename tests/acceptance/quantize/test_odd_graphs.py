"""Graphs that are legal and unusual: nothing may crash, be miscounted or compute something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo import small as zoo

X = zoo.correlated(3, 9, 48)
METHODS = ("rtn", "gptq", "awq")


def same_function(model: Path, out: Path, data: list[dict[str, np.ndarray]], method: str, **options: object) -> Path:
    """Quantizes to 8 bits and holds every output against the float model's."""
    quantize(model, out, Recipe(method, Spec(8, 16), accuracy_level=0, **options), data)
    onnx.checker.check_model(str(out))
    before, after = measure.run(model, data), measure.run(out, data)
    assert list(before) == list(after)
    for name, value in before.items():
        assert measure.sqnr(value, after[name]) > 33, name
    return out


@pytest.mark.parametrize("method", METHODS)
def test_gemms_whose_bias_is_no_constant_row(method, tmp_path):
    """Computed, one per row, a whole matrix: fused only where the kernel can, added otherwise."""
    net, rng = zoo.Net(), np.random.default_rng(0)
    computed = net.op("Abs", net.const("c", rng.normal(size=24).astype(np.float32)), out="computed")
    fed = net.op("Identity", "bias", out="fed")
    biases = {
        "computed": computed,
        "fed": fed,
        "column": net.const("column", rng.normal(size=(9, 1)).astype(np.float32)),
        "matrix": net.const("matrix", rng.normal(size=(9, 24)).astype(np.float32)),
    }
    outputs = {}
    for i, (name, bias) in enumerate(biases.items()):
        net.op("Gemm", "x", net.const(f"W{i}", zoo.weight(i, 48, 24)), bias, out=f"by_{name}", beta=0.5)
        outputs[f"by_{name}"] = (zoo.F32, [9, 24])
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, [9, 48]), "bias": (zoo.F32, [24])}, outputs)
    data = [{"x": X, "bias": np.ones(24, np.float32)}]
    out = same_function(model, tmp_path / "q.onnx", data, method)
    found = inspect(model)
    linears = {name for group in found.groups for name in group.nodes}
    assert linears | {skipped.name for skipped in found.skipped} == set(outputs)
    assert len(measure.low_bit(out)) == len(linears)


def test_constant_biases_are_fused(tmp_path):
    model = zoo.gemms(tmp_path / "m.onnx")
    quantize(model, tmp_path / "q.onnx")
    kinds = [node.op_type for node in measure.nodes(onnx.load(tmp_path / "q.onnx"))]
    assert kinds == ["MatMulNBits"] * 10


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_no_linear_layer(method, tmp_path):
    """A vector, a weight on the left, double precision, integers: left alone, beside a layer that is not."""
    net = zoo.Net()
    net.matmul("x", zoo.weight(1, 48, 24), "good")
    net.op("MatMul", "x", net.const("W_vector", zoo.weight(2, 48, 1)[:, 0]), out="vector")
    net.op("MatMul", net.const("W_left", zoo.weight(3, 24, 9)), "x", out="left")
    double = net.op("Cast", "x", out="double", to=onnx.TensorProto.DOUBLE)
    net.op("MatMul", double, net.const("W_double", zoo.weight(4, 48, 24).astype(np.float64)), out="wide")
    outputs = {
        "good": (zoo.F32, [9, 24]),
        "vector": (zoo.F32, [9]),
        "left": (zoo.F32, [24, 48]),
        "wide": (onnx.TensorProto.DOUBLE, [9, 24]),
    }
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, [9, 48])}, outputs)
    out = same_function(model, tmp_path / "q.onnx", [{"x": X}], method)
    assert set(measure.low_bit(out)) == {"good"}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_also_an_output(method, tmp_path):
    net = zoo.Net()
    net.matmul("x", zoo.weight(1, 48, 24), "y", "W")
    outputs = {"y": (zoo.F32, ["b", 24]), "W": (zoo.F32, [48, 24])}
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, ["b", 48])}, outputs)
    out = same_function(model, tmp_path / "q.onnx", [{"x": X}], method)
    np.testing.assert_array_equal(measure.run(out, [{"x": X}])["W"], zoo.weight(1, 48, 24))


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_callers_may_replace_is_no_constant(method, tmp_path):
    """An initializer that is a graph input too is only a default."""
    net = zoo.Net()
    h = net.matmul("x", zoo.weight(1, 48, 40), "h")
    net.matmul(h, zoo.weight(2, 40, 24), "y", "W")
    inputs = {"x": (zoo.F32, ["b", 48]), "W": (zoo.F32, [40, 24])}
    model = net.save(tmp_path / "m.onnx", inputs, {"y": (zoo.F32, ["b", 24])})
    quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(8, 16), accuracy_level=0), [{"x": X}])
    other = zoo.weight(3, 40, 24)
    for data in ([{"x": X}], [{"x": X, "W": other}]):
        assert measure.sqnr(*(measure.run(m, data)["y"] for m in (model, tmp_path / "q.onnx"))) > 33


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exclude", [(), ("logits",)], ids=["head quantized", "head float"])
def test_an_embedding_read_through_a_transpose(exclude, method, tmp_path):
    """As onnxruntime-genai ties: the head's [H, V] is stored, the Gather reads its Transpose."""
    net = zoo.Net()
    head = net.const("head", zoo.mixing(1, zoo.HIDDEN, zoo.VOCAB) / 8)
    h = net.op("Gather", net.op("Transpose", head, out="table", perm=[1, 0]), "input_ids", out="h")
    h = net.op("Tanh", net.matmul(h, zoo.weight(2, zoo.HIDDEN, zoo.HIDDEN), "body"), out="on")
    net.op("MatMul", h, head, out="logits")
    ids = (zoo.I64, ["b", "s"])
    model = net.save(tmp_path / "m.onnx", {"input_ids": ids}, {"logits": (zoo.F32, ["b", "s", zoo.VOCAB])})
    data = [{"input_ids": row} for row in zoo.token_ids(4)]
    same_function(model, tmp_path / "q.onnx", data, method, exclude=exclude)
    copies = inspect(model, Recipe(method, exclude=exclude)).copies
    assert sum(copies.values()) == (0 if exclude else zoo.HIDDEN * zoo.VOCAB * 4)


def test_two_heads_of_one_matmul_and_a_cycle_of_names(tmp_path):
    """Names that the package might want for its own tensors are taken already."""
    net = zoo.Net()
    taken = ["W_y_Q4", "W_y_Q4_scales", "W_y_Q4_zero_points", "W_y_scales", "W_y_quantized", "y_output", "W_y_Q4_1"]
    x = "x"
    for name in taken:
        x = net.op("Add", x, net.const(name, np.full(48, 0.25, np.float32)), out=f"plus_{name}")
    net.matmul(x, zoo.weight(1, 48, 24), "y")
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, ["b", 48])}, {"y": (zoo.F32, ["b", 24])})
    for method in METHODS:
        same_function(model, tmp_path / f"{method}.onnx", [{"x": X}], method)


def test_metadata_and_documentation_of_the_model_are_kept(tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx")
    proto = onnx.load(model)
    helper.set_model_props(proto, {"author": "someone", "licence": "MIT"})
    proto.producer_name, proto.doc_string, proto.model_version = "exporter", "what it is", 7
    onnx.save(proto, model)
    quantize(model, tmp_path / "q.onnx")
    out = onnx.load(tmp_path / "q.onnx")
    properties = {p.key: p.value for p in out.metadata_props}
    assert properties["author"] == "someone"
    assert properties["licence"] == "MIT"
    assert len(properties) > 2
    assert (out.doc_string, out.model_version) == ("what it is", 7)
    assert [(i.name, i.type) for i in out.graph.input] == [(i.name, i.type) for i in proto.graph.input]
    assert [o.name for o in out.graph.output] == [o.name for o in proto.graph.output]
    assert [(i.domain, i.version) for i in out.opset_import if i.domain == ""] == [("", 17)]
    assert "com.microsoft" in {i.domain for i in out.opset_import}


@pytest.mark.parametrize("external", ["", "weights.bin"])
def test_relative_paths_and_names_with_blanks(external, tmp_path, monkeypatch, cli):
    place = tmp_path / "a folder – ünïcode"
    zoo.language_model(place / "my model.onnx", external=external)
    monkeypatch.chdir(place)
    cli.ok("quantize", "my model.onnx", "-o", "the result.onnx")
    cli.ok("quantize", "my model.onnx", "-o", "deep/down")
    monkeypatch.chdir(tmp_path)
    data = zoo.lm_feeds(zoo.token_ids(1))
    for path in (place / "the result.onnx", place / "deep" / "down" / "my model.onnx"):
        assert np.isfinite(measure.run(path, data)["logits"]).all()


def test_several_external_data_files(tmp_path):
    """One file per tensor, some in a folder below: read as they are, written as one."""
    model = zoo.language_model(tmp_path / "whole.onnx")
    proto = onnx.load(model)
    (tmp_path / "split" / "parts").mkdir(parents=True)
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > 1000:
            where = f"parts/{tensor.name}.bin" if "up" in tensor.name else f"{tensor.name}.bin"
            onnx.external_data_helper.set_external_data(tensor, where)
            (tmp_path / "split" / where).write_bytes(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "split" / "m.onnx").write_bytes(proto.SerializeToString())
    before = measure.listing(tmp_path / "split")
    data = zoo.lm_feeds(zoo.token_ids(2))
    recipe = Recipe("gptq", Spec(8, 32), exclude=("layer0.up",), accuracy_level=0)
    report = quantize(tmp_path / "split" / "m.onnx", tmp_path / "out" / "q.onnx", recipe, data)
    assert measure.sqnr(*(measure.run(m, data)["logits"] for m in (model, tmp_path / "out" / "q.onnx"))) > 33
    assert len(list((tmp_path / "out").iterdir())) <= 2
    assert measure.listing(tmp_path / "split") == before
    assert report.bytes_before == sum(p.stat().st_size for p in (tmp_path / "split").rglob("*") if p.is_file())


def test_float_data_fields_instead_of_raw_bytes(tmp_path):
    """Old exporters write weights into float_data, halves into int32_data."""
    net = zoo.Net()
    for name, kind, seed in (("W", zoo.F32, 1), ("V", zoo.F16, 2)):
        w = zoo.weight(seed, 48, 48).astype(np.float32 if kind == zoo.F32 else np.float16)
        flat = w.flatten() if kind == zoo.F32 else w.flatten().view(np.uint16)
        net.tensors.append(helper.make_tensor(name, kind, w.shape, flat.tolist() if kind == zoo.F32 else w.flatten()))
    net.op("MatMul", "x", "W", out="h")
    half = net.op("Cast", "h", out="half", to=zoo.F16)
    net.op("Cast", net.op("MatMul", half, "V", out="g"), out="y", to=zoo.F32)
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, ["b", 48])}, {"y": (zoo.F32, ["b", 48])})
    for method in METHODS:
        out = same_function(model, tmp_path / f"{method}.onnx", [{"x": X}], method)
        assert set(measure.low_bit(out)) == {"h", "g"}
