"""Cores of this machine: how many may be used, and how work is spread over them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""A function like the built-in `map`, which may run the calls side by side; the pieces do not depend on each other."""


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_blas_thread() -> AbstractContextManager[object]:
    """Limits BLAS to one thread while the context is open.

    Work is spread over the cores by the caller. Threads inside small products would wait for each other more than they
    compute.
    """
    import scipy.linalg.blas  # noqa: F401  only a library that is loaded can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


@contextmanager
def no_garbage_search() -> Iterator[None]:
    """Turns Python's garbage collector off while the context is open.

    Reading a graph makes objects by the hundred thousand, and all of them stay. The collector would go through them
    again and again, which takes half the time of reading. Where several threads use this at once, the first to leave
    turns the collector on again, so that it never stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
