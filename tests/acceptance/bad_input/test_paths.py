"""Paths that systems take badly: too long, not UTF-8."""

from __future__ import annotations

import os
import sys

import pytest

from onnx_woq import inspect, quantize
from onnx_woq.errors import ModelError, OutputError
from tests.zoo import small as zoo


@pytest.mark.parametrize("length", [235, 250, 300, 5000])
def test_names_that_are_too_long(length, enc, cli, tmp_path):
    """At 235 only the names made from it are: of the unfinished output, of the data file."""
    name = "a" * length
    outputs = [tmp_path / f"{name}.onnx"] + ([tmp_path / name / "q.onnx", tmp_path / name] if length > 255 else [])
    for out in outputs:
        with pytest.raises(OutputError, match="too long"):
            quantize(enc, out)
        assert cli("quantize", enc, "-o", out).exit_code == 2
    if length > 255:
        with pytest.raises(ModelError, match="too long"):
            inspect(tmp_path / f"{name}.onnx")
        result = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--report", tmp_path / f"{name}.html")
        assert result.exit_code == 2
        assert "too long" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"q.onnx", "q.onnx.data"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
@pytest.mark.parametrize("external", ["", "w.bin"])
def test_a_folder_whose_name_is_not_utf8(external, cli, tmp_path):
    folder = tmp_path / os.fsdecode(b"x\xffy")
    folder.mkdir()
    model = zoo.encoder(tmp_path / "m.onnx", external=external)
    for file in [model, *tmp_path.glob("w.bin")]:
        file.rename(folder / file.name)
    for out, flags in {
        "r.onnx": [],
        "g.onnx": ["--config", "GPTQ_G32ASYM", "--calib", "random", "--samples", 2],
    }.items():
        result = cli("quantize", folder / "m.onnx", "-o", folder / out, *flags)
        assert result.exit_code == 0, result.output
        assert (folder / out).exists()
        assert "\\udcff" in result.stdout
    assert cli("quantize", folder / "m.onnx", "-o", folder / "j.onnx", "--json").exit_code == 0
