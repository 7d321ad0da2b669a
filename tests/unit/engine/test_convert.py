"""Conversion of a folder: the model under its name, with the files beside it."""

from __future__ import annotations

import onnx

from onnx_woq.engine.convert import convert
from tests.zoo.nodes import linear, random


def test_a_folder_gets_the_companions(tmp_path):
    (tmp_path / "old").mkdir()
    linear(tmp_path / "old" / "model.onnx", random(40, 8))
    (tmp_path / "old" / "config.json").write_text("{}")
    assert convert(tmp_path / "old", tmp_path / "new") == []
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"model.onnx", "config.json"}
    onnx.checker.check_model(str(tmp_path / "new" / "model.onnx"))
