"""What the installed ONNX Runtime can do: Python 3.10 has none after 1.23, and skips what only newer ones run."""

from __future__ import annotations

import onnxruntime
import pytest

_OPSETS = {23: "1.23", 24: "1.24", 25: "1.24"}  # each tried; those before run everywhere


def has(version: str) -> bool:
    """Whether the installed onnxruntime is `version` ("1.24") or newer."""
    return _numbers(onnxruntime.__version__) >= _numbers(version)


def need(version: str, what: str) -> None:
    """Skips the test that calls it when the installed onnxruntime is older than `version`, the first with `what`."""
    if not has(version):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} lacks {what}, which came with {version}")


def need_opset(opset: int) -> None:
    """Skips the test that calls it when the installed onnxruntime does not run models of `opset`."""
    if opset in _OPSETS:
        need(_OPSETS[opset], f"opset {opset}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
