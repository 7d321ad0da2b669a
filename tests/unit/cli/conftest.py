"""What the tests of the command line share: a small model, and the command line in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from onnx_woq.cli import main
from tests.zoo.nodes import graph, node, random, value, write

Run = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Writes two MatMuls in a row."""
    products = [node("MatMul", ["x", "W"], ["h"], name="first"), node("MatMul", ["h", "V"], ["y"], name="second")]
    weights = {"W": random(64, 64), "V": random(64, 32)}
    return write(tmp_path / "m.onnx", graph(products, [value("x", ("t", 64))], [value("y", ("t", 32))], weights))


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Writes a module with a metric, and leaves no trace of its import."""
    (tmp_path / "cli_metric.py").write_text(
        "def score(path):\n    return 0.5 if 'onnx-woq-tune' in str(path) else 1.0\nthree = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "cli_metric:score"
    sys.modules.pop("cli_metric", None)


@pytest.fixture
def run() -> Run:
    """Gives a function that runs the command line and expects an exit code instead of a traceback."""

    def run(*arguments: object, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="onnx-woq")
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code == code, done.stderr
        return done

    return run


def strict_json(text: str) -> Any:
    """Parses JSON as other programs do: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
