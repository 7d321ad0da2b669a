"""The errors this package raises on purpose.

Each message says what is wrong and what to do about it. The command line prints it and exits with code 2. This module
imports nothing of the package.
"""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path


class OnnxWoqError(Exception):
    """The base class of every error this package raises on purpose."""


class ModelError(OnnxWoqError):
    """A model file that cannot be used: not ONNX, truncated, data missing or outside its folder, NaN weights."""


class DataError(OnnxWoqError):
    """Calibration or evaluation data that cannot be used with this model."""


class EvaluationError(DataError):
    """An evaluation function that cannot be used: missing, no function, failing on the float model, or no number."""


class RecipeError(OnnxWoqError):
    """A recipe, spec, preset or option that is unknown or out of range."""


class OutputError(OnnxWoqError):
    """A result that cannot be written where it was asked for."""


class DiskError(OutputError):
    """A disk that is full or fails while a result is written; where finished layers are kept, the message says so."""


class OutputChanged(OutputError):
    """An output that others have written since the run began, and that is therefore not overwritten."""


class MemoryLimit(OnnxWoqError):
    """A memory budget that is too small for the largest weight."""


class InputChanged(ModelError):
    """A file of a model that was changed, replaced or removed while the model was being read."""


class BrokenResult(OnnxWoqError):
    """A result that ONNX Runtime does not open, although it opens the float model."""


class ResourceError(OnnxWoqError):
    """A system that has run out of something while the work was going on: memory, open files, threads, workers."""


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


_NO_MEMORY = "memory has run out: close other programs, or give --max-memory"
_SCARCE = {
    errno.EMFILE: "too many files are open in this process: raise its limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close other programs",
    errno.ENOMEM: _NO_MEMORY,
}
_TOLD = {
    "bad_alloc": _NO_MEMORY,
    "Failed to allocate memory": _NO_MEMORY,
    "can't start new thread": "no more threads can be started: raise the limit (ulimit -u), or close other programs",
}
"""Parts of messages of libraries that have no type for what has run out."""


def system_failure(error: BaseException) -> ResourceError | None:
    """Returns the ResourceError for an error that says, or follows from one that says, that something has run out.

    It is None for any other error.
    """
    for one in _chain(error):
        if isinstance(one, ResourceError):
            return one
        reason = _NO_MEMORY if isinstance(one, MemoryError) else ""
        if isinstance(one, OSError):
            reason = _SCARCE.get(one.errno or 0, "")
        if any(kind.__name__ == "BrokenExecutor" for kind in type(one).__mro__):  # its module takes time to import
            reason = "a worker process has ended: it may have been killed for want of memory"
        reason = reason or next((reason for part, reason in _TOLD.items() if part in str(one)), "")
        if reason:
            return ResourceError(f"{reason} ({type(one).__name__}{f': {one}' if str(one) else ''})")
    return None


def fault_text(error: BaseException) -> str:
    """Returns the message of an error that is a fault of this program: its type and place, and how to report it."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parent
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(package)] or list(frames)
    place = f" in {'/'.join(Path(own[-1].filename).parts[-2:])}, line {own[-1].lineno} ({own[-1].name})" if own else ""
    return (
        f"a fault of onnx-woq, not of your input: {type(error).__name__}: {error}{place}. "
        "Please report it with the command and this line; onnx-woq --debug shows all of it"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
