"""ONNX's own operators may be called "ai.onnx" in nodes and imports: ONNX Runtime runs all spellings."""

from __future__ import annotations

import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

X = zoo.float_feeds(2)
MODELS = {"encoder": zoo.encoder, "branches": zoo.branches, "functions": zoo.functions, "constants": zoo.constants}


def spell(path, nodes: str, imported: str):
    """Calls ONNX's own domain `nodes` in nodes and `imported` in the imports of the model and its functions."""
    model = onnx.load(path)
    inner = [n for function in model.functions for n in function.node]
    for one in [*measure.nodes(model), *inner]:
        one.domain = one.domain or nodes
    for one in [*model.opset_import, *(o for function in model.functions for o in function.opset_import)]:
        one.domain = one.domain or imported
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize(("nodes", "imported"), [("ai.onnx", ""), ("ai.onnx", "ai.onnx"), ("", "ai.onnx")])
@pytest.mark.parametrize("name", MODELS)
def test_every_spelling_is_quantized_alike(name, nodes, imported, target, tmp_path):
    plain = MODELS[name](tmp_path / "m.onnx")
    (tmp_path / "s").mkdir()
    other = spell(MODELS[name](tmp_path / "s" / "m.onnx"), nodes, imported)
    recipe = Recipe("rtn", Spec(4, 32), embedding=Spec(4, 32), target=target)
    outs = [quantize(path, path.with_name("q.onnx"), recipe).output for path in (plain, other)]
    assert inspect(other, recipe).weights == inspect(plain, recipe).weights
    one, two = (onnx.load(path) for path in outs)
    assert two.graph == one.graph
    assert list(two.opset_import) == list(one.opset_import)


def test_both_spellings_at_once(tmp_path):
    model = spell(zoo.encoder(tmp_path / "m.onnx"), "", "")
    proto = onnx.load(model)
    proto.opset_import.add(domain="ai.onnx", version=proto.opset_import[0].version)
    model.write_bytes(proto.SerializeToString())
    quantize(model, tmp_path / "q.onnx")
    assert [o.domain for o in onnx.load(tmp_path / "q.onnx").opset_import].count("ai.onnx") == 0
    assert measure.run(tmp_path / "q.onnx", X)


def test_calibration_and_rotation_of_another_spelling(tmp_path):
    model = spell(arch.decoder(tmp_path / "m.onnx", layers=2), "ai.onnx", "ai.onnx")
    report = quantize(model, tmp_path / "q.onnx", Recipe("gptq", rotation=True, nsamples=2), "random")
    assert all(row.error is not None for row in report.groups)
