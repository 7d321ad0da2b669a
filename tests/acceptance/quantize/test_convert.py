"""Old opsets, initializers that are inputs, double precision: refused by name, and the way out that is named works."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_woq import Recipe, Spec, convert, evaluate, inspect, quantize, tune
from onnx_woq.errors import ModelError, NothingToQuantize, OnnxWoqError
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, random, value, write

EIGHT = Recipe("rtn", Spec(8, 16), accuracy_level=0)
X = {"x": random(6, 64)}


def old(path, opset):
    """Softmax, Squeeze, Unsqueeze, ReduceSum and Clip, all of which meant or looked something else by then."""
    nodes = [
        node("MatMul", ["x", "W"], ["h"], name="first"),
        node("Unsqueeze", ["h"], ["u"], axes=[0]),
        node("Softmax", ["u"], ["p"], axis=2),
        node("Squeeze", ["p"], ["s"], axes=[0]),
        node("Gemm", ["s", "V", "c"], ["g"], name="second", transB=1),
        node("ReduceSum", ["g"], ["sum"], axes=[1], keepdims=1),
        node("Add", ["g", "sum"], ["y"]),
    ]
    weights = {"W": zoo.weight(1, 64, 48), "V": random(32, 48, seed=2), "c": random(32, seed=3)}
    inputs = [value("x", ("b", 64)), *(value(name, array.shape) for name, array in weights.items())]
    main = graph(nodes, inputs, [value("y", ("b", 32))], weights)
    model = onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=3)
    path.write_bytes(model.SerializeToString())
    return path


def doubles(path):
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Cast", ["n"], ["d"], to=TensorProto.DOUBLE)]
    nodes += [node("Mul", ["h", "d"], ["y"])]
    inputs = [value("x", ("b", 64), TensorProto.DOUBLE), value("n", (), TensorProto.INT64)]
    outputs = [value("y", ("b", 48), TensorProto.DOUBLE), value("h", ("b", 48), TensorProto.DOUBLE)]
    return write(path, graph(nodes, inputs, outputs, {"W": random(64, 48).astype(np.float64)}))


def test_one_flag_is_enough(tmp_path, cli):
    """The result is that of the model that `convert` writes, and is judged against the old file itself."""
    model = old(tmp_path / "m.onnx", 11)
    convert(model, tmp_path / "new")
    quantize(tmp_path / "new", tmp_path / "expected.onnx", EIGHT)
    flags = ("--bits", 8, "--group-size", 16, "--accuracy-level", 0, "--convert")
    told = cli.ok("quantize", model, "-o", tmp_path / "q.onnx", *flags)
    assert "the opset is 13 instead of 11" in told.stderr
    expected, found = measure.decoded(tmp_path / "expected.onnx"), measure.decoded(tmp_path / "q.onnx")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], one) for name, one in expected.items())
    assert inspect(model, EIGHT, convert=True).bytes_after == inspect(tmp_path / "new", EIGHT).bytes_after
    assert evaluate(tmp_path / "q.onnx", model, [X]).sqnr_db > 33
    tuned = tune(model, None, [X] * 8, configs=[EIGHT], output=tmp_path / "t.onnx", convert=True)
    assert (tuned.met, tuned.model) == (True, model)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_wrong_with_a_converted_model_is_said_of_the_one_that_was_given(tmp_path):
    main = graph([node("Relu", ["x"], ["y"])], [value("x", ("b", 8))], [value("y", ("b", 8))])
    model = write(tmp_path / "m.onnx", main)
    with pytest.raises(NothingToQuantize, match=f"^{re.escape(str(model))} has no MatMul"):
        quantize(model, tmp_path / "q.onnx", convert=True)


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_an_old_opset(opset, tmp_path, cli):
    model, new, out = old(tmp_path / "m.onnx", opset), tmp_path / "new.onnx", tmp_path / "q.onnx"
    with pytest.raises(ModelError, match=f"opset {opset}, older than 13: give --convert"):
        quantize(model, out, EIGHT)
    told = cli.ok("convert", model, "-o", new)
    assert f"the opset is 13 instead of {opset}" in told.stderr
    assert "3 initializers" in told.stderr
    (wanted,), (found,) = (measure.session(path).run(None, X) for path in (model, new))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert sum(len(row.nodes) for row in quantize(new, out, EIGHT).groups) == 2
    assert measure.sqnr(wanted, measure.session(out).run(None, X)[0]) > 33


def test_older_still_is_refused(tmp_path, cli):
    told = cli("convert", old(tmp_path / "m.onnx", 6), "-o", tmp_path / "new.onnx")
    assert told.exit_code == 2
    assert "opset 6, older than 7: export it with a newer opset" in told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_weights_that_callers_may_override(tmp_path):
    weight = random(64, 48)
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", ("b", 64)), value("W", (64, 48))], [value("y")],
                 {"W": weight})  # fmt: skip
    model = write(tmp_path / "m.onnx", main)
    (left,) = inspect(model).skipped
    assert "--convert makes it a constant" in left.reason
    assert convert(model, tmp_path / "new.onnx") == ["1 initializers that were inputs as well are constants now"]
    assert [v.name for v in onnx.load(tmp_path / "new.onnx").graph.input] == ["x"]
    assert len(quantize(tmp_path / "new.onnx", tmp_path / "q.onnx").groups) == 1


def test_double_precision(tmp_path):
    model, new, out = doubles(tmp_path / "m.onnx"), tmp_path / "new.onnx", tmp_path / "q.onnx"
    (left,) = inspect(model).skipped
    assert "double" in left.reason
    assert "--convert makes it float32" in left.reason
    convert(model, new)
    feed = {"x": X["x"].astype(np.float64), "n": np.array(3)}
    wanted = measure.session(model).run(None, feed)
    quantize(new, out, EIGHT)
    for path, least in ((new, 100), (out, 33)):
        session = measure.session(path)
        assert {one.type for one in session.get_inputs()} == {"tensor(double)", "tensor(int64)"}
        found = session.run(None, feed)
        assert [array.dtype for array in found] == [np.float64, np.float64]
        assert all(measure.sqnr(a, b) > least for a, b in zip(wanted, found, strict=True))


def test_a_model_of_today_is_written_as_it_was(tmp_path):
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", ("b", 64))], [value("y")], {"W": random(64, 48)})
    model = write(tmp_path / "m.onnx", main)
    assert convert(model, tmp_path / "new.onnx") == []
    (wanted,), (found,) = (measure.session(path).run(None, X) for path in (model, tmp_path / "new.onnx"))
    np.testing.assert_array_equal(found, wanted)
    before = measure.listing(tmp_path)
    with pytest.raises(OnnxWoqError, match="never modified"):
        convert(model, model)
    assert measure.listing(tmp_path) == before
