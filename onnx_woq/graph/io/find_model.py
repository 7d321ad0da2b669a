"""The model file that a path names."""

from __future__ import annotations

from pathlib import Path

from onnx_woq.errors import ModelError


def find_model(path: str | Path) -> Path:
    """The .onnx file that `path` names: the file itself, or the only (or `model.onnx`) one in a folder.

    Raises:
        ModelError: nothing there, or several candidates.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.onnx"))
    if path / "model.onnx" in found:
        return path / "model.onnx"
    if len(found) == 1:
        return found[0]
    what = "several .onnx files: name one of them" if found else "no .onnx file"
    raise ModelError(f"{path} is a folder with {what}")
