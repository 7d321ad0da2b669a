"""A result is checked before it has its name: its input, and whether the runtime opens it."""

from __future__ import annotations

import logging
import os

import onnx
import pytest

from onnx_woq.engine.verify import verify
from onnx_woq.errors import BrokenResult, InputChanged
from onnx_woq.graph.io.model import load
from tests.zoo.nodes import graph, linear, node, random, value, write


def unknown(path, *names):
    """A model that no runtime opens: its nodes are of an operator that does not exist."""
    nodes = [node("Nonesuch", ["x"], [f"y{i}"], name=name, domain="elsewhere") for i, name in enumerate(names)]
    outputs = [value(f"y{i}") for i in range(len(names))]
    return write(path, graph(nodes, [value("x", (3, 4))], outputs), domains={"elsewhere": 1})


@pytest.fixture
def source(tmp_path):
    return linear(tmp_path / "m.onnx", random(64, 48))


def test_a_result_that_opens(source, tmp_path):
    verify(linear(tmp_path / "q.onnx", random(64, 48)), tmp_path / "out.onnx", load(source))


def test_one_that_does_not_is_named_with_its_node(source, tmp_path):
    (tmp_path / "private").mkdir()
    broken = unknown(tmp_path / "private" / "q.onnx", "first", "second")
    with pytest.raises(BrokenResult) as caught:
        verify(broken, tmp_path / "out.onnx", load(source))
    message = str(caught.value)
    assert f"{tmp_path / 'out.onnx'} was not written" in message
    assert "Nonesuch" in message
    assert "(node 'first')" in message
    assert "private" not in message, "nobody knows that folder"
    verify(broken, tmp_path / "out.onnx", load(source), opens=False)


def test_a_node_that_the_runtime_names_is_not_named_twice(source, tmp_path):
    proto = onnx.load(linear(tmp_path / "q.onnx", random(64, 48), name="the_node"))
    proto.graph.node[0].input.append("W")
    onnx.save(proto, tmp_path / "q.onnx")
    with pytest.raises(BrokenResult, match="the_node") as caught:
        verify(tmp_path / "q.onnx", tmp_path / "out.onnx", load(source))
    assert "(node 'the_node')" not in str(caught.value)


def test_where_the_float_model_does_not_open_either_the_log_says_so(tmp_path, caplog):
    model = unknown(tmp_path / "m.onnx", "first")
    with caplog.at_level(logging.WARNING):
        verify(model, tmp_path / "out.onnx", load(model))
    assert f"{model} cannot be run" in caplog.text
    assert f"{tmp_path / 'out.onnx'} was not checked" in caplog.text


@pytest.mark.parametrize("opens", [False, True])
def test_a_changed_input_comes_first(opens, source, tmp_path):
    model = load(source)
    os.utime(source, ns=(1, 1))
    with pytest.raises(InputChanged, match=r"m\.onnx was changed"):
        verify(tmp_path / "no such file", tmp_path / "out.onnx", model, opens=opens)
