"""Models that are ONNX by their form and not by their content: a ModelError in every command, nothing left behind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_woq import quantize
from onnx_woq.engine import quantize as quantizing
from onnx_woq.errors import MemoryLimit, ModelError
from tests.support import measure
from tests.zoo.nodes import graph, node, random, value, write

K, N = 64, 48


def built(path, nodes, *, weights=None, **options):
    """A model whose nodes lead from x through h, the product by W, to y."""
    main = graph(
        [node("MatMul", ["x", "W"], ["h"], name="mm"), *nodes],
        [value("x", ("m", K))],
        [value("y", None)],
        {"W": random(K, N), **(weights or {})},
    )
    return write(path, main, **options)


def cast_to_a_type_that_does_not_exist(path):
    weights = {"V": random(N, 32)}
    return built(path, [node("Cast", ["V"], ["c"], to=-4), node("MatMul", ["h", "c"], ["y"])], weights=weights)


def constant_without_an_output(path):
    return built(path, [node("Constant", [], [], value_floats=[1.0]), node("Relu", ["h"], ["y"])])


def constant_without_a_type(path):
    constant = node("Constant", [], ["c"], value=TensorProto(dims=[N, 8], raw_data=bytes(N * 8 * 4)))
    return built(path, [constant, node("MatMul", ["h", "c"], ["y"])])


def dimensions_beyond_all_numbers(path):
    tensor = TensorProto(name="V", dims=[2**62] * 20, data_type=TensorProto.FLOAT, raw_data=bytes(8))
    return built(path, [node("Add", ["h", "V"], ["y"])], weights={"V": tensor})


def dimensions_beyond_all_numbers_elsewhere(path):
    tensor = TensorProto(name="V", dims=[2**62] * 20, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, entry in {"location": "w.bin", "offset": "0", "length": "8"}.items():
        tensor.external_data.add(key=key, value=entry)
    path.with_name("w.bin").write_bytes(bytes(8))
    return built(path, [node("Add", ["h", "V"], ["y"])], weights={"V": tensor})


def a_value_that_nobody_makes(path):
    return built(
        path, [node("Add", ["h", "ghost"], ["s"]), node("MatMul", ["s", "V"], ["y"])], weights={"V": random(N, 32)}
    )


def a_value_that_nobody_makes_in_a_body(path):
    branch = graph([node("MatMul", ["ghost", "V"], ["b"])], [], [value("b", None)], {"V": random(N, 32)})
    flag = onnx.numpy_helper.from_array(np.array(True), "flag")
    nodes = [node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    return built(path, nodes, weights={"flag": flag})


def a_name_that_is_no_text(path):
    built(path, [node("ThresholdedRelu", ["h"], ["y"], name="QQQQQQ")])
    path.write_bytes(
        path.read_bytes().replace(b"ThresholdedRelu", b"Thresholded\x83\xfflu").replace(b"QQQQQQ", b"\xff\xfe\x83QQQ")
    )
    return path


def raw_data_of_an_odd_length(path):
    tensor = TensorProto(name="V", dims=[3], data_type=TensorProto.FLOAT, raw_data=bytes(7))
    return built(path, [node("Add", ["ghost", "V"], ["g"]), node("Relu", ["h"], ["y"])], weights={"V": tensor})


def a_circle(path):
    nodes = [node("Add", ["h", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "V"], ["y"])]
    return built(path, nodes, weights={"V": random(N, 32)})


def shapes_that_cannot_meet(path):
    return built(path, [node("MatMul", ["h", "V"], ["y"])], weights={"V": random(N - 1, 10**3)})


def an_ir_version_that_does_not_exist(path):
    proto = onnx.load(built(path, [node("Relu", ["h"], ["y"])]))
    proto.ir_version = 2**62
    path.write_bytes(proto.SerializeToString())
    return path


BUILDERS = [
    cast_to_a_type_that_does_not_exist,
    constant_without_an_output,
    constant_without_a_type,
    dimensions_beyond_all_numbers,
    dimensions_beyond_all_numbers_elsewhere,
    a_value_that_nobody_makes,
    a_value_that_nobody_makes_in_a_body,
    a_name_that_is_no_text,
    raw_data_of_an_odd_length,
    a_circle,
    shapes_that_cannot_meet,
    an_ir_version_that_does_not_exist,
]


@pytest.mark.parametrize("config", ["RTN_G32ASYM", "GPTQ_G32ASYM", "BEST_4BIT"])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_a_malformed_model_is_refused_by_name(build, config, cli, tmp_path):
    model, data = build(tmp_path / "m.onnx"), None if config.startswith("RTN") else "random"
    with pytest.raises(Exception):  # noqa: B017, PT011 (ONNX Runtime's exceptions have no common base)
        measure.session(model)
    before = measure.listing(tmp_path)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        quantize(model, tmp_path / "out" / "q.onnx", config, data, samples=2 if data else None)
    flags = ["--calib", "random", "--samples", 2] if data else []
    result = cli("quantize", model, "-o", tmp_path / "out" / "q.onnx", "--config", config, *flags)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert measure.listing(tmp_path) == before


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_inspect_says_so_or_shows_what_it_can(build, cli, tmp_path):
    result = cli("inspect", build(tmp_path / "m.onnx"))
    assert result.exit_code in (0, 2), result.output
    assert result.exit_code == 0 or "m.onnx" in result.stderr


def scan_with_a_parameters_name(path):
    """An attribute that names a parameter of a function where there is no function."""
    body = graph([node("Relu", ["i"], ["o"])], [value("i", [N])], [value("o", [N])])
    scan = node("Scan", ["h"], ["y"], body=body, num_scan_inputs=1)
    next(one for one in scan.attribute if one.name == "num_scan_inputs").ref_attr_name = "count"
    return built(path, [scan])


def domain_of_a_version_beyond_all(path):
    return built(path, [node("Relu", ["h"], ["y"])], domains={"unused": 2**62})


@pytest.mark.parametrize("build", [scan_with_a_parameters_name, domain_of_a_version_beyond_all])
@pytest.mark.parametrize("config", ["RTN_G32ASYM", "GPTQ_G32ASYM"])
def test_what_onnx_runtime_takes_is_taken(build, config, tmp_path):
    model, data = build(tmp_path / "m.onnx"), None if config.startswith("RTN") else "random"
    wanted = measure.session(model).run(None, {"x": random(5, K)})[0]
    quantize(model, tmp_path / "q.onnx", config, data, samples=2 if data else None)
    found = measure.session(tmp_path / "q.onnx").run(None, {"x": random(5, K)})[0]
    assert np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError("x"), TypeError("x"), ZeroDivisionError("x")], ids=repr
)
def test_a_fault_of_the_program_is_not_blamed_on_a_sane_model(error, enc, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(quantizing, "execute", fails)
    with pytest.raises(type(error)):
        quantize(enc, tmp_path / "q.onnx")
    strange = built(tmp_path / "m.onnx", [node("Magic", ["h"], ["y"], domain="elsewhere")], domains={"elsewhere": 1})
    with pytest.raises(type(error)):
        quantize(strange, tmp_path / "q.onnx")


def test_memory_that_runs_out_is_named(enc, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MemoryError("Unable to allocate 715. GiB")

    monkeypatch.setattr(quantizing, "execute", fails)
    with pytest.raises(MemoryLimit, match="715"):
        quantize(enc, tmp_path / "q.onnx")
