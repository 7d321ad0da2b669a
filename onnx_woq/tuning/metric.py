"""The user's metric: called so that whatever it does is a number or an error with a name.

It may raise, end the program, return anything, and change the current folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.errors import EvaluationError, system_failure

MOST_SHOWN = 80
"""Characters of a returned value that are shown at most."""


class MetricFailedError(Exception):
    """An error that the metric raised for one model; its message begins with the name of that error."""


def measure(metric: Callable[[Path], Any], path: Path) -> float:
    """Returns the number that a metric gives for the model at `path`, which may be NaN or infinite.

    Raises:
        MetricFailedError: the metric raises an exception, or returns no number.
        EvaluationError: it ends the program.
        ResourceError: memory or open files have run out in it.
    """
    try:
        with _same_folder():
            return _number(metric(path))
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if scarce := system_failure(error):
            raise scarce from error
        raise MetricFailedError(f"{type(error).__name__}: {error}") from error
    except BaseException as end:
        raise EvaluationError(
            f"the evaluation function ends the program ({type(end).__name__}: {end}) when it is given {path}: "
            "let it return a number, or raise an exception for a model that it cannot judge"
        ) from end


def measure_float(metric: Callable[[Path], Any], path: Path) -> float:
    """Returns the number that a metric gives for the float model.

    Raises:
        EvaluationError: the metric raises, ends the program, or gives no finite number.
        ResourceError: memory or open files have run out in it.
    """
    try:
        baseline = measure(metric, path)
    except MetricFailedError as error:
        raise EvaluationError(
            f"the evaluation function failed on the float model ({error}): "
            "it must take the path of an .onnx file and return a number"
        ) from error
    if not math.isfinite(baseline):
        raise EvaluationError(
            f"the evaluation function gives {baseline} for the float model: nothing can be compared with it"
        )
    return baseline


def _number(value: Any) -> float:
    """Returns a value as a float; texts and arrays with axes are no numbers, whatever Python makes of them."""
    if not isinstance(value, str | bytes) and np.ndim(value) == 0:
        with suppress(TypeError, ValueError):
            return float(value)
    shown = " ".join(repr(value).split())[:MOST_SHOWN]
    raise TypeError(f"the evaluation function returned {shown}, which is no number")


@contextmanager
def _same_folder() -> Iterator[None]:
    """Goes back to the current folder at the end, since paths of the run may be relative to it."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)
