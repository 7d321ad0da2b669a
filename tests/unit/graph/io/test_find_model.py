"""A folder stands for its only model, or for the one that exporters call model.onnx; a model in memory for a file."""

from __future__ import annotations

import errno

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.errors import ModelError, OutputError
from onnx_woq.graph.io.find_model import find_model, model_file
from tests.zoo.chains import K, chain
from tests.zoo.nodes import random, run


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


def test_a_path_stands_for_itself(tmp_path):
    (tmp_path / "a.onnx").touch()
    for named in (tmp_path, str(tmp_path), tmp_path / "a.onnx"):
        with model_file(named) as path:
            assert path == tmp_path / "a.onnx"


@pytest.mark.parametrize("form", [onnx.load, ir.load])
@pytest.mark.parametrize("external", [False, True])
def test_a_model_in_memory_is_a_file_while_it_is_needed(external, form, tmp_path):
    original = chain(tmp_path / "m.onnx", external=external)
    model, feed = form(original), {"x": random(2, 3, K)}
    before = model.SerializeToString() if isinstance(model, onnx.ModelProto) else ir.to_proto(model).SerializeToString()
    with model_file(model) as path:
        np.testing.assert_array_equal(run(path, feed)[0], run(original, feed)[0])
        content = [file.read_bytes() for file in sorted(path.parent.iterdir())]
    assert not path.parent.exists()
    with model_file(model) as path:
        assert [file.read_bytes() for file in sorted(path.parent.iterdir())] == content, "its hash is the same again"
    after = model.SerializeToString() if isinstance(model, onnx.ModelProto) else ir.to_proto(model).SerializeToString()
    assert after == before


def test_what_is_no_model(tmp_path):
    chain(tmp_path / "m.onnx", external=True)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    lazy = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    broken = onnx.ModelProto()
    broken.graph.initializer.add(name="w", data_type=999, dims=[3])
    for model, message in (
        (bare, r"file 'm\.onnx\.data' and does not say in which folder: .*onnx\.load"),
        (lazy, r"weights from a file that is gone: .*m\.onnx\.data"),
        (broken, "not a valid ONNX model"),
        (3, "int is no model: give the path"),
        (None, "NoneType is no model"),
    ):
        with pytest.raises(ModelError, match=message), model_file(model):
            raise AssertionError("not reached")


def test_no_room_for_a_model_in_memory(tmp_path, monkeypatch):
    model = onnx.load(chain(tmp_path / "m.onnx"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR"), model_file(model):
        raise AssertionError("not reached")
