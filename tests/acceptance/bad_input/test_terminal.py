"""Names in models and paths are shown, not obeyed: no escape sequence, control character or mark reaches a terminal."""

from __future__ import annotations

import logging
import shlex
import warnings

import numpy as np
import onnx
import pytest

from onnx_woq.engine import inspection
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, random, value, write

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b5m\r\nERROR: forged\u202etxt.\u2066\u200b\x7f[bold]mark[/bold]"
FORBIDDEN = set("\x1b\x07\x9b\r\u202e\u2066\u200b\x7f")


def check(text):
    assert not FORBIDDEN & set(text), repr(text)
    assert not any(line.startswith("ERROR: forged") for line in text.splitlines())


@pytest.fixture
def evil(tmp_path):
    """A model that is evil in the names of everything."""
    nodes = [
        node("MatMul", ["x", "W" + EVIL], ["h" + EVIL], name="mm" + EVIL),
        node("MatMul", ["h" + EVIL, "n" + EVIL], ["g"], name="left float" + EVIL),
        node("Gather", ["T" + EVIL, "i"], ["r"], name="table" + EVIL),
        node("Odd" + EVIL, ["g"], ["y"], name="odd" + EVIL, domain="elsewhere" + EVIL),
    ]
    weights = {"W" + EVIL: random(64, 48), "n" + EVIL: random(48, 3), "T" + EVIL: random(50, 64), "i": np.array([1])}
    main = graph(nodes, [value("x", (3, 64))], [value("y"), value("r")], weights)
    return write(tmp_path / "m.onnx", main, domains={"elsewhere" + EVIL: 1})


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_results(command, evil, cli, tmp_path):
    flags = ["-o", tmp_path / "q.onnx"] if command == "quantize" else []
    result = cli(command, evil, "--embedding-bits", 4, *flags)
    assert result.exit_code == 0, result.output
    check(result.output)
    assert r"\x1b]0;owned\x07" in result.stdout, "names are still told apart"
    assert "[bold]mark[/bold]" in result.stdout


def test_json_is_plain_ascii(evil, cli):
    check(cli("inspect", evil, "--json").stdout)


def test_errors(evil, cli, tmp_path):
    data = zoo.array_folder(tmp_path / "data", "x", [np.full((3, 64), np.nan, np.float32)])
    result = cli("quantize", evil, "-o", tmp_path / "q.onnx", "--config", "GPTQ_G32ASYM", "--calib", data)
    assert result.exit_code == 2
    check(result.output)
    result = cli("inspect", tmp_path / f"m{EVIL}.onnx")
    assert result.exit_code == 2
    check(result.output)
    proto = onnx.load(zoo.language_model(tmp_path / "l.onnx", external="w"), load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = f"../{EVIL}"
    onnx.save(proto, tmp_path / "l.onnx")
    check(cli("inspect", tmp_path / "l.onnx").output)


def test_paths(cli, tmp_path):
    folder = tmp_path / "in\x1b[31m\u202e"
    folder.mkdir()
    model = zoo.encoder(folder / "m.onnx")
    result = cli("quantize", model, "-o", folder / "q.onnx")
    assert result.exit_code == 0, result.output
    check(result.output)


def test_log_messages_and_the_warnings_of_libraries(cli, enc, tmp_path, monkeypatch):
    real = inspection.load

    def load(path):
        logging.getLogger("onnx_woq.x").warning("about %s", EVIL)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"unknown key {EVIL}", stacklevel=1)
        return real(path)

    monkeypatch.setattr(inspection, "load", load)
    result = cli("inspect", enc)
    assert result.exit_code == 0
    check(result.output)
    assert "WARNING: about \\x1b" in result.stderr
    assert "unknown key \\x1b" in result.stderr


def test_a_printed_command_can_be_pasted(cli, tmp_path):
    folder = tmp_path / "my models; rm -rf $HOME"
    folder.mkdir()
    model = zoo.encoder(folder / "m.onnx")
    result = cli("quantize", model, "-o", folder / "q.onnx")
    line = next(line for line in result.stdout.splitlines() if "onnx-woq evaluate" in line)
    words = shlex.split(line.partition(": ")[2])
    assert words == ["onnx-woq", "evaluate", str(folder / "q.onnx"), "--reference", str(model), "--data", "…"]
