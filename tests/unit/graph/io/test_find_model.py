"""A folder stands for its only model, or for the one that exporters call model.onnx."""

from __future__ import annotations

import pytest

from onnx_woq.errors import ModelError
from onnx_woq.graph.io.find_model import find_model


def test_a_folder_stands_for_its_only_model_or_the_one_called_model(tmp_path):
    with pytest.raises(ModelError, match=r"no \.onnx"):
        find_model(tmp_path)
    (tmp_path / "a.onnx").touch()
    assert find_model(tmp_path).name == "a.onnx"
    (tmp_path / "b.onnx").touch()
    with pytest.raises(ModelError, match="several"):
        find_model(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert find_model(tmp_path).name == "model.onnx"


def test_a_file_stands_for_itself_whatever_it_is_called_and_whether_or_not_it_is_there(tmp_path):
    assert find_model(str(tmp_path / "weights.bin")) == tmp_path / "weights.bin"


def test_models_in_folders_below_are_not_looked_for(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    (tmp_path / "model.onnx.data").touch()
    with pytest.raises(ModelError, match=r"no \.onnx file"):
        find_model(tmp_path)


def test_a_folder_that_ends_like_a_model_is_a_folder(tmp_path):
    folder = tmp_path / "m.onnx"
    folder.mkdir()
    (folder / "inner.onnx").touch()
    assert find_model(folder) == folder / "inner.onnx"
