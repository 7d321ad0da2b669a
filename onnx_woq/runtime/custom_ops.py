"""Custom operators: libraries that every session made in a `with` block registers before it reads a model.

Which libraries these are belongs to the machine and not to the model, so no hash or fingerprint knows of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from onnx_woq.errors import ModelError

CustomOps = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""One library of custom operators, several, or none, as a user gives them."""

_registered: ContextVar[tuple[str, ...]] = ContextVar("custom_ops", default=())


@contextmanager
def custom_operators(libraries: CustomOps) -> Iterator[None]:
    """Has sessions that this thread makes in the `with` block register libraries of custom operators.

    Raises:
        ModelError: a library is not there.
    """
    given = [libraries] if isinstance(libraries, str | os.PathLike) else libraries or ()
    paths = tuple(os.path.abspath(library) for library in given)  # workers may stand in another folder
    for path in paths:
        if not Path(path).is_file():
            raise ModelError(f"there is no library of custom operators at {path}: check the path (--custom-ops)")
    token = _registered.set(paths)
    try:
        yield
    finally:
        _registered.reset(token)


def registered() -> tuple[str, ...]:
    """Returns the paths of the libraries that a session has to register now."""
    return _registered.get()
