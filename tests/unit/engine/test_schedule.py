"""Solving side by side: results come in order, never too many at once, and what an executor loses is solved here."""

from __future__ import annotations

import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from onnx_woq import Recipe
from onnx_woq.engine import executors, schedule
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.schedule import solve_all
from onnx_woq.engine.solve import solve_task, task_of
from tests.unit.engine.test_solve import arrays, weights_of


def made_of(task):
    return [(number, 1, lambda: task) for number in range(12)]


@pytest.fixture
def task(tmp_path):
    return task_of(Recipe(), weights_of(tmp_path)[0], None)


@pytest.mark.parametrize("executor", [Serial(), ThreadPoolExecutor(3)], ids=["serial", "threads"])
def test_results_come_in_order(executor, task):
    done = list(solve_all(made_of(task), executor, workers=3, most_bytes=99))
    assert [number for number, _ in done] == list(range(12))


@pytest.mark.parametrize(("workers", "most_bytes", "at_once"), [(1, 99, 1), (3, 99, 3), (3, 2, 2), (3, 0, 1)])
def test_no_more_are_solved_at_once_than_there_is_room_for(workers, most_bytes, at_once, task, monkeypatch):
    running, most, lock = [0], [0], threading.Lock()
    solve = schedule.solve_task

    def counted(task, parallel_map=map):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return solve(task)

    monkeypatch.setattr(schedule, "solve_task", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(solve_all(made_of(task), pool, workers=workers, most_bytes=most_bytes))) == 12
    assert most[0] == at_once


@pytest.mark.slow
def test_few_results_wait_behind_a_slow_one(task, monkeypatch):
    """What has been solved takes memory until it is taken."""
    drawn, gate = [], threading.Event()
    solve = schedule.solve_task

    def first_is_slow(task, parallel_map=map, seen=[]):  # noqa: B006
        seen.append(task)
        if len(seen) == 1:
            gate.wait(5)
        return solve(task)

    def tasks():
        for number, size, make in made_of(task):
            drawn.append(number)
            if number == 6:
                gate.set()
            yield number, size, make

    monkeypatch.setattr(schedule, "solve_task", first_is_slow)
    with ThreadPoolExecutor(2) as pool:
        assert [n for n, _ in solve_all(tasks(), pool, workers=2, most_bytes=99)] == list(range(12))


def test_the_next_is_drawn_only_when_the_last_has_been_taken(task):
    taken = []

    def tasks():
        for number, size, make in made_of(task):
            assert number % 3 or taken == list(range(number))
            yield number, size, make

    with ThreadPoolExecutor(3) as pool:
        settled = lambda number: number % 3 == 2  # noqa: E731
        for number, _ in solve_all(tasks(), pool, workers=3, most_bytes=99, barrier_after=settled):
            taken.append(number)


class Losing(Executor):
    """Loses every second task, one way or the other."""

    def __init__(self):
        self.count = 0

    def submit(self, fn, /, *args, **kwargs):
        self.count += 1
        future: Future = Future()
        if self.count % 4 == 1:
            raise BrokenExecutor("cannot take it")
        if self.count % 4 == 3:
            future.set_exception(BrokenExecutor("a worker died"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_lost_tasks_are_solved_here(task, caplog):
    want = arrays(solve_task(task))
    done = list(solve_all(made_of(task), Losing(), workers=2, most_bytes=99))
    assert [number for number, _ in done] == list(range(12))
    for _, solved in done:
        for a, b in zip(arrays(solved), want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert caplog.text.count("solved here") == 6


class Deserted(Executor):
    """A cluster whose scheduler goes away: what it has taken never ends."""

    def __init__(self, after):
        self._client, self.left = SimpleNamespace(status="running"), after

    def submit(self, fn, /, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self._client.status = "closed"
        return Future()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_cluster_that_is_gone_keeps_nobody_waiting(after, task, monkeypatch):
    monkeypatch.setattr(executors, "PATIENCE", 0.01)
    done = list(solve_all(made_of(task), Deserted(after), workers=3, most_bytes=99))
    assert [number for number, _ in done] == list(range(12))


def test_an_error_of_the_solver_is_raised_once_and_not_tried_again(task, monkeypatch):
    calls = []

    def failing(task, parallel_map=map):
        calls.append(task)
        raise ValueError("no")

    monkeypatch.setattr(schedule, "solve_task", failing)
    with pytest.raises(ValueError, match="no"):
        list(solve_all(made_of(task)[:1], Serial(), workers=1, most_bytes=9))
    assert len(calls) == 1


def test_where_memory_is_scarce_nobody_helps(task, monkeypatch):
    parallel_map = []
    monkeypatch.setattr(schedule, "solve_task", lambda task, way=map: (parallel_map.append(way), solve_task(task))[1])
    with ThreadPoolExecutor(2) as pool:
        for helping in (True, False):
            list(solve_all(made_of(task)[:1], pool, workers=2, most_bytes=99, helping=helping))
    assert [way is map for way in parallel_map] == [False, True]
