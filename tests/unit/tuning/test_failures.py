"""Failures of trials are told from faults of this program and from failures of the system."""

from __future__ import annotations

import errno
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from onnx_woq.errors import (
    DataError,
    DiskError,
    EvaluationError,
    MemoryLimit,
    ModelError,
    NothingToQuantize,
    OutputError,
    RecipeError,
    ResourceError,
)
from onnx_woq.tuning.failures import Failure, failure_of
from onnx_woq.tuning.metric import MetricFailedError

OUT = Path("trial.onnx")


def raised(error, cause=None):
    """The error as `except` gets it."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("kind", [ModelError, DataError, RecipeError, NothingToQuantize])
def test_a_configuration_that_does_not_go_with_the_model(kind):
    assert failure_of(kind("no"), OUT) == Failure("failed", f"{kind.__name__}: no")


def test_an_evaluation_that_raises():
    assert failure_of(MetricFailedError("ValueError: no"), OUT) == Failure("failed", "ValueError: no")


@pytest.mark.parametrize("kind", [KeyError, TypeError, AssertionError, ValueError, RecursionError, ZeroDivisionError])
def test_anything_else_is_a_fault_of_the_program(kind):
    found = failure_of(raised(kind("no")), OUT)
    assert found.status == "fault"
    for part in (kind.__name__, "no", "Please report it", f"tuning/{Path(__file__).name}, line", "(raised)"):
        assert part in found.text


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError("no"), ResourceError),
        (raised(ModelError("no"), MemoryError("no")), ResourceError),
        (RuntimeError("std::bad_alloc"), ResourceError),
        (RuntimeError("can't start new thread"), ResourceError),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), ResourceError),
        (BrokenProcessPool("a child ended"), ResourceError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskError),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), OutputError),
        (OutputError("locked"), OutputError),
        (DiskError("full"), DiskError),
        (MemoryLimit("too little"), MemoryLimit),
        (EvaluationError("it ends the program"), EvaluationError),
        (raised(ModelError("m.onnx cannot be read"), OSError(errno.EIO, "gone")), ModelError),
    ],
    ids=repr,
)
def test_a_failure_of_the_system_ends_the_run(error, wanted):
    with pytest.raises(wanted) as caught:
        failure_of(error, OUT)
    assert type(caught.value) is wanted
