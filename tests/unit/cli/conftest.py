"""What the tests of the command line share: a small model, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
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
