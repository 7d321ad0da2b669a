"""Scheduling: tasks are solved side by side within a memory budget, results come in order, lost tasks are repeated."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.engine.executors import pool_map, result_of, submitted, wait_for_any
from onnx_woq.engine.solve import Solved, Task, solve_task

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a task: a solution, or the error that the solver raised.

    The task returns both, so that an exception of its future is always an error of the executor itself.
    """

    solved: Solved | None
    error: Exception | None


@dataclass
class _Job(Generic[T]):
    """A task that was submitted.

    Attributes:
        item: whatever the task is for.
        size: the bytes that solving takes.
        task: the task, kept in case the executor loses it; None once it is solved.
        future: its outcome.
    """

    item: T
    size: int
    task: Task | None
    future: Future[_Outcome]

    def is_done(self) -> bool:
        """Tells whether the task runs no more; releases the weights and statistics of one that is solved."""
        if not self.future.done():
            return False
        if not self.future.cancelled() and self.future.exception() is None:
            self.task = None
        return True

    def result(self, executor: Executor) -> Solved:
        """Waits for the solution; solves the task in this process if the executor has lost it."""
        task = self.task
        try:
            outcome = result_of(self.future, executor)
        except Exception as error:
            if task is None:  # cannot happen: a task is released only once it is solved
                raise
            logger.warning("the executor lost a task (%s: %s): it is solved here", type(error).__name__, error)
            outcome = _attempt(task)
        if outcome.solved is None:
            raise outcome.error or RuntimeError("a task came back empty")
        return outcome.solved


def solve_all(
    tasks: Iterable[tuple[T, int, Callable[[], Task | Solved]]],
    executor: Executor,
    *,
    workers: int,
    most_bytes: int,
    barrier_after: Callable[[T], bool] = lambda _: False,
    helping: bool = True,
) -> Iterator[tuple[T, Solved]]:
    """Solves tasks side by side; yields (item, solution) in the order of the tasks.

    A task is made only when there is room for it: at most `workers` tasks are being solved, and together they take at
    most `most_bytes`, except that one task alone may take more. At most `workers` solutions more wait to be taken. If
    the executor loses a task (a killed worker, a broken pool), it is solved in this process, with the same result.

    Args:
        tasks: (item, bytes that solving takes, function that makes the task) for each; the function may return a
            solution instead, if it is known already.
        executor: runs the tasks.
        workers: the most tasks at a time.
        most_bytes: the most bytes at a time.
        barrier_after: tells whether the next task depends on the solution of an item; it is then asked for only after
            all solutions so far have been taken.
        helping: let idle threads of a thread pool take pieces of a task that is being solved, which takes more memory.

    Raises:
        OnnxWoqError: a solver raised it; errors come in the order of the tasks too.
    """
    jobs: deque[_Job[T]] = deque()
    helpers = (pool_map(executor),) if helping and isinstance(executor, ThreadPoolExecutor) else ()
    try:
        for item, size, make in tasks:
            while running := [job for job in jobs if not job.is_done()]:
                if len(running) < workers and sum(job.size for job in running) + size <= most_bytes:
                    break
                if jobs[0].is_done():
                    job = jobs.popleft()
                    yield job.item, job.result(executor)
                else:
                    wait_for_any([job.future for job in running], executor)
            task = make()
            if isinstance(task, Solved):
                jobs.append(_Job(item, 0, None, _finished(task)))
            else:
                jobs.append(_Job(item, size, task, submitted(executor, _attempt, task, *helpers)))
            del task
            while jobs and (barrier_after(item) or jobs[0].is_done() or len(jobs) > 2 * workers):
                job = jobs.popleft()
                yield job.item, job.result(executor)
        while jobs:
            job = jobs.popleft()
            yield job.item, job.result(executor)
    finally:
        left = [job.future for job in jobs if not job.future.cancel()]
        if isinstance(executor, ThreadPoolExecutor):  # threads still read files that the caller may be about to remove
            wait(left)


def _attempt(task: Task, parallel_map: ParallelMap = map) -> _Outcome:
    try:
        return _Outcome(solve_task(task, parallel_map), None)
    except Exception as error:
        return _Outcome(None, error)


def _finished(solved: Solved) -> Future[_Outcome]:
    future: Future[_Outcome] = Future()
    future.set_result(_Outcome(solved, None))
    return future
