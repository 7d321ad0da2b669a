"""Settings of the whole suite: what it inherits from whoever starts it steers nothing, and telemetry stays off."""

from __future__ import annotations

import os
import signal
import threading

# Tiny models gain nothing from threads, and with two pytest processes on two cores they would fight. Before numpy.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ONNX_WOQ_THREADS": "1"}

STEERING = (
    "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE",  # tables
    "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONSAFEPATH",  # children; this process has read them already
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MPLBACKEND",
)  # fmt: skip
"""Variables that change what is printed, computed or measured."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGCHLD")


def settle_environment() -> None:
    os.environ.update(THREADS)
    for name in STEERING:
        os.environ.pop(name, None)
    # Tests that import onnxruntime before the package report to nobody either.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def settle_signals() -> None:
    """What is ignored here, as in `nohup make test &`, would be ignored by every child: Ctrl-C, and how it ended.

    A handler is not inherited, so that children begin with what a terminal would give them; it does nothing, so that
    this process goes on ignoring what it was told to ignore.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


settle_environment()
settle_signals()
