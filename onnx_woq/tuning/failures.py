"""Failures of trials: those of a configuration or an evaluation, and faults of this program; others end the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx_woq.errors import (
    BrokenResult,
    EvaluationError,
    InputChanged,
    MemoryLimit,
    OnnxWoqError,
    OutputError,
    ResourceError,
    fault_text,
    system_failure,
)
from onnx_woq.graph.io.save import failure
from onnx_woq.tuning.metric import MetricFailedError

logger = logging.getLogger(__name__)

NOT_OF_A_TRIAL = (OutputError, MemoryLimit, ResourceError, EvaluationError, InputChanged)
"""Errors that any other configuration would meet as well, or that another run may not meet."""


@dataclass(frozen=True)
class Failure:
    """The failure of one trial.

    Attributes:
        status: "failed" if configuration, model, data or evaluation do not go together; "fault" if this program is
            wrong, which says nothing of the configuration.
        text: the reason, for people.
    """

    status: Literal["failed", "fault"]
    text: str


def failure_of(error: Exception, out: Path) -> Failure:
    """Returns the failure that an error is for the trial in which it was raised.

    Args:
        error: the error.
        out: the model of the trial, which may be what could not be written.

    Raises:
        OnnxWoqError: the trial is not to blame: the disk, memory, open files or another process are. The run ends, and
            a resumed one tries the trial again.
    """
    if isinstance(error, NOT_OF_A_TRIAL):
        raise error
    if scarce := system_failure(error):
        raise scarce from error
    if isinstance(error, OSError):
        raise failure(error, out) from error
    if isinstance(error, MetricFailedError):
        return Failure("failed", str(error))
    if isinstance(error, BrokenResult):
        return Failure("fault", str(error))
    if isinstance(error, OnnxWoqError):
        if isinstance(error.__cause__, OSError):  # a file of the float model cannot be read any more, or the like
            raise error
        return Failure("failed", f"{type(error).__name__}: {error}")
    logger.debug("a fault of the program", exc_info=error)
    return Failure("fault", fault_text(error))
