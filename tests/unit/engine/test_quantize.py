"""What the corridor says of itself."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine import metadata
from onnx_woq.engine import quantize as pipeline
from onnx_woq.engine.executors import Serial
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import graph, node, random, value, write


@pytest.mark.parametrize(("installed", "warned"), [("1.23.2", True), ("1.24.0", False), ("1.31.1", False)])
def test_a_runtime_too_old_for_the_result_is_named(installed, warned, tmp_path, caplog, monkeypatch):
    main = graph(
        [node("MatMul", ["x", "W"], ["y"])], [value("x", ("t", 64))], [value("y", ("t", 8))], {"W": random(64, 8)}
    )
    path = write(tmp_path / "m.onnx", main)
    monkeypatch.setattr(metadata, "version_of", lambda _: installed)
    with caplog.at_level(logging.WARNING):
        pipeline.quantize(path, tmp_path / "q.onnx", Recipe("rtn", Spec(bits=2)))
    assert ("needs onnxruntime 1.24" in caplog.text) == warned


def test_the_result_does_not_depend_on_how_many_taps_are_solved_at_a_time(tmp_path):
    """Solving side by side and one after the other write the same bytes."""
    nodes = [node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(6)]
    weights = {f"W{i}": random(48, 48, seed=i) for i in range(6)}
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x0", ("t", 48))], [value("x6", ("t", 48))], weights))
    data = [{"x0": np.random.default_rng(i).standard_normal((64, 48)).astype(np.float32)} for i in range(2)]
    written = []
    for executor in (Serial(), ThreadPoolExecutor(4)):
        for method in ("gptq", "awq"):
            pipeline.quantize(path, tmp_path / "q.onnx", Recipe(method), data, executor=executor)
            written.append([(tmp_path / name).read_bytes() for name in ("q.onnx", "q.onnx.data")])
    assert written[0] == written[2]
    assert written[1] == written[3]
