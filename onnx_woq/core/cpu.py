"""What the machine gives: cores to use, and BLAS kept to one thread where work is spread over them already."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_blas_thread() -> AbstractContextManager[object]:
    """Limits BLAS to one thread per call: threads inside small products wait for each other more than they compute."""
    import scipy.linalg.blas  # noqa: F401  only a library that is loaded can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")
