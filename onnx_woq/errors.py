"""The errors this package raises on purpose.

Each message says what is wrong and what to do about it. The command line prints it and exits with code 2. This module
imports nothing of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxWoqError(Exception):
    """The base class of every error this package raises on purpose."""


class ModelError(OnnxWoqError):
    """A model file that cannot be used: not ONNX, truncated, data missing or outside its folder, NaN weights."""


class DataError(OnnxWoqError):
    """Calibration or evaluation data that cannot be used with this model."""


class RecipeError(OnnxWoqError):
    """A recipe, spec, preset or option that is unknown or out of range."""


class OutputError(OnnxWoqError):
    """A result that cannot be written where it was asked for."""


class DiskError(OutputError):
    """A disk that is full or fails while a result is written; where finished layers are kept, the message says so."""


class MemoryLimit(OnnxWoqError):
    """A memory budget that is too small for the largest weight."""


class InputChanged(ModelError):
    """A file of a model that was changed, replaced or removed while the model was being read."""


class BrokenResult(OnnxWoqError):
    """A result that ONNX Runtime does not open, although it opens the float model."""


class RotationError(ModelError):
    """A model whose residual stream cannot be rotated without changing what the model computes."""


class NothingToQuantize(ModelError):
    """A model without any MatMul or Gemm that the recipe quantizes."""


class AlreadyQuantized(ModelError):
    """A model that already carries low-bit weights, which quantizing again would not change."""


def visible(text: str) -> str:
    """Returns a text as a terminal may be given it: whatever is no printable character becomes its escape sequence.

    Names in models and paths may hold sequences that move the cursor or rename the window, marks that reverse the
    reading direction, line breaks that forge a message, and bytes that are no text at all.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown `name`: the known names closest to it, or all of them.

    Upper and lower case count as the same. For example "did you mean gptq?", or "known: awq, gptq, rtn".
    """
    known = list(known)
    folded = {k.lower(): k for k in known}
    close = [folded[m] for m in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
