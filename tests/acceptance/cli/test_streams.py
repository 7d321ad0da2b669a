"""Nobody has to read what the commands say: closed and full streams stop and undo nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.support.commands import ROOT

KINDS = ["closed", "full", "unread pipe"]


def run(*arguments, stdout="read", stderr="read"):
    """Runs the command line with streams of a kind; returns its exit code and what can be read."""
    kinds, closed = {1: stdout, 2: stderr}, []
    with contextlib.ExitStack() as files:
        given = {}
        for number, kind in kinds.items():
            given[number] = subprocess.PIPE
            if kind == "closed":
                given[number] = None
                closed.append(number)
            elif kind == "full":
                given[number] = files.enter_context(open("/dev/full", "wb"))
            elif kind == "unread pipe":
                reading, given[number] = os.pipe()
                os.close(reading)
                files.callback(os.close, given[number])
        shut = "import os, sys; [os.close(int(n)) for n in sys.argv[1]]; os.execv(sys.argv[2], sys.argv[2:])"
        command = [sys.executable, "-m", "onnx_woq.cli", *map(str, arguments)]
        return subprocess.run(
            [sys.executable, "-c", shut, "".join(map(str, closed)), *command],
            stdout=given[1], stderr=given[2], stdin=subprocess.DEVNULL, cwd=ROOT, timeout=120, check=False,
        )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["configs", "--json"]], ids=" ".join)
def test_what_nobody_reads_is_no_error(kind, arguments):
    done = run(*arguments, stdout=kind)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_result_is_written_all_the_same(kind, enc, tmp_path):
    wanted = run("quantize", enc, "-o", tmp_path / "a.onnx")
    assert wanted.returncode == 0
    for number, streams in enumerate([{"stdout": kind}, {"stderr": kind}, {"stdout": kind, "stderr": kind}]):
        out = tmp_path / f"{number}.onnx"
        done = run("quantize", enc, "-o", out, **streams)
        assert done.returncode == 0, done.stderr
        assert out.with_name(f"{number}.onnx.data").read_bytes() == (tmp_path / "a.onnx.data").read_bytes()
        onnx.checker.check_model(out)
    assert not done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes_stay(kind, tmp_path):
    assert run("inspect", tmp_path / "missing.onnx", stderr=kind).returncode == 2
    assert run("inspect", "--no-such-flag", stderr=kind, stdout=kind).returncode == 2
