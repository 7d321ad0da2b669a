"""The suite gives the same answers from a script, under nohup, from a strict shell and with next to no environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, python

HERE = Path(__file__).relative_to(ROOT)


def test_a_child_can_be_interrupted():
    code = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('interrupted')"
    assert python(code).stdout.split() == ["interrupted"]


def test_a_child_says_how_it_ended():
    assert python("raise SystemExit(7)").returncode == 7


def test_a_child_prints_no_colours_and_is_as_wide_as_ever():
    done = python("from rich.console import Console; Console().print('[bold]' + 'word ' * 20)")
    assert len(done.stdout.splitlines()) == 2, "of 80 columns"
    assert "\x1b" not in done.stdout


def hostile() -> None:
    for name in ("SIGINT", "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.umask(0o077)
    os.close(0)


HOSTILE = {
    "COLUMNS": "20", "LINES": "5", "TERM": "xterm-256color", "FORCE_COLOR": "1", "LC_ALL": "C", "TZ": "Asia/Kathmandu",
    "PYTHONWARNINGS": "error", "PYTHONSAFEPATH": "1", "HOME": "/nonexistent", "OMP_NUM_THREADS": "3",
    "ONNX_WOQ_THREADS": "3", "MPLBACKEND": "TkAgg",
}  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs POSIX")
def test_whatever_is_inherited(tmp_path):
    """Those above, and some that watch children, signals and tables, in a pytest of their own."""
    files = [f"{HERE}::{test.__name__}" for test in CHEAP]
    files += [
        "tests/acceptance/cli/test_cli.py::test_tables_are_quiet_when_not_a_terminal",
        "tests/acceptance/cli/test_cli.py::test_configs_are_listed_in_tuning_order_one_per_line",
        "tests/acceptance/cli/test_interrupt.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", f"--rootdir={ROOT}"]
    command += [f"--basetemp={tmp_path / 'base'}", "-c", ROOT / "pyproject.toml", *(ROOT / file for file in files)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | HOSTILE
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True, env=environment, cwd=tmp_path, preexec_fn=hostile, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]


CHEAP = (
    test_a_child_can_be_interrupted,
    test_a_child_says_how_it_ended,
    test_a_child_prints_no_colours_and_is_as_wide_as_ever,
)
