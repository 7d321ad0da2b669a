"""A metric gives a number or an error with a name, whatever it does."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest

from onnx_woq.errors import DataError, EvaluationError, ResourceError
from onnx_woq.tuning.metric import MetricFailedError, measure, measure_float

MODEL = Path("m.onnx")


def raising(error):
    def metric(_):
        raise error

    return metric


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.array(1), np.int64(1)], ids=repr)
def test_numbers_of_all_kinds(value):
    assert measure(lambda _: value, MODEL) == measure_float(lambda _: value, MODEL) == 1.0


@pytest.mark.parametrize("value", [None, "0.9", b"1", [1.0], {}, np.ones(1), np.ones((2, 2)), 1j], ids=repr)
def test_whatever_is_no_number_is_named(value):
    with pytest.raises(MetricFailedError, match=r"^TypeError: the evaluation function returned .*no number"):
        measure(lambda _: value, MODEL)
    with pytest.raises(EvaluationError, match="failed on the float model"):
        measure_float(lambda _: value, MODEL)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_float_model_needs_a_finite_number(value):
    measure(lambda _: value, MODEL)
    with pytest.raises(DataError, match="nothing can be compared with it"):
        measure_float(lambda _: value, MODEL)


def test_an_exception_is_that_of_this_model():
    with pytest.raises(MetricFailedError, match=r"^KeyError: 'label'$"):
        measure(raising(KeyError("label")), MODEL)


@pytest.mark.parametrize("end", [SystemExit(0), SystemExit("enough"), GeneratorExit(), BaseException("odd")], ids=repr)
@pytest.mark.parametrize("call", [measure, measure_float])
def test_the_end_of_the_program_is_an_error(end, call):
    with pytest.raises(EvaluationError, match=rf"ends the program \({type(end).__name__}.*m\.onnx"):
        call(raising(end), MODEL)


def test_an_interrupt_stays_one():
    with pytest.raises(KeyboardInterrupt):
        measure(raising(KeyboardInterrupt()), MODEL)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "too many")], ids=repr)
def test_what_runs_out_is_not_the_metrics_fault(error):
    with pytest.raises(ResourceError):
        measure(raising(error), MODEL)


def test_the_current_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measure(lambda _: os.chdir("/") or 1.0, MODEL) == 1.0
    assert os.getcwd() == str(tmp_path)
