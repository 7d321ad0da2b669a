"""Models of which only a part is to be quantized: what `inspect` promises, `quantize` does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize, tune
from onnx_woq.errors import AlreadyQuantized, NothingToQuantize
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import INT64, graph, node, random, value, write

EIGHT = Spec(8, 32)
TABLES = Recipe("rtn", EIGHT, embedding=EIGHT, accuracy_level=0)
X = [{"x": zoo.correlated(seed, 30, 64)} for seed in range(2)]


def two_products(path):
    nodes = [node("MatMul", ["x", "W"], ["h"], name="body"), node("MatMul", ["h", "V"], ["y"], name="lm_head")]
    weights = {"W": zoo.weight(1, 64, 64), "V": zoo.weight(2, 64, 256)}
    return write(path, graph(nodes, [value("x", ("b", 64))], [value("y", ("b", 256))], weights), opset=21)


def table_alone(path):
    """An encoder without a product: rows of a table, summed."""
    nodes = [node("Gather", ["E", "ids"], ["rows"], name="table"), node("ReduceMean", ["rows"], ["y"], keepdims=0)]
    main = graph(nodes, [value("ids", ("s",), INT64)], [value("y", ())], {"E": random(512, 64)})
    nodes[1].attribute.append(onnx.helper.make_attribute("noop_with_empty_axes", 0))
    return write(path, main)


def operators(path):
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("second", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("first", ["matmulnbits", "qdq"])
def test_what_is_float_is_quantized_and_what_is_low_bit_stays(first, second, method, tmp_path):
    model, half, out = two_products(tmp_path / "m.onnx"), tmp_path / "half.onnx", tmp_path / "q.onnx"
    quantize(model, half, Recipe("rtn", EIGHT, target=first, accuracy_level=0, exclude=("lm_head",)))
    recipe = Recipe(method, EIGHT, target=second, accuracy_level=0)
    promised = inspect(half, recipe)
    done = quantize(half, out, recipe, X)
    assert [row.nodes for row in done.groups] == [row.nodes for row in promised.groups] == [("y",)]
    assert operators(out).count("MatMulNBits") + operators(out).count("DequantizeLinear") == 2
    before, after = (measure.run(path, X)["y"] for path in (model, out))
    assert measure.sqnr(before, after) > 33
    with pytest.raises(AlreadyQuantized):
        quantize(out, tmp_path / "again.onnx", recipe, X)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
def test_a_table_alone(target, method, tmp_path):
    model, out = table_alone(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    recipe = Recipe(method, EIGHT, embedding=EIGHT, target=target)
    promised, done = inspect(model, recipe), quantize(model, out, recipe)  # a table needs no data
    assert done.weights == promised.weights
    assert len(done.embeddings) == 1
    assert promised.bytes_after == pytest.approx(done.bytes_after, abs=256)
    assert done.bytes_after < 0.4 * done.bytes_before
    ids = {"ids": np.arange(100)}
    (wanted,), (found,) = (measure.session(path).run(None, ids) for path in (model, out))
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    with pytest.raises(NothingToQuantize, match="left float without --embedding-bits"):
        quantize(model, out, Recipe("rtn", EIGHT))


def test_tables_alone_can_be_tuned_but_not_mixed(tmp_path):
    model, data = table_alone(tmp_path / "m.onnx"), [{"ids": np.arange(i, 40 + i)} for i in range(20)]
    assert tune(model, lambda _: 1.0, data, output=tmp_path / "t.onnx", configs=[TABLES]).met
    with pytest.raises(NothingToQuantize, match="no MatMul or Gemm"):
        tune(model, lambda _: 1.0, data, output=tmp_path / "t.onnx", configs=[TABLES], target_bpw=6.0)


def test_only_the_table_is_named(tmp_path, cli):
    model, out = zoo.language_model(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    table = next(row for row in inspect(model, TABLES).embeddings)
    cli.ok("quantize", str(model), "-o", str(out), "--embedding-bits", "8", "--include", table.weight_name)
    assert "GatherBlockQuantized" in operators(out)
    assert not measure.low_bit(out)


def test_everything_left_out_by_name_gives_a_copy_and_says_so(tmp_path, cli):
    model, out = zoo.encoder(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    told = cli.ok("quantize", str(model), "-o", str(out), "--exclude", ".")
    assert "nothing is quantized" in told.stdout + told.stderr
    feeds = zoo.float_feeds(2)
    for name, array in measure.run(model, feeds).items():
        np.testing.assert_array_equal(measure.run(out, feeds)[name], array)
    report = quantize(model, tmp_path / "p.onnx", Recipe("gptq", exclude=(".",)))  # and nothing needs data
    assert report.weights == ()
    with pytest.raises(NothingToQuantize, match="not named by --include"):
        quantize(model, out, Recipe("rtn", include=("a name that nothing has",)))
