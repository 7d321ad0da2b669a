"""Solving side by side: which task starts when, and what happens to one that an executor loses."""

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
    """A result, or what the solver raised: errors of the executor itself come as exceptions."""

    solved: Solved | None
    error: Exception | None


@dataclass
class _Job(Generic[T]):
    """A task on its way, kept for the case that it is lost."""

    item: T
    size: int
    task: Task | None
    future: Future[_Outcome]

    def is_done(self) -> bool:
        """Tells whether nothing runs for it any more; lets go of what a finished task was made of."""
        if not self.future.done():
            return False
        if not self.future.cancelled() and self.future.exception() is None:
            self.task = None
        return True

    def result(self, executor: Executor) -> Solved:
        """Waits for the result, and solves the task here if the executor has lost it."""
        task = self.task
        try:
            outcome = result_of(self.future, executor)
        except Exception as error:
            if task is None:  # cannot be: it is let go only with a result
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
    """Solves tasks side by side and gives the results in order.

    A task is made only when there is room for it: never more than `workers` are being solved, together they never take
    more than `most_bytes` unless there is only one, and as many at most wait for their turn to be taken. A task that
    the executor loses (a killed worker, a broken pool) is solved again in this process, with the same result.

    Args:
        tasks: what each one is for, the bytes it takes, and how to make it; what is known already may be its result.
        executor: where they run.
        workers: at a time.
        most_bytes: at a time.
        settled_after: for which of them the next task is only asked for when all results have been taken.
        helping: threads with nothing to do take pieces of a task that is being solved, and memory for these.

    Raises:
        OnnxWoqError: what a solver raises, in the order of the tasks.
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
        if isinstance(executor, ThreadPoolExecutor):  # they read files that the caller may be about to remove
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
