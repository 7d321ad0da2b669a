"""A result takes its place only if ONNX Runtime opens it."""

from __future__ import annotations

import logging

import onnx
import onnxruntime as ort
import pytest

from onnx_woq import quantize, tune
from onnx_woq.engine import execute, verify
from onnx_woq.errors import BrokenResult, NothingToQuantize
from tests.support import measure
from tests.zoo.nodes import graph, linear, node, random, value, write


@pytest.fixture
def broken(monkeypatch):
    """A fault of the program: it writes an operator that does not exist."""
    real = execute.apply_solution

    def applied(plan, weight, solved):
        row = real(plan, weight, solved)
        for one in plan.model.ir.graph:
            if one.op_type == "MatMulNBits":
                one.op_type = "MatMulNoBits"
        return row

    monkeypatch.setattr(execute, "apply_solution", applied)


def odd(folder, nodes, **options):
    """A model with a MatMul and the given nodes from h to y."""
    main = graph(
        [node("MatMul", ["x", "W"], ["h"], name="mm"), *nodes],
        [value("x", (3, 64))],
        [value("y", (3, 48))],
        {"W": random(64, 48)},
    )
    return write(folder / "m.onnx", main, **options)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_result_that_does_not_open_is_not_written(existing, broken, cli, tmp_path):
    model, out = linear(tmp_path / "m.onnx", random(64, 48), name="the_node"), tmp_path / "out" / "q.onnx"
    if existing:
        out.parent.mkdir()
        out.write_bytes(b"what was there before")
    before = measure.listing(tmp_path)
    with pytest.raises(BrokenResult, match=r"q\.onnx.*the_node.*fault of onnx-woq"):
        quantize(model, out)
    assert measure.listing(tmp_path) == before
    result = cli("quantize", model, "-o", out)
    assert result.exit_code == 2
    assert "the_node" in result.stderr
    assert measure.listing(tmp_path) == before


def test_without_verification_it_is_written(broken, cli, tmp_path):
    model = linear(tmp_path / "m.onnx", random(64, 48))
    quantize(model, tmp_path / "a.onnx", verify=False)
    assert cli("quantize", model, "-o", tmp_path / "b.onnx", "--no-verify").exit_code == 0
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()


def test_what_tune_delivers_is_opened_too(broken, tmp_path):
    """Trials fail one by one, each with its reason, whatever the user's metric thinks of their files."""
    model = linear(tmp_path / "m.onnx", random(64, 48), name="the_node")
    before = measure.listing(tmp_path)
    found = tune(model, lambda path: 1.0, output=tmp_path / "q.onnx", configs=["RTN_G32ASYM"])
    assert (found.best, found.path) == (None, None)
    assert "the_node" in found.trials[0].error
    assert found.trials[0].status == "fault", "of this program, not of the configuration"
    assert measure.listing(tmp_path) == before
    found = tune(model, lambda path: 1.0, output=tmp_path / "q.onnx", configs=["RTN_G32ASYM"], verify=False)
    assert found.path == tmp_path / "q.onnx"


@pytest.mark.parametrize("kind", ["unknown operator", "missing kernel"])
def test_a_float_model_that_does_not_open_is_not_the_results_fault(kind, cli, tmp_path, caplog):
    """The runtime that the user has in mind may know the operator: the work is done, and said to be unchecked."""
    nodes = [node("Magic", ["h"], ["y"], name="the_odd_one", domain="elsewhere")]
    domains = {"elsewhere": 1}
    if kind == "missing kernel":
        nodes = [
            node("Cast", ["h"], ["half"], to=onnx.TensorProto.BFLOAT16),
            node("Erf", ["half"], ["d"], name="the_odd_one"),
            node("Cast", ["d"], ["one"], to=onnx.TensorProto.FLOAT),
            node("Add", ["h", "one"], ["y"]),
        ]
    model = odd(tmp_path, nodes, domains=domains)
    with pytest.raises(Exception, match=r"Magic|Erf"):
        ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with caplog.at_level(logging.WARNING):
        quantize(model, tmp_path / "q.onnx")
    assert "m.onnx cannot be run" in caplog.text
    assert "was not checked" in caplog.text
    assert "MatMulNBits" in {one.op_type for one in onnx.load(tmp_path / "q.onnx").graph.node}
    assert cli("quantize", model, "-o", tmp_path / "r.onnx").exit_code == 0


def test_one_session_for_each_file_that_is_written(monkeypatch, tmp_path):
    made = []
    real = ort.InferenceSession.__init__

    def counted(self, *args, **kwargs):
        made.append(args[0])
        real(self, *args, **kwargs)

    monkeypatch.setattr(ort.InferenceSession, "__init__", counted)
    model = linear(tmp_path / "m.onnx", random(64, 48))
    quantize(model, tmp_path / "q.onnx")
    assert len(made) == 1
    quantize(model, tmp_path / "r.onnx", verify=False)
    assert len(made) == 1


def test_the_file_that_is_opened_is_the_one_that_is_renamed(monkeypatch, tmp_path):
    model, seen, real = linear(tmp_path / "m.onnx", random(64, 48)), [], verify.why_not_opened

    def watched(path):
        seen.append((path.read_bytes(), path.with_name(path.name + ".data").read_bytes()))
        return real(path)

    monkeypatch.setattr(verify, "why_not_opened", watched)
    quantize(model, tmp_path / "q.onnx")
    assert seen == [((tmp_path / "q.onnx").read_bytes(), (tmp_path / "q.onnx.data").read_bytes())]


def test_nothing_to_quantize_is_said_before_anything_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(ort.InferenceSession, "__init__", lambda *_, **__: pytest.fail("a session was made"))
    main = graph([node("Relu", ["x"], ["y"])], [value("x", ("b", 8))], [value("y", ("b", 8))], {})
    with pytest.raises(NothingToQuantize):
        quantize(write(tmp_path / "m.onnx", main), tmp_path / "q.onnx")
