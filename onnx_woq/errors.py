"""Named errors: each says what is wrong and what to do about it. The CLI maps every one to exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxWoqError(Exception):
    """Base of every error this package raises on purpose; the message names the fix."""


class ModelError(OnnxWoqError):
    """The model file cannot be used: not ONNX, truncated, data missing or outside its folder, NaN weights."""


class DataError(OnnxWoqError):
    """The calibration or evaluation data cannot be used with this model."""


class RecipeError(OnnxWoqError):
    """A recipe, spec, preset or option is unknown or out of range."""


class OutputError(OnnxWoqError):
    """The result cannot be written where it was asked for."""


class DiskError(OutputError):
    """The disk is full, or fails, while the result is being written; what is finished is kept where it says so."""


class MemoryLimit(OnnxWoqError):
    """The memory that the process may take is too little for the largest weight."""


class RotationError(ModelError):
    """The residual stream of a model cannot be rotated without changing what it computes."""


class NothingToQuantize(ModelError):
    """No eligible MatMul or Gemm remains under this recipe."""


class AlreadyQuantized(ModelError):
    """The model already carries low-bit weights; quantizing it again would do nothing."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error message about an unknown `name`: the closest known ones, or all of them."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    close = [folded[m] for m in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
