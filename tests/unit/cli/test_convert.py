"""The command: what was done on standard error, the path alone on standard output."""

from __future__ import annotations

from click.testing import CliRunner

from onnx_woq.cli import main
from tests.zoo.nodes import linear, random


def test_it_says_what_was_done_and_prints_the_path(tmp_path):
    model, new = linear(tmp_path / "m.onnx", random(40, 8)), tmp_path / "new.onnx"
    done = CliRunner().invoke(main, ["convert", str(model), "-o", str(new)])
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{new}\n", "nothing had to be changed\n")
    assert new.is_file()
