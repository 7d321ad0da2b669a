"""Where the time of a run goes: the stacks of all threads are looked at now and then and sorted into phases.

A sample counts for the phase of the innermost function that a rule names. Threads that wait for others are not counted,
so a phase's seconds are thread-seconds of work, not of wall time. The threads inside BLAS and the runtime do not show.
Measured runs are not sampled: phases come from a run of their own.
"""

from __future__ import annotations

import collections
import re
import sys
import threading
import time
from types import FrameType, TracebackType

INTERVAL = 0.01  # seconds

RULES = (  # (file, function, phase), the first that fits the innermost frame it fits
    (r"<frozen importlib|importlib/", "", "import"),
    (r"onnx_woq", "hash|digest", "hash"),
    (r"onnxruntime/capi", "^run|run_with", "forward"),
    (r"onnxruntime/capi", "__init__|_create", "session"),
    (r"onnx_woq/core/methods/gptq", "factor|cholesky|hessian", "factor"),
    (r"onnx_woq/core/(stats|gram)", "", "gram"),
    (r"onnx_woq/core/methods", "", "solve"),
    (r"onnx_woq/core", "", "grid"),
    (r"onnx_woq/targets", "", "pack"),
    (r"onnx_woq/(graph/io/save|engine/resume)", "", "save"),
    (r"onnx_woq/graph/find/(constants|linears)", "weight|read|numpy|release", "read weights"),
    (r"onnx_woq/graph", "", "graph"),
    (r"onnx_woq/runtime", "", "walk"),
)
PHASES = list(dict.fromkeys([*(phase for _, _, phase in RULES), "other"]))
_RULES = [(re.compile(file), re.compile(function), phase) for file, function, phase in RULES]
_WAITING = re.compile(r"threading\.py$|/queue\.py$|selectors\.py$|concurrent/futures/(_base|thread)\.py$")


class Sampler:
    """Samples every thread but its own while it is entered; `seconds()` by phase afterwards."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._other: collections.Counter[str] = collections.Counter()
        self._done = threading.Event()
        self._samples = 0
        self._wall = 0.0

    def __enter__(self) -> Sampler:
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._wall = time.monotonic() - self._start

    def seconds(self) -> dict[str, float]:
        """Thread-seconds by phase, largest first; a sample stands for the time between two."""
        parallel_map = self._wall / max(self._samples, 1)
        return {phase: count * parallel_map for phase, count in self._counts.most_common()}

    def unsorted(self) -> dict[str, float]:
        """Thread-seconds of the functions that no rule names, the ten largest."""
        parallel_map = self._wall / max(self._samples, 1)
        return {name: count * parallel_map for name, count in self._other.most_common(10)}

    def _sample(self) -> None:
        own = threading.get_ident()
        while not self._done.wait(INTERVAL):
            self._samples += 1
            for thread, frame in sys._current_frames().items():
                if thread != own and not _WAITING.search(frame.f_code.co_filename):
                    phase = phase_of(frame)
                    self._counts[phase] += 1
                    if phase == "other":
                        self._other[f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"] += 1


def phase_of(frame: FrameType | None) -> str:
    """The phase of a stack, from its innermost frame outwards; "other" when no rule fits."""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for where, what, phase in _RULES:
            if where.search(file) and what.search(function):
                return phase
        frame = frame.f_back
    return "other"
