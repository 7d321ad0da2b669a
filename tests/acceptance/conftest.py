"""Data as users have it, where work can be sent, and the command line under test."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.commands import Cli, spawning
from tests.zoo import small as zoo

if TYPE_CHECKING:
    import distributed


@pytest.fixture
def lm_folder(tmp_path: Path) -> Path:
    """A folder as exporters leave it: model.onnx, its tokenizer and its config files."""
    folder = tmp_path / "lm"
    zoo.language_model(folder / "model.onnx")
    zoo.byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": zoo.VOCAB}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 12 kB of English, enough for more than 100 samples of 64 bytes."""
    path = tmp_path / "calib.txt"
    lines = [f"Line {i}: {' '.join(str(v)[:60] for v in (sys.version_info, i * i, json.__doc__))}" for i in range(100)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A folder of 12 samples of 24 token ids, one .npz each."""
    return zoo.array_folder(tmp_path / "ids", "input_ids", zoo.token_ids(12))


@pytest.fixture
def xs(tmp_path: Path) -> Path:
    """A folder of 12 samples of the encoder's input."""
    return zoo.array_folder(tmp_path / "xs", "x", [feed["x"] for feed in zoo.float_feeds(12)])


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with spawning() as pool:
        yield pool


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.Client]:
    """A scheduler and two worker processes."""
    import distributed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        )
        with local, distributed.Client(local, set_as_default=False) as client:
            assert len(client.nthreads()) == 2
            yield client


@pytest.fixture
def cli() -> Cli:
    return Cli()


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for every forward pass ONNX Runtime makes in this process."""
    import onnxruntime

    calls: list[str] = []
    for name in ("run", "run_with_iobinding", "run_with_ort_values", "run_async"):
        original = getattr(onnxruntime.InferenceSession, name)

        def counted(self: Any, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(onnxruntime.InferenceSession, name, counted)
    return calls
