"""The metric of `--eval`: found by its name, and kept away from standard output, which is for the result."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnx_woq.errors import EvaluationError, nearest


def load_metric(name: str | None) -> Callable[[Path], float] | None:
    """Imports `module:function`; the current folder comes first, as for `python -m`.

    Raises:
        EvaluationError: there is no such module or function, or the module cannot be imported; the message says why.
    """
    if name is None:
        return None
    module, sign, function = name.partition(":")
    if not sign or not module or not function:
        raise EvaluationError(f"--eval {name!r}: write MODULE:FUNCTION")
    here = os.getcwd()
    sys.path.insert(0, here)
    imported = _imported(module, here)
    try:
        found = getattr(imported, function)
    except AttributeError as error:
        functions = [known for known, value in vars(imported).items() if callable(value) and not known.startswith("_")]
        known = f": {nearest(function, functions)}" if functions else ""
        raise EvaluationError(f"--eval {name}: {module} has no attribute {function!r}{known}") from error
    if not callable(found):
        raise EvaluationError(f"--eval {name} is not a function")
    return found


def _imported(module: str, here: str) -> Any:
    """Imports the module of a metric, whatever it does meanwhile."""
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if not error.name or not (module == error.name or module.startswith(f"{error.name}.")):
            raise EvaluationError(f"--eval {module}: importing it fails ({error}): install what it needs") from error
        modules = [found.name for found in pkgutil.iter_modules([here])]
        known = f"; {nearest(module, modules)}" if modules else ""
        raise EvaluationError(
            f"--eval {module}: No module named {error.name!r} in {here} or installed{known}"
        ) from error
    except BaseException as error:
        raise EvaluationError(f"--eval {module}: importing it fails ({type(error).__name__}: {error})") from error
    finally:
        os.chdir(here)


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Sends what a metric prints to standard error, also from other languages and processes that it starts."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with contextlib.suppress(OSError, ValueError):  # a closed stream, or one that is no file, as in tests
            stdout, stderr = (stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream)
            sys.__stdout__.flush()  # type: ignore[union-attr]
            kept = os.dup(stdout)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stdout)
            os.dup2(stderr, stdout)
        yield
