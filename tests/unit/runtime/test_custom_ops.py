"""Libraries are registered inside the `with` block only, by their absolute paths."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime_extensions import get_library_path

from onnx_woq.errors import ModelError
from onnx_woq.runtime.custom_ops import custom_operators, registered
from onnx_woq.runtime.session import make_session
from tests.zoo.nodes import graph, node, value, write


def test_libraries_are_registered_in_the_block_only(tmp_path, monkeypatch):
    (tmp_path / "a.so").touch()
    (tmp_path / "b.so").touch()
    monkeypatch.chdir(tmp_path)
    assert registered() == ()
    with custom_operators("a.so"):
        assert registered() == (str(tmp_path / "a.so"),)
        with custom_operators(["a.so", tmp_path / "b.so"]):
            assert registered() == (str(tmp_path / "a.so"), str(tmp_path / "b.so"))
        assert registered() == (str(tmp_path / "a.so"),)
        with custom_operators(None):
            assert registered() == ()
    assert registered() == ()
    with pytest.raises(ModelError, match=r"no library of custom operators at .*c\.so"), custom_operators("c.so"):
        raise AssertionError("not reached")


def test_sessions_know_the_operators_of_the_block(tmp_path):
    main = graph(
        [node("NegPos", ["x"], ["n", "p"], domain="ai.onnx.contrib")],
        [value("x", ("b",))],
        [value("n", ("b",)), value("p", ("b",))],
    )
    path = write(tmp_path / "m.onnx", main, domains={"ai.onnx.contrib": 1})
    with pytest.raises(ModelError, match=r"NegPos.*--custom-ops"):
        make_session(path)
    with custom_operators(get_library_path()):
        n, p = make_session(path).run(None, {"x": np.array([-1, 2], np.float32)})
    assert (n.tolist(), p.tolist()) == ([-1, 0], [0, 2])
    (tmp_path / "text.so").write_text("no library")
    with (
        custom_operators(tmp_path / "text.so"),
        pytest.raises(ModelError, match=r"text\.so is not a library of custom operators: \w"),
    ):
        make_session(path)
