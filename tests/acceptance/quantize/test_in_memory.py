"""Models in memory do what their files do; models with operators of other libraries run with those."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime_extensions import get_library_path

from onnx_woq import OnnxWoqError, Recipe, Spec, evaluate, inspect, quantize, tune
from tests.support import measure
from tests.zoo import small as zoo

FOUR_BITS = {"q4": Recipe("rtn", Spec(4, 32))}


@pytest.mark.parametrize("form", [onnx.load, ir.load])
def test_a_model_in_memory_is_as_good_as_its_file(form, enc, enc_data, tmp_path):
    model = form(enc)
    rows = [(row.name, row.spec) for row in inspect(enc).weights]
    assert [(row.name, row.spec) for row in inspect(model).weights] == rows
    recipe = Recipe("gptq", nsamples=8)
    quantize(enc, tmp_path / "a.onnx", recipe, enc_data)
    quantize(model, tmp_path / "b.onnx", recipe, enc_data)
    quantize(model, tmp_path / "again" / "b.onnx", recipe, enc_data)
    wanted, got = measure.decoded(tmp_path / "a.onnx"), measure.decoded(tmp_path / "b.onnx")
    assert all(np.array_equal(got[name], w) for name, w in wanted.items())
    assert measure.digest(tmp_path / "b.onnx") == measure.digest(tmp_path / "again" / "b.onnx")
    assert evaluate(form(tmp_path / "b.onnx"), model, enc_data) == evaluate(tmp_path / "b.onnx", enc, enc_data)
    result = tune(model, None, enc_data, configs=FOUR_BITS, output=tmp_path / "out")
    assert result.path == tmp_path / "out" / "model.onnx"
    measure.session(result.path)


def test_what_a_model_in_memory_lacks_is_said(tmp_path):
    zoo.encoder(tmp_path / "m.onnx", external="m.data")
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(OnnxWoqError, match=r"'m\.data' and does not say in which folder"):
        quantize(bare, tmp_path / "q.onnx")


def with_contrib(path):
    """x -> ·W -> NegPos of onnxruntime-extensions -> ·V."""
    net = zoo.Net()
    h = net.matmul("x", zoo.weight(1, 64, 96), "h")
    net.nodes.append(onnx.helper.make_node("NegPos", [h], ["n", "p"], domain="ai.onnx.contrib"))
    net.matmul("p", zoo.weight(2, 96, 48), "y")
    shapes = ({"x": (zoo.F32, ["b", 64])}, {"y": (zoo.F32, ["b", 48])})
    return net.save(path, *shapes, domains=["ai.onnx.contrib"], check=False)


def test_operators_of_other_libraries(tmp_path, cli):
    model, library = with_contrib(tmp_path / "m.onnx"), get_library_path()
    np.savez(tmp_path / "x.npz", x=zoo.correlated(1, 40, 64))
    np.savez(tmp_path / "e.npz", x=zoo.correlated(2, 9, 64))
    gptq = ("--algorithm", "GPTQ", "--calib", tmp_path / "x.npz", "--samples", 16)
    refused = cli("quantize", model, "-o", tmp_path / "q.onnx", *gptq)
    assert refused.exit_code == 2
    assert "NegPos" in refused.stderr
    assert "--custom-ops" in refused.stderr
    cli.ok("quantize", model, "-o", tmp_path / "q.onnx", *gptq, "--custom-ops", library)
    flags = ("--data", tmp_path / "e.npz", "--custom-ops", library)
    found = cli.json("evaluate", tmp_path / "q.onnx", "--reference", model, *flags)
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    feed = {"x": np.load(tmp_path / "e.npz")["x"]}
    want, have = (ort.InferenceSession(str(p), options).run(None, feed)[0] for p in (model, tmp_path / "q.onnx"))
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((want**2).sum() / ((want - have) ** 2).sum()), abs=0.01)
    missing = cli("evaluate", tmp_path / "q.onnx", "--reference", model, *flags[:2], "--custom-ops", tmp_path / "no.so")
    assert missing.exit_code == 2
    assert "no.so" in missing.stderr


def test_trials_with_operators_of_other_libraries(tmp_path):
    model, data = with_contrib(tmp_path / "m.onnx"), [zoo.correlated(i, 9, 64) for i in range(24)]
    result = tune(model, None, data, configs=FOUR_BITS, custom_ops=get_library_path(), output=tmp_path / "t.onnx")
    assert [trial.error for trial in result.trials] == [""]
    assert result.met


@pytest.mark.slow  # starts a process
def test_a_worker_registers_them_too(tmp_path, processes):
    model, data = with_contrib(tmp_path / "m.onnx"), [zoo.correlated(i, 9, 64) for i in range(24)]
    options = {"configs": FOUR_BITS, "custom_ops": get_library_path(), "objective": "best", "executor": processes}
    result = tune(model, None, data, **options)
    assert [trial.error for trial in result.trials] == [""]
