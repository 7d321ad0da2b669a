"""Judging in a worker: what is wrong there comes back as an error, quietly."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from onnx_woq.engine.executors import Serial, leaves_process, pickled
from onnx_woq.errors import EvaluationError
from onnx_woq.tuning.judge import judge_remotely, stamp_files
from onnx_woq.tuning.metric import measure


def size(path: Path, _: object) -> float:
    return float(path.stat().st_size)


def ends(path: Path) -> float:
    raise SystemExit(f"no {path.name}")


def measured(metric: Callable[[Path], float], path: Path, _: object) -> float:
    return measure(metric, path)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model")
    return path


def test_a_verdict_from_elsewhere(model):
    verdict = judge_remotely(model, pickle.dumps(size), stamp_files([model]))
    assert (verdict.metric, verdict.error) == (5.0, "")


@pytest.mark.parametrize("change", ["other", "older", "gone"])
def test_another_file_is_not_judged(change, model):
    seen = stamp_files([model])
    if change == "gone":
        model.unlink()
    else:
        model.write_bytes(b"model" if change == "older" else b"others")
        os.utime(model, (1, 1))
    verdict = judge_remotely(model, pickle.dumps(size), seen)
    assert verdict.error.startswith("FileNotFoundError")
    assert str(model) in verdict.error


def test_a_worker_lives_on(model):
    with pytest.raises(EvaluationError, match=r"ends the program .SystemExit: no m.onnx"):
        judge_remotely(model, pickle.dumps(partial(measured, ends)), stamp_files([model]))
    assert "UnpicklingError" in judge_remotely(model, b"nonsense", stamp_files([model])).error


def test_a_worker_is_quiet():
    """Where nobody has set up logging, Python prints warnings."""
    code = """
import logging, pickle, sys
from onnx_woq.tuning.judge import judge_remotely
def score(path, report):
    logging.getLogger("onnx_woq.graph.io.model").warning("from a worker")
    return 1.0
assert judge_remotely(None, pickle.dumps(score), {}).metric == 1
logging.getLogger("onnx_woq.graph.io.model").warning("from here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "from here\n")
    assert not logging.getLogger("onnx_woq").handlers


def test_which_executors_leave_the_process():
    assert leaves_process(ProcessPoolExecutor(1))
    assert not leaves_process(ThreadPoolExecutor(1))
    assert not leaves_process(Serial())


def test_only_a_cluster_takes_what_has_no_name():
    here = 5
    nameless = lambda: here  # noqa: E731
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickled(nameless, Serial())
    assert pickle.loads(pickled(nameless, SimpleNamespace(_client=None)))() == 5
