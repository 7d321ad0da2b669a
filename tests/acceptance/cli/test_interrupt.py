"""An interrupt ends quietly and says what is kept."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from onnx_woq.cli import main
from onnx_woq.engine import execute
from tests.zoo.nodes import graph, node, random, value, write


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config", "RTN_G32ASYM"], "nothing was written"),
        (["--auto", "--calib", "random", "--samples", "4"], "the same command goes on"),
    ],
)
def test_interrupted(flags, says, tmp_path, monkeypatch):
    product, x, y = node("MatMul", ["x", "W"], ["y"]), value("x", ("t", 64)), value("y", ("t", 32))
    path = write(tmp_path / "m.onnx", graph([product], [x], [y], {"W": random(64, 32)}))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "solve_all", interrupted)
    done = CliRunner().invoke(main, ["quantize", str(path), "-o", str(tmp_path / "q.onnx"), *flags])
    assert done.exit_code == 130, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.output
    assert not [file.name for file in tmp_path.iterdir() if "onnx-woq-partial" in file.name or file.name == "q.onnx"]
