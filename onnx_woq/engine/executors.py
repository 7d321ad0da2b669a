"""Executors that solve weights: the built-in ones, Dask clusters, and what all of them have in common.

An executor is anything with the protocol of `concurrent.futures.Executor`.
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
"""The built-in ones, by name."""

PATIENCE = 2.0
"""Seconds after which a cluster is asked whether it is still there."""

T = TypeVar("T")


class Serial(Executor):
    """Runs each task at once, in the thread that submits it."""

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
    """Opens one of `EXECUTORS`, as wide as the machine has cores; it is shut down at the end.

    Raises:
        RecipeError: there is none of that name.
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
    most = 61 if sys.platform == "win32" else cores()  # Windows waits for no more at a time
    return ProcessPoolExecutor(min(most, cores()), mp_context=spawn, initializer=_begin_process)


def _begin_process() -> None:
    """Prepares a worker: it ends with its parent, however that ends, and leaves an interrupt to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_processes(executor: Executor) -> None:
    """Ends workers for whose work nobody waits any more, which may be a long evaluation."""
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for process in list((executor._processes or {}).values()):
        process.terminate()
    if queue := getattr(executor, "_call_queue", None):
        queue._reader.close()  # or else, before Python 3.11.5, the thread that fills it waits for ever for a reader


@contextmanager
def dask_cluster(address: str) -> Iterator[Executor]:
    """Opens the workers of the Dask scheduler at `address`; they need this package, of this version.

    Raises:
        RecipeError: `distributed` is not installed, or there is no scheduler there.
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
    """Returns a `map` for a task in a thread of `pool`, in which threads with nothing to do help.

    Such a thread may never come: the caller goes through the pieces itself and only waits for those that are begun.
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
    """Tells whether the tasks of an executor run in other processes, as far as that is known."""
    return not isinstance(executor, Serial | ThreadPoolExecutor)


def pickled(thing: object, executor: Executor) -> bytes:
    """Bytes for `pickle.loads` in a worker; Dask brings cloudpickle, which takes what is defined in a notebook too.

    Raises:
        Exception: whatever comes of pickling what cannot be pickled.
    """
    brought = "cloudpickle" if hasattr(executor, "_client") else "pickle"
    content: bytes = importlib.import_module(brought).dumps(thing)
    return content


@lru_cache
def keep_blas_to_one_thread() -> object:
    """Limits BLAS to one thread for the rest of this process, which is not ours but an executor's."""
    return one_blas_thread()


def submitted(executor: Executor, function: Callable[..., T], /, *args: Any) -> Future[T]:
    """Submits `function(*args)`; returns a failed future if the executor takes nothing any more."""
    try:
        if _is_gone(executor):
            raise BrokenExecutor("the connection to the scheduler is lost")
        if not hasattr(executor, "_client"):
            return executor.submit(function, *args)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)  # that is what a task is
            return executor.submit(function, *args, pure=False)  # Dask: no hash over all of its bytes
    except Exception as error:  # a pool that is broken, a client that is closed
        future: Future[T] = Future()
        future.set_exception(error)
        return future


def result_of(future: Future[T], executor: Executor) -> T:
    """Waits for the result of a future.

    Raises:
        Exception: what the task has raised, or that the executor has lost it.
    """
    while not future.done():
        wait_for_any([future], executor)
    return future.result()


def wait_for_any(futures: Sequence[Future[Any]], executor: Executor) -> None:
    """Waits until one of `futures` is done; cancels them all where nobody is left to do them."""
    while not any(future.done() for future in futures):
        wait(futures, timeout=PATIENCE, return_when=FIRST_COMPLETED)
        if _is_gone(executor):
            for future in futures:
                future.cancel()


def _is_gone(executor: Executor) -> bool:
    """Tells whether an executor is a cluster whose scheduler is lost: its futures never end."""
    return getattr(getattr(executor, "_client", None), "status", "running") in ("closing", "closed", "failed")
