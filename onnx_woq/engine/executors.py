"""Executors that solve weights: the built-in ones and Dask clusters, and the differences between them.

An **executor** is anything with the protocol of `concurrent.futures.Executor`. It may run tasks in this process, in
other processes or on other machines, and may lose them: whoever submits a task here must be ready to do it itself.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from onnx_woq.core.cpu import ParallelMap, cores, one_blas_thread
from onnx_woq.errors import RecipeError, nearest

EXECUTORS = ("threads", "processes", "serial")
"""The names of the built-in executors."""

PATIENCE = 2.0
"""Seconds between two checks, while waiting for a task, that a cluster is still connected."""

T = TypeVar("T")


class Serial(Executor):
    """An executor that runs each task at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Runs `fn(*args, **kwargs)` here; returns its finished future."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def built_in(name: str = "threads") -> Iterator[Executor]:
    """Opens a built-in executor with a worker for each core; it is shut down at the end of the `with` block.

    Raises:
        RecipeError: `name` is not one of `EXECUTORS`.
    """
    if name not in EXECUTORS:
        raise RecipeError(f"unknown executor {name!r}: {nearest(name, EXECUTORS)}")
    executor = {"serial": Serial, "threads": _threads, "processes": _processes}[name]()
    try:
        yield executor
    except BaseException:
        _end_processes(executor)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _threads() -> Executor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="onnx-woq")


def _processes() -> Executor:
    spawn = multiprocessing.get_context("spawn")
    most = 61 if sys.platform == "win32" else cores()  # Windows cannot wait for more at a time
    return ProcessPoolExecutor(min(most, cores()), mp_context=spawn, initializer=_begin_process)


def _begin_process() -> None:
    """Makes a worker process end with its parent, however that ends, and leave interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_processes(executor: Executor) -> None:
    """Ends worker processes at once: after an error nobody waits for what may be a long evaluation."""
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for process in list((executor._processes or {}).values()):
        process.terminate()
    if queue := getattr(executor, "_call_queue", None):
        queue._reader.close()  # before Python 3.11.5, the thread that fills it would otherwise never end


@contextmanager
def dask_cluster(address: str) -> Iterator[Executor]:
    """Opens an executor on the workers of a Dask scheduler, which need this package in the same version.

    Raises:
        RecipeError: `distributed` is not installed, or no scheduler answers at `address`.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise RecipeError("--dask needs the package distributed: pip install 'onnx-woq[dask]'") from error
    try:
        client = Client(address, set_as_default=False, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"no Dask scheduler at {address} ({error}): start one with `dask scheduler`") from error
    with client:
        yield client.get_executor()


def workers_of(executor: Executor) -> int:
    """Returns the number of tasks that an executor works on at a time."""
    if isinstance(executor, Serial):
        return 1
    client = getattr(executor, "_client", None)
    if client is not None and hasattr(client, "nthreads"):
        return max(1, sum(client.nthreads().values()))
    return int(getattr(executor, "_max_workers", 0)) or cores()


def pool_map(pool: ThreadPoolExecutor) -> ParallelMap:
    """Returns a parallel `map` for a task that runs in a thread of `pool`: idle threads of the pool help with it.

    The pool may have no idle thread. So the caller works through the pieces as well, and at the end waits only for
    helpers that have begun.
    """

    def parallel_map(fn: Callable[[Any], T], pieces: Iterable[Any]) -> list[T]:
        left = deque(enumerate(pieces))
        done: dict[int, T] = {}

        def work() -> None:
            while True:
                try:
                    number, piece = left.popleft()
                except IndexError:
                    return
                try:
                    done[number] = fn(piece)
                except BaseException:
                    left.clear()
                    raise

        helpers = [pool.submit(work) for _ in range(min(workers_of(pool), len(left)) - 1)]
        try:
            work()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
        return [done[number] for number in sorted(done)]

    return parallel_map


def leaves_process(executor: Executor) -> bool:
    """Tells whether an executor runs tasks in other processes: any but serial and thread executors may."""
    return not isinstance(executor, Serial | ThreadPoolExecutor)


def pickled(thing: object, executor: Executor) -> bytes:
    """Returns an object pickled for a worker of an executor, for `pickle.loads` there.

    For Dask it is pickled by cloudpickle, which also takes functions that are defined in a notebook.

    Raises:
        Exception: the object cannot be pickled.
    """
    brought = "cloudpickle" if hasattr(executor, "_client") else "pickle"
    content: bytes = importlib.import_module(brought).dumps(thing)
    return content


@lru_cache
def keep_blas_to_one_thread() -> object:
    """Limits BLAS to one thread for the rest of this process; meant for worker processes only."""
    return one_blas_thread()


def submitted(executor: Executor, function: Callable[..., T], /, *args: Any) -> Future[T]:
    """Submits `function(*args)`; returns a failed future, rather than raising, if the executor is broken or closed."""
    try:
        if _is_gone(executor):
            raise BrokenExecutor("the connection to the scheduler is lost")
        if not hasattr(executor, "_client"):
            return executor.submit(function, *args)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)  # tasks carry their weights
            return executor.submit(function, *args, pure=False)  # Dask would otherwise hash all bytes of the task
    except Exception as error:  # a pool that is broken, a client that is closed
        future: Future[T] = Future()
        future.set_exception(error)
        return future


def result_of(future: Future[T], executor: Executor) -> T:
    """Waits for the result of a future.

    Raises:
        Exception: the task raised it, or the executor lost the task.
    """
    while not future.done():
        wait_for_any([future], executor)
    return future.result()


def wait_for_any(futures: Sequence[Future[Any]], executor: Executor) -> None:
    """Waits until one of the futures is done; cancels them all if the cluster is gone, since they would never end."""
    while not any(future.done() for future in futures):
        wait(futures, timeout=PATIENCE, return_when=FIRST_COMPLETED)
        if _is_gone(executor):
            for future in futures:
                future.cancel()


def _is_gone(executor: Executor) -> bool:
    """Tells whether an executor is a Dask cluster whose scheduler is lost."""
    return getattr(getattr(executor, "_client", None), "status", "running") in ("closing", "closed", "failed")
