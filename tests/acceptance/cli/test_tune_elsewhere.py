"""Trials judged in other processes, as the command line does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import measure
from tests.support.commands import CONFIGS, ROOT

pytestmark = pytest.mark.slow

JUDGE = """
import os, signal, time
from pathlib import Path

def size(path):
    main = int(Path("main").read_text())
    with open("log", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if Path("deadly").exists() and Path("log").read_text().count("\\n") == 3:
        os.kill(main, signal.SIGKILL)
    return sum(file.stat().st_size for file in Path(path).parent.glob("*.onnx*"))

def long(path):
    if os.getpid() != int(Path("main").read_text()):
        Path("begun").touch()
        time.sleep(100)
    return 1.0
"""


def command(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    (cwd / "judging.py").write_text(JUDGE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "ONNX_WOQ_THREADS": "1"}
    code = (
        "import os, pathlib; pathlib.Path('main').write_text(str(os.getpid()))\nfrom onnx_woq.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def flags(enc: Path, function: str) -> list[object]:
    common = ["--calib", "random", "--samples", 4, "--executor", "processes", "--objective", "best"]
    common += ["--criterion", "absolute", "--tolerance", 1e9]
    return ["quantize", enc, "-o", "out/q.onnx", "--auto", "--eval", f"judging:{function}", *common]


def run(enc: Path, folder: Path) -> tuple[int, str, list[str]]:
    """Exit code, output and the processes that have judged, the float model's first."""
    process = command(*flags(enc, "size"), cwd=folder)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    judged = (folder / "log").read_text().split()
    (folder / "log").unlink()
    return process.returncode, out, judged


def test_processes_judge_and_a_killed_run_goes_on(enc, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    code, out, (main, *others) = run(enc, one)
    assert code == 0
    assert len(others) == len(CONFIGS)
    assert main == (one / "main").read_text() not in others
    assert "GPTQ_G32ASYM_DISABLE_LAST_MATMUL" in out
    assert sorted(path.name for path in (one / "out").iterdir()) == ["q.onnx", "q.onnx.data"]
    (other / "deadly").touch()
    assert run(enc, other)[0] == -signal.SIGKILL
    (other / "deadly").unlink()
    code, _, judged = run(enc, other)
    assert code == 0
    assert len(judged) == len(CONFIGS) - 1, "neither the float model nor the first trial again"
    assert measure.listing(one / "out") == measure.listing(other / "out")


def test_control_c_does_not_wait_for_an_evaluation(enc, tmp_path):
    process = command(*flags(enc, "long"), cwd=tmp_path)
    end = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # or else a later test fails too, for what is left open
        raise
    assert time.monotonic() - start < 10
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command goes on" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".q.onnx.onnx-woq-tune"]
