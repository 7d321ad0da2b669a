"""What the machine gives: cores to use, and BLAS kept to one thread where work is spread over them already."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""How to go through pieces that do not depend on each other: the built-in `map`, or like it with several threads."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_blas_thread() -> AbstractContextManager[object]:
    """Limits BLAS to one thread per call: threads inside small products wait for each other more than they compute."""
    import scipy.linalg.blas  # noqa: F401  only a library that is loaded can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


@contextmanager
def no_garbage_search() -> Iterator[None]:
    """Keeps Python from looking for garbage while objects are made by the hundred thousand and all of them stay.

    It would go through everything made so far again and again: half the time it takes to read a graph. With several
    threads whoever turned it off turns it on again, so it never stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
