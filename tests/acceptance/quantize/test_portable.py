"""Nothing is needed that only Unix has, and files are closed before they are renamed or removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, quantize
from onnx_woq.engine import executors, memory
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import load
from tests.support.commands import ROOT
from tests.zoo import small as zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def as_on_windows(tmp_path_factory):
    """The folder into which `as_on_windows.py` has written, and what it printed."""
    folder = tmp_path_factory.mktemp("windows")
    model = zoo.language_model(folder / "lm.onnx", layers=2)
    (folder / "data").mkdir()
    for number, feed in enumerate(zoo.lm_feeds(zoo.token_ids(3))):
        np.savez(folder / "data" / f"{number}.npz", **feed)
    (folder / "out").mkdir()
    command = [sys.executable, ROOT / "tests" / "support" / "as_on_windows.py", model, folder / "data", folder / "out"]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_it_writes_what_it_writes_here(as_on_windows, tmp_path):
    folder, _ = as_on_windows
    data = [dict(np.load(file)) for file in sorted((folder / "data").iterdir())]
    quantize(folder / "lm.onnx", tmp_path / "q.onnx", Recipe("gptq", true_sequential=True), data)
    for name in ("once", "resumed", "again"):
        assert contents(folder / "out" / name) == contents(tmp_path), name


def test_it_continues(as_on_windows):
    assert "5 of 9" in as_on_windows[1]


def test_tuning_leaves_the_result_alone(as_on_windows):
    assert set(contents(as_on_windows[0] / "out" / "tuned")) == {"lm.onnx", "lm.onnx.data"}


def test_where_the_result_cannot_be_mapped_the_plan_counts_it(monkeypatch, tmp_path):
    plan = make_plan(load(zoo.language_model(tmp_path / "lm.onnx", layers=2)), Recipe("rtn"))
    monkeypatch.setattr(memory, "resident", lambda: 1 << 20)
    mapped = memory.plan_memory(plan, [], None, 1).peak
    monkeypatch.setattr(memory, "MAPS", False)
    assert memory.plan_memory(plan, [], None, 1).peak - mapped == sum(group.bytes for group in plan.groups)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_table_can_be_sent_to_a_file_in_any_encoding(encoding, tmp_path):
    model = zoo.language_model(tmp_path / "lm.onnx", layers=2)
    done = subprocess.run(
        [sys.executable, "-m", "onnx_woq.cli", "inspect", str(model)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " ? " in done.stdout.decode(encoding)


def test_processes_on_a_large_windows_machine(monkeypatch):
    monkeypatch.setattr(executors, "cores", lambda: 128)
    monkeypatch.setattr(sys, "platform", "win32")
    with executors.built_in("processes") as executor:
        assert executors.workers_of(executor) == 61
