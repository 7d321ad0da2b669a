"""Tasks and executors: the same numbers everywhere, in order, never too many at once, and nothing is lost."""

from __future__ import annotations

import builtins
import pickle
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.cli import main
from onnx_woq.core.stats import Stats
from onnx_woq.engine import executors
from onnx_woq.engine import solve as solving
from onnx_woq.engine.executors import Serial, built_in, pool_map, workers_of
from onnx_woq.engine.memory import task_bytes
from onnx_woq.engine.solve import Solved, solve_all, solve_task, task_of
from onnx_woq.errors import ModelError, RecipeError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from tests.support.memory import peak_bytes
from tests.zoo.nodes import FLOAT16, graph, linear, node, random, value, write


def taps_of(tmp_path, dtype=np.float32, recipe=None, weights=None):
    """One tap with two weights, one of them stored transposed."""
    weights = weights or {"A": random(96, 40, dtype=dtype), "B": random(24, 96, seed=1, dtype=dtype)}
    proto = FLOAT16 if dtype is np.float16 else 1
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Gemm", ["x", "B"], ["b"], transB=1, alpha=0.5)]
    outputs = [value("a", ("t", 40), proto), value("b", ("t", 24), proto)]
    main = graph(nodes, [value("x", ("t", 96), proto)], outputs, weights)
    return find_linear_groups(load(write(tmp_path / "m.onnx", main, external=True)), recipe or Recipe())[0]


def stats_of(k):
    stats = Stats.empty(k)
    stats.update(random(200, k, seed=7) * np.linspace(0.1, 3, k, dtype=np.float32))
    return stats


def arrays(solved: Solved):
    return [array for packed in solved.packed for array in packed.arrays]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_task_that_has_travelled_gives_the_same_bits(method, dtype, tmp_path):
    recipe = Recipe(method, Spec(3, 32), options={"enable_mse_search": True})
    (group,) = taps_of(tmp_path, dtype, recipe)
    task = task_of(recipe, group, stats_of(96) if method != "rtn" else None)
    here, sent = solve_task(task), pickle.dumps(task)
    (tmp_path / "m.onnx.data").unlink()  # what has been read travels along
    there = solve_task(pickle.loads(sent))
    assert here.error == there.error
    for a, b in zip(arrays(here), arrays(there), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [p.n for p in here.packed] == [40, 24]


ADDED = Recipe("rtn", lowrank=16, bias_correction=True)


def test_what_is_added_travels_too(tmp_path):
    (group,) = taps_of(tmp_path, recipe=ADDED)
    task = task_of(ADDED, group, stats_of(96))
    here, there = solve_task(task), solve_task(pickle.loads(pickle.dumps(task)))
    assert [(p.k, p.n) for p in here.factors] == [(96, 16), (16, 40), (16, 24)]
    assert [b.shape for b in here.bias] == [(40,), (24,)]
    one, other = (
        [*(a for p in s.factors for a in p.arrays), *s.bias] for s in (here, pickle.loads(pickle.dumps(there)))
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_can_be_added_without_statistics(tmp_path):
    (group,) = taps_of(tmp_path, recipe=ADDED)
    with pytest.raises(ValueError, match="statistics"):
        solve_task(task_of(ADDED, group, None))


@pytest.mark.parametrize("field", [{"lowrank": 16}, {"bias_correction": True}, {"method": "gptq"}], ids=str)
def test_what_is_solved_another_way_is_not_taken_for_the_same(field, tmp_path):
    plain, other = Recipe(), Recipe(**field)
    (group,), (twin,) = (taps_of(tmp_path, recipe=recipe) for recipe in (plain, other))
    assert solving.cache_key(plain, group) == solving.cache_key(plain, taps_of(tmp_path, recipe=plain)[0])
    assert solving.cache_key(plain, group) != solving.cache_key(other, twin)
    assert solving.solves_alike(plain, Recipe())
    assert not solving.solves_alike(plain, other)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("k", "n"), [(700, 500), (300, 1200)])
def test_what_is_added_takes_the_memory_that_was_planned(method, k, n, tmp_path):
    recipe = Recipe(method, lowrank=32, bias_correction=True)
    solve_task(task_of(recipe, taps_of(tmp_path, recipe=recipe)[0], stats_of(96)))  # libraries are loaded
    (group,) = find_linear_groups(load(linear(tmp_path / "large.onnx", random(k, n), external=True)), recipe)[0]
    task = task_of(recipe, group, stats_of(k))
    peak = peak_bytes(lambda: solve_task(task))
    assert peak <= task_bytes(group, recipe) - 4 * k * k <= 1.4 * peak  # the statistics are there already


def test_half_precision_travels_as_it_is_stored(tmp_path):
    (group,) = taps_of(tmp_path, np.float16)
    scaled = 4 * 96 * 24  # alpha is multiplied in as the model would
    assert len(pickle.dumps(task_of(Recipe(), group, None))) < 2 * 96 * 40 + scaled + 2000


def test_weights_solved_alone_and_side_by_side_are_the_same(tmp_path):
    """Rounding needs no data, and none is made of several weights."""
    (group,) = taps_of(tmp_path)
    packed = solve_task(task_of(Recipe(), group, None)).packed
    whole = solve_task(solving.replace(task_of(Recipe(), group, None), stats=stats_of(96))).packed
    for one, other in zip(packed, whole, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(method, bad, tmp_path):
    weights = {"A": random(96, 40), "B": random(24, 96)}
    weights["B"][3, 5] = bad
    (group,) = taps_of(tmp_path, weights=weights)
    task = task_of(Recipe(method), group, None if method == "rtn" else stats_of(96))
    for one in (task, pickle.loads(pickle.dumps(task))):
        with pytest.raises(ModelError, match="'B' of 'a' has NaN or infinite"):
            solve_task(one)


def made_of(task):
    return [(number, 1, lambda: task) for number in range(12)]


@pytest.fixture
def task(tmp_path):
    return task_of(Recipe(), taps_of(tmp_path)[0], None)


@pytest.mark.parametrize("executor", [Serial(), ThreadPoolExecutor(3)], ids=["serial", "threads"])
def test_results_come_in_order(executor, task):
    done = list(solve_all(made_of(task), executor, workers=3, most_bytes=99))
    assert [number for number, _ in done] == list(range(12))


@pytest.mark.parametrize(("workers", "most_bytes", "at_once"), [(1, 99, 1), (3, 99, 3), (3, 2, 2), (3, 0, 1)])
def test_no_more_are_solved_at_once_than_there_is_room_for(workers, most_bytes, at_once, task, monkeypatch):
    running, most, lock = [0], [0], threading.Lock()
    solve = solving.solve_task

    def counted(task, parallel_map=map):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return solve(task)

    monkeypatch.setattr(solving, "solve_task", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(solve_all(made_of(task), pool, workers=workers, most_bytes=most_bytes))) == 12
    assert most[0] == at_once


def test_few_results_wait_behind_a_slow_one(task, monkeypatch):
    """What has been solved takes memory until it is taken."""
    drawn, gate = [], threading.Event()
    solve = solving.solve_task

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

    monkeypatch.setattr(solving, "solve_task", first_is_slow)
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

    monkeypatch.setattr(solving, "solve_task", failing)
    with pytest.raises(ValueError, match="no"):
        list(solve_all(made_of(task)[:1], Serial(), workers=1, most_bytes=9))
    assert len(calls) == 1


def test_workers_of_executors():
    assert workers_of(Serial()) == 1
    assert workers_of(ThreadPoolExecutor(5)) == 5
    assert workers_of(Losing()) >= 1


def test_an_unknown_executor_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean threads"), built_in("thread"):
        pass


def test_dask_without_distributed_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    taps_of(tmp_path)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "distributed":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    done = CliRunner().invoke(main, ["quantize", str(path), "-o", str(tmp_path / "q.onnx"), "--dask", "tcp://x:1"])
    assert done.exit_code == 2
    assert "onnx-woq[dask]" in done.stderr


@pytest.mark.parametrize(
    ("text", "count"),
    [("3GB", 3 * 10**9), ("800MB", 8 * 10**8), ("512MiB", 1 << 29), ("1.5 gb", 15 * 10**8), ("7", 7), ("2KiB", 2048)],
)
def test_sizes(text, count):
    from onnx_woq.cli.options import Size

    assert Size()(text) == count


@pytest.mark.parametrize("text", ["", "GB", "3XB", "-1GB", "0", "1e9", "3GBGB", "٣GB", "nan"])
def test_what_is_no_size(text, tmp_path):
    done = CliRunner().invoke(main, ["quantize", "m.onnx", "-o", "q.onnx", "--max-memory", text])
    assert done.exit_code == 2
    assert "is not a size" in done.stderr


def test_too_little_memory_is_an_error_before_the_work(tmp_path):
    taps_of(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(
        main, ["quantize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"), "--max-memory", "1MB"]
    )
    assert done.exit_code == 2
    assert "give at least --max-memory" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_processes_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    taps_of(tmp_path)
    data = [{"x": random(50, 96, seed=i)} for i in range(2)]
    quantize(tmp_path / "m.onnx", tmp_path / "a" / "q.onnx", Recipe("gptq"), data, executor=Serial())
    with built_in("processes") as pool:
        quantize(tmp_path / "m.onnx", tmp_path / "b" / "q.onnx", Recipe("gptq"), data, executor=pool)
    for name in ("q.onnx", "q.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_threads_with_nothing_to_do_help():
    """Two pieces that wait for each other: with one thread they never end."""
    both = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        parallel_map = pool_map(pool)
        ran = pool.submit(
            lambda: parallel_map(lambda piece: (both.wait(), threading.get_ident(), piece)[1:], "ab")
        ).result()
    assert [piece for _, piece in ran] == ["a", "b"]
    assert len({thread for thread, _ in ran}) == 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nobody_waits_for_help_that_never_comes(threads):
    """Every thread of the pool asks for help at once, and in what they do once more."""
    want = [[(a, b) for b in range(7)] for a in range(9)]
    with ThreadPoolExecutor(threads) as pool:
        parallel_map = pool_map(pool)
        table = lambda _: parallel_map(lambda a: parallel_map(lambda b: (a, b), range(7)), range(9))  # noqa: E731
        futures = [pool.submit(table, None) for _ in range(2 * threads)]
        assert all(future.result(timeout=20) == want for future in futures)


@pytest.mark.parametrize("pieces", [0, 1, 40])
def test_helped_is_map(pieces):
    with ThreadPoolExecutor(3) as pool:
        assert pool.submit(pool_map(pool), str, range(pieces)).result() == list(map(str, range(pieces)))


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_what_goes_wrong_in_a_piece_is_raised_and_the_rest_let_be(bad):
    begun = []

    def fail(piece):
        begun.append(piece)
        if piece == bad:
            raise FloatingPointError(f"piece {piece}")
        time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool, pytest.raises(FloatingPointError, match=f"piece {bad}"):
        pool.submit(pool_map(pool), fail, range(1000)).result()
    assert len(begun) < 100


def test_where_memory_is_scarce_nobody_helps(task, monkeypatch):
    parallel_map = []
    monkeypatch.setattr(solving, "solve_task", lambda task, way=map: (parallel_map.append(way), solve_task(task))[1])
    with ThreadPoolExecutor(2) as pool:
        for helping in (True, False):
            list(solve_all(made_of(task)[:1], pool, workers=2, most_bytes=99, helping=helping))
    assert [way is map for way in parallel_map] == [False, True]


def test_processes_are_not_waited_for_when_something_is_wrong():
    """Neither those that are at work nor those that a task is being sent to."""

    def busy():
        with built_in("processes") as pool:
            for _ in range(2 * workers_of(pool)):
                pool.submit(_slow_length, bytes(5_000_000))
            time.sleep(0.5)
            raise ValueError("wrong")

    start = time.monotonic()
    with pytest.raises(ValueError, match="wrong"):
        busy()
    assert time.monotonic() - start < 15


def _slow_length(content):
    time.sleep(60)
    return len(content)
