"""Small inputs that ask for endless work are refused by name, before it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from types import SimpleNamespace

import onnx
import pytest

from onnx_woq import inspect, quantize
from onnx_woq.engine import quantize as quantizing
from onnx_woq.errors import ModelError, OutputError
from tests.zoo.nodes import graph, linear, node, random, value, write

IMPORTS = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("l", 1)]


def calling_each_other(path, depth):
    """Each function calls the one before it twice."""
    bodies = [[node("MatMul", ["a", "a"], ["b"])]]
    bodies += [
        [node(f"f{i}", ["a"], ["c"], domain="l"), node(f"f{i}", ["c"], ["b"], domain="l")] for i in range(depth - 1)
    ]
    made = [onnx.helper.make_function("l", f"f{i}", ["a"], ["b"], body, IMPORTS) for i, body in enumerate(bodies)]
    nodes = [node("MatMul", ["x", "W"], ["h"]), node(f"f{depth - 1}", ["h"], ["y"], domain="l")]
    main = graph(nodes, [value("x", (64, 64))], [value("y")], {"W": random(64, 64)})
    return write(path, main, functions=made, domains={"l": 1})


def test_functions_that_call_each_other_are_counted_before_they_are_inlined(cli, tmp_path):
    bomb = calling_each_other(tmp_path / "m.onnx", 60)
    with pytest.raises(ModelError, match=r"576,460,752,303,423,489 nodes"):
        inspect(bomb)
    assert cli("quantize", bomb, "-o", tmp_path / "q.onnx").exit_code == 2
    assert len(inspect(calling_each_other(tmp_path / "n.onnx", 4)).skipped) == 8


@pytest.mark.parametrize("kind", ["Identity", "Cast"])
def test_long_chains_before_a_weight(kind, tmp_path):
    """Refused by name, or quantized."""
    count = 3000
    options = {"Identity": {}, "Cast": {"to": onnx.TensorProto.FLOAT}}[kind]
    names = ["W", *(f"w{i}" for i in range(count))]
    nodes = [node(kind, [names[i]], [names[i + 1]], **options) for i in range(count)]
    main = graph(
        [*nodes, node("MatMul", ["x", names[-1]], ["y"])], [value("x", (3, 64))], [value("y")], {"W": random(64, 48)}
    )
    with suppress(ModelError):
        quantize(write(tmp_path / "m.onnx", main), tmp_path / "q.onnx")
    assert {path.name for path in tmp_path.iterdir()} <= {"m.onnx", "q.onnx", "q.onnx.data"}


def test_room_is_checked_before_a_sparse_file_is_read(tmp_path, monkeypatch):
    model = linear(tmp_path / "m.onnx", random(64, 48), external=True)
    os.truncate(tmp_path / "m.onnx.data", 1 << 42)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(quantizing, "model_hash", lambda _: pytest.fail("it was read"))
    with pytest.raises(OutputError, match="needs about 4,398,"):
        quantize(model, tmp_path / "q.onnx")


@pytest.mark.parametrize("name", ["r.json", "r.toml"])
def test_recipes_that_nest_too_deeply(name, enc, cli, tmp_path):
    nested = "[" * 100_000 + "]" * 100_000
    (tmp_path / name).write_text(nested if name.endswith("json") else f"a = {nested}")
    result = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--recipe", tmp_path / name)
    assert result.exit_code == 2, result.output
    assert name in result.stderr


def test_values_of_options_that_nest_too_deeply(enc, cli, tmp_path):
    option = "block_size=" + "[" * 100_000
    result = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--method", "gptq", "--option", option)
    assert result.exit_code == 2, result.output[:500]
