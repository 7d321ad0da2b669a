"""The real models that `make real-models` builds, and text to calibrate and judge on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def models() -> Path:
    folder = ROOT / "build" / "models"
    assert folder.is_dir(), "run `make real-models` first"
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with calib.txt and dev.txt: ONNX_WOQ_TEXT, or the text of Python's standard library."""
    if folder := os.environ.get("ONNX_WOQ_TEXT"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("text")
    subprocess.run([sys.executable, ROOT / "models" / "text.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def export_python() -> Path:
    """The Python that has optimum and torch."""
    return Path(os.environ.get("ONNX_WOQ_EXPORT_PYTHON", ROOT / ".venv-models" / "bin" / "python"))
