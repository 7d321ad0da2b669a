"""Sessions of ONNX Runtime: the only module that makes an `InferenceSession`.

Weights stay in their files, and errors of ONNX Runtime become readable messages.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import onnxruntime as ort

from onnx_woq.core.cpu import cores
from onnx_woq.errors import DataError, MemoryLimit, ModelError, OnnxWoqError
from onnx_woq.graph.find.quantized import low_bit_nodes
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import Model, memory_tensors, serialize
from onnx_woq.runtime.custom_ops import registered

THREADS_VARIABLE = "ONNX_WOQ_THREADS"
"""Environment variable with the number of threads, for callers that do not give one."""

_FATAL = 4  # ONNX Runtime's log severity; everything below also arrives as an exception
_P = ParamSpec("_P")
_R = TypeVar("_R")
_LACKING = re.compile(
    r"is not a registered function/op|No Op registered for|Could not find an implementation|"
    r"official support|Unsupported model IR version"
)
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")


def make_session(
    source: str | Path | Model, *, threads: int = 0, for_calibration: bool = False, prepack: bool = False
) -> ort.InferenceSession:
    """Makes a CPU session of a model file, or of a model in memory.

    Args:
        source: an .onnx file; or a `Model`, whose structure is passed on as bytes. Weights on disk are read from
            their files; large tensors in memory are handed over, and the session may copy them.
        threads: threads of the session; 0 for `ONNX_WOQ_THREADS`, or else the choice of ONNX Runtime.
        for_calibration: run every node as it is written, so that a value is the same bit for bit whatever else is
            fetched. Threads do not spin between runs, so that the cores can do something else. Unless `prepack`, float
            weights are multiplied by straight from their files.
        prepack: for calibration, let ONNX Runtime rearrange float weights. Products of 512 tokens are then 15 % faster
            and round differently; it costs a copy of the weights.

    Raises:
        ModelError: ONNX Runtime cannot use the model, or a library of custom operators.
    """
    options = _options(threads or _asked_threads())
    if for_calibration:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = False  # it plans for one shape, but samples differ in length
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if isinstance(source, Model) and not prepack and not low_bit_nodes(source):  # these need rearranged weights
            options.add_session_config_entry("session.disable_prepacking", "1")
    return _opened(source, options)


def why_not_opened(source: str | Path | Model) -> str:
    """Returns why ONNX Runtime does not open a model, "" if it does.

    Nothing is run, and weights stay in their files: as the graph is not optimized and weights are not rearranged, a
    model of any size takes a few megabytes. Only a model that is refused so is tried with all optimizations.

    Args:
        source: an .onnx file, or a `Model`.
    """
    refusals = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = _options(threads=1)
        options.graph_optimization_level = level
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            _opened(source, options)
            return ""
        except ModelError as error:
            refusals.append(str(error))
    return refusals[0]


def lacks_operators(refusal: str) -> bool:
    """Tells whether a model is refused for what this runtime does not have, and another one may: operators, kernels."""
    return _LACKING.search(refusal) is not None


def blames_models(*arguments: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Returns a decorator that turns whatever is raised on a model that ONNX Runtime finds invalid into a ModelError.

    A model may be malformed in more ways than anyone checks, and be met anywhere. An error on a model that the runtime
    opens, or refuses only for an operator that it lacks, is a fault of this package and is raised as it is; so is a
    DataError. But memory that runs out is a MemoryLimit, and too deep a recursion comes from the model.

    Args:
        arguments: the names of the function's arguments that are paths of models.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if isinstance(error, OnnxWoqError) and not isinstance(error, DataError):
                    raise
                given = inspect.signature(function).bind(*args, **kwargs).arguments
                for path in (find_model(given[name]) for name in arguments if isinstance(given[name], str | Path)):
                    refusal = why_not_opened(path) if path.exists() else ""
                    if refusal and not lacks_operators(refusal):
                        first = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                        raise ModelError(f"{refusal}; the model is damaged, export it again ({first})") from error
                if isinstance(error, RecursionError):
                    named = find_model(given[arguments[0]])
                    raise ModelError(f"{named} nests or chains its nodes too deeply: simplify the model") from error
                if isinstance(error, MemoryError):
                    raise MemoryLimit(f"there is too little memory for this model and data: {error}") from error
                raise

        return guarded

    return decorate


def run(
    session: ort.InferenceSession, outputs: Sequence[str] | None, feed: Mapping[str, np.ndarray], label: str
) -> list[np.ndarray]:
    """Runs a session and returns the arrays of `outputs` (None for all of them).

    Args:
        session: from `make_session`.
        outputs: names of graph outputs.
        feed: one sample, input name -> array.
        label: name of the sample in the error message.

    Raises:
        DataError: the model cannot be run on this sample.
    """
    try:
        return session.run(outputs, dict(feed))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in feed.items() if np.size(array))
        raise DataError(f"the model cannot be run on {label} ({shapes}): {_explain(error)}") from error


def thread_count() -> int:
    """Returns the threads that all sessions may use together: `ONNX_WOQ_THREADS`, or else the cores of this process.

    Raises:
        ModelError: the variable is not a number of at least 1.
    """
    return _asked_threads() or cores()


def _options(threads: int) -> ort.SessionOptions:
    """Returns options with the custom operators in use that keep ONNX Runtime silent: it speaks by exceptions."""
    ort.set_default_logger_severity(_FATAL)
    options = ort.SessionOptions()
    for library in registered():
        _register(library, options)
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    return options


def _opened(source: str | Path | Model, options: ort.SessionOptions) -> ort.InferenceSession:
    """Returns a session of a model file or a model in memory, or raises a ModelError that says why there is none."""
    weights: list[np.ndarray] = []
    content: str | bytes
    path = source.path if isinstance(source, Model) else Path(source)
    with _folder_in_utf8(path.parent) as folder:
        if isinstance(source, Model):
            content, weights = _structure(source, folder, options)
        else:
            content = os.path.join(folder, path.name)
        try:
            session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ModelError(f"{path} cannot be run: {_explain(error)}") from error
    session.borrowed_weights = weights  # ONNX Runtime reads these arrays in place and does not own them
    return session


def _asked_threads() -> int:
    """Returns the threads to ask ONNX Runtime for; 0 leaves the choice to it.

    ONNX Runtime does not see that a process is pinned to some cores, so these are counted here.
    """
    if asked := os.environ.get(THREADS_VARIABLE, ""):
        if not asked.isdecimal() or int(asked) < 1:
            raise ModelError(f"{THREADS_VARIABLE}={asked} is not a number of threads: unset it or give 1 or more")
        return int(asked)
    return cores() if cores() < (os.cpu_count() or 1) else 0


def _register(library: str, options: ort.SessionOptions) -> None:
    try:
        options.register_custom_ops_library(library)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"{library} is not a library of custom operators: {_explain(error)}") from error


@contextmanager
def _folder_in_utf8(folder: Path) -> Iterator[str]:
    """Yields a path of a folder that is valid UTF-8, as ONNX Runtime demands; on Linux a name may be any bytes."""
    try:
        str(folder).encode()
        yield str(folder)
        return
    except UnicodeEncodeError:
        number = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _structure(model: Model, folder: str, options: ort.SessionOptions) -> tuple[bytes, list[np.ndarray]]:
    """Returns a model without its weights as bytes, and its weights in memory.

    `options` are told the folder of the weights on disk and the addresses of those in memory.
    """
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    arrays = {name: np.ascontiguousarray(array) for name, array in memory_tensors(model).items()}
    if arrays:
        types = {name: model.ir.graph.initializers[name].dtype for name in arrays}
        values = [
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(types[name] or 0))
            for name, array in arrays.items()
        ]
        options.add_external_initializers(list(arrays), values)
    try:
        return serialize(model), list(arrays.values())
    except (ValueError, MemoryError) as error:
        raise ModelError(f"the structure of {model.path} does not fit into a session: {error}") from error


def _explain(error: Exception) -> str:
    """Returns the message of ONNX Runtime without its codes and source lines."""
    text = _PREFIX.split(str(error))[-1].strip()
    text = re.sub(r"\S+\.(?:cc|h):\d+ \S+ ?", "", text)
    if "is not a registered function/op" in text:
        text += " (name the library that has it with --custom-ops, in Python custom_ops)"
    text = re.sub(r"^Load model from .*? failed: ?(Fatal error: )?", "", text, flags=re.DOTALL)  # the caller names it
    if "Unsupported model IR version" in text or ("opset" in text.lower() and "official support" in text):
        text += " (a newer onnxruntime may read it: pip install -U onnxruntime)"
    return " ".join(text.split())
