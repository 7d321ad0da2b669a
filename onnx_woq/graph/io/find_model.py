"""The .onnx file of a model that a user gives: by the path of the file or its folder, or as a model in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_woq.errors import ModelError, OutputError

ModelSource = str | os.PathLike[str] | onnx.ModelProto | ir.Model
"""A model as a user gives it."""


def find_model(path: str | Path) -> Path:
    """Returns the .onnx file that `path` names: a path that is no folder itself, else the file in the folder.

    In a folder that is `model.onnx`, or else its only .onnx file. Whether a file exists is not checked.

    Raises:
        ModelError: the path cannot be looked at, or the folder holds no .onnx file, or several without a `model.onnx`.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return path
    except OSError as error:  # such as a name that is too long
        raise ModelError(f"{path} cannot be read ({error.strerror}): check the path") from error
    found = sorted(path.glob("*.onnx"))
    if path / "model.onnx" in found:
        return path / "model.onnx"
    if len(found) == 1:
        return found[0]
    what = "several .onnx files: name one of them" if found else "no .onnx file"
    raise ModelError(f"{path} is a folder with {what}")


@contextmanager
def model_file(model: ModelSource) -> Iterator[Path]:
    """Yields the path of the .onnx file of a model, found as `find_model` does.

    A model in memory is written to a private temporary folder, which is removed after the `with` block.

    Raises:
        ModelError: the model is none, or a model in memory has weights in files that it does not name the folder of.
        OutputError: a model in memory cannot be written.
    """
    if isinstance(model, str | os.PathLike):
        yield find_model(Path(model))
        return
    if not isinstance(model, onnx.ModelProto | ir.Model):
        raise ModelError(
            f"{type(model).__name__} is no model: give the path of an .onnx file, an onnx.ModelProto "
            "or an onnx_ir.Model"
        )
    with tempfile.TemporaryDirectory(prefix="onnx-woq-") as folder:
        path = Path(folder) / "model.onnx"
        _write(model if isinstance(model, ir.Model) else _from_memory(model), path)
        yield path


def _from_memory(proto: onnx.ModelProto) -> ir.Model:
    """Returns a protobuf as a model of onnx_ir, which writes weights of more than 2 GB beside it."""
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir wraps whatever it meets
        raise ModelError(f"the ModelProto is not a valid ONNX model: {error}") from error
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                raise ModelError(
                    f"the ModelProto has {name!r} in the file {str(value.const_value.location)!r} and does not say in "
                    "which folder: load it with its external data (onnx.load), or give the path of the .onnx file"
                )
    return model


def _write(model: ir.Model, path: Path) -> None:
    """Writes a model in memory with its weights beside it; the model is as it was afterwards."""
    try:
        ir.save(model, path, external_data=f"{path.name}.data")
    except FileNotFoundError as error:
        raise ModelError(f"the model in memory reads its weights from a file that is gone: {error}") from error
    except OSError as error:
        raise OutputError(
            f"the model in memory cannot be written to {path.parent} ({error.strerror}): "
            "set TMPDIR to a folder with room for it"
        ) from error
    except Exception as error:  # onnx_ir wraps whatever it meets
        raise ModelError(f"the model in memory is not a valid ONNX model: {error}") from error
