"""The tools that print rows of accuracy, on the shipped model: what they print is what `evaluate` measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnx_woq import Recipe, evaluate, quantize

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "demo" / "model.onnx"
SHORT = ("--samples", "4", "--seqlen", "64", "--rows", "4")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    subprocess.run([sys.executable, ROOT / "models" / "text.py", folder], check=True, capture_output=True)
    return folder


def rows(text, tool, *flags):
    data = ("--calib", text / "calib.txt", "--dev", text / "dev.txt", text / "calib.txt")
    command = [sys.executable, ROOT / "tools" / tool, MODEL, *data, *SHORT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cells(row):
    return row.strip("| ").split(" | ")


def divergence(text, out, judged):
    found = evaluate(out, MODEL, text / f"{judged}.txt", samples=4, seqlen=64, tokenizer=MODEL.parent)
    return f"{found.kl:.4f} ± {found.kl_se:.4f}"


@pytest.mark.slow
def test_methods_are_judged_as_evaluate_does(text, tmp_path):
    _, _, rtn, gptq = rows(text, "quality.py", "--methods", "RTN", "GPTQ", "--bits", "3")
    recipe = Recipe("gptq", lm_head=False, accuracy_level=0, nsamples=4, pad_max_length=64).with_spec(bits=3)
    quantize(MODEL, tmp_path / "q.onnx", recipe, text / "calib.txt")
    assert rtn.startswith("| RTN | ")
    assert "| 0.000 |" in rtn
    assert f"| GPTQ | {divergence(text, tmp_path / 'q.onnx', 'dev')} | " in gptq
    assert divergence(text, tmp_path / "q.onnx", "calib") in gptq
    shares = [
        1 - float(b.split()[0]) / float(a.split()[0]) for a, b in zip(cells(rtn)[1:3], cells(gptq)[1:3], strict=True)
    ]
    assert abs(float(cells(gptq)[3]) - min(shares)) < 2e-3


@pytest.mark.parametrize("tool", ["quality.py", "mixes.py"])
def test_every_row_is_a_recipe(tool):
    """Rows are made one by one: one that cannot be made would only be found after an hour."""
    command = [sys.executable, ROOT / "tools" / tool, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
