"""Settings of the whole suite, one thread per process and no telemetry, and shared models, made once."""

from __future__ import annotations

import tests.support.inherited  # noqa: F401, isort: skip (before numpy, and before anything starts a process)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import measure
from tests.zoo import small as zoo


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of models that no test may change; a changed one fails the run."""
    folder = tmp_path_factory.mktemp("shelf")
    yield folder
    changed = [p.name for p in folder.glob("*.onnx") if measure.digest(p) != (p.with_suffix(".sha")).read_text()]
    assert not changed, f"input models were modified: {changed}"


def _on_shelf(folder: Path, build: Callable[..., Path], name: str, **options: Any) -> Path:
    path = folder / f"{name}.onnx"
    build(path, **options)
    path.with_suffix(".sha").write_text(measure.digest(path))
    return path


@pytest.fixture(scope="session")
def lm(shelf: Path) -> Path:
    """A two-layer causal language model."""
    return _on_shelf(shelf, zoo.language_model, "lm")


@pytest.fixture(scope="session")
def tied_lm(shelf: Path) -> Path:
    """The same with a head that is the embedding transposed."""
    return _on_shelf(shelf, zoo.language_model, "tied", tied=True)


@pytest.fixture(scope="session")
def enc(shelf: Path) -> Path:
    """An encoder with a float input."""
    return _on_shelf(shelf, zoo.encoder, "enc")


@pytest.fixture(scope="session")
def lm_data() -> list[dict[str, np.ndarray]]:
    """16 calibration samples of 24 tokens for the language models."""
    return zoo.lm_feeds(zoo.token_ids(16))


@pytest.fixture(scope="session")
def enc_data() -> list[dict[str, np.ndarray]]:
    """12 calibration samples for the encoder."""
    return zoo.float_feeds(12)
