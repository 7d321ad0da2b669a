"""Shared models, made once, and the command line under test."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from . import measure, zoo

if TYPE_CHECKING:
    import distributed

# Hundreds of tiny models: on busy cores a second thread, waiting busily, makes each step many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("ONNX_WOQ_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]

PUBLISHED = ("RTN_G32ASYM", "GPTQ_G32ASYM", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", "GPTQ_G128ASYM", "AWQ_G32ASYM")
CONFIGS = (*PUBLISHED, "BEST_4BIT")
"""What is tried by default, in this order."""

FAMILY = tuple(f"{effort}_{bits}BIT" for bits in (4, 3, 2) for effort in ("FAST", "BALANCED", "BEST"))


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


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON: other programs cannot read it")


class Cli:
    """Runs the command line in this process."""

    def __call__(self, *arguments: object) -> Result:
        from onnx_woq.cli import main

        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        surprise = result.exception
        assert surprise is None or isinstance(surprise, SystemExit), f"traceback instead of a message: {surprise!r}"
        return result

    def ok(self, *arguments: object) -> Result:
        result = self(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    def json(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        """What a command prints with --json; nothing else may be on stdout."""
        result = self(*arguments, "--json")
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout, parse_constant=_no_constant)


def spawning(workers: int = 2, **options: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), **options)


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


def python(code: str, *arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a Python of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=60, check=False, **options)


def command_line(*arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m onnx_woq.cli` in a process of its own."""
    command = [sys.executable, "-m", "onnx_woq.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=60, check=False, **options)


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
