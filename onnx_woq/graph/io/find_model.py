"""The search for the .onnx file that a path names."""

from __future__ import annotations

from pathlib import Path

from onnx_woq.errors import ModelError


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
