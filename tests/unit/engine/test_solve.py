"""Tasks and executors: the same numbers everywhere, and nothing is lost."""

from __future__ import annotations

import builtins
import pickle
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.cli import main
from onnx_woq.core.stats import Stats
from onnx_woq.engine.executors import Serial, built_in, pool_map, workers_of
from onnx_woq.engine.memory import task_bytes
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.solve import Solved, cache_key, solve_task, solves_alike, task_of
from onnx_woq.errors import ModelError, RecipeError
from onnx_woq.graph.io.model import load
from tests.support.memory import peak_bytes
from tests.zoo.nodes import FLOAT16, graph, linear, node, random, value, write


def plan_of(tmp_path, dtype=np.float32, recipe=None, weights=None):
    """One linear group of two weights, one of them stored transposed."""
    weights = weights or {"A": random(96, 40, dtype=dtype), "B": random(24, 96, seed=1, dtype=dtype)}
    proto = FLOAT16 if dtype is np.float16 else 1
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Gemm", ["x", "B"], ["b"], transB=1, alpha=0.5)]
    outputs = [value("a", ("t", 40), proto), value("b", ("t", 24), proto)]
    main = graph(nodes, [value("x", ("t", 96), proto)], outputs, weights)
    return make_plan(load(write(tmp_path / "m.onnx", main, external=True)), recipe or Recipe())


def weights_of(*args, **options):
    return plan_of(*args, **options).groups


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
    (group,) = weights_of(tmp_path, dtype, recipe)
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
    (group,) = weights_of(tmp_path, recipe=ADDED)
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
    (group,) = weights_of(tmp_path, recipe=ADDED)
    with pytest.raises(ValueError, match="statistics"):
        solve_task(task_of(ADDED, group, None))


@pytest.mark.parametrize("field", [{"lowrank": 16}, {"bias_correction": True}, {"method": "gptq"}], ids=str)
def test_what_is_solved_another_way_is_not_taken_for_the_same(field, tmp_path):
    plain, other = Recipe(), Recipe(**field)
    one, same, twin = (plan_of(tmp_path, recipe=recipe) for recipe in (plain, plain, other))
    assert cache_key(one, one.groups[0]) == cache_key(same, same.groups[0])
    assert cache_key(one, one.groups[0]) != cache_key(twin, twin.groups[0])
    assert solves_alike(plain, Recipe())
    assert not solves_alike(plain, other)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("k", "n"), [(700, 500), (300, 1200)])
def test_what_is_added_takes_the_memory_that_was_planned(method, k, n, tmp_path):
    recipe = Recipe(method, lowrank=32, bias_correction=True)
    solve_task(task_of(recipe, weights_of(tmp_path, recipe=recipe)[0], stats_of(96)))  # libraries are loaded
    (group,) = make_plan(load(linear(tmp_path / "large.onnx", random(k, n), external=True)), recipe).groups
    task = task_of(recipe, group, stats_of(k))
    peak = peak_bytes(lambda: solve_task(task))
    assert peak <= task_bytes(group, recipe) - 4 * k * k <= 1.4 * peak  # the statistics are there already


def test_half_precision_travels_as_it_is_stored(tmp_path):
    (group,) = weights_of(tmp_path, np.float16)
    scaled = 4 * 96 * 24  # alpha is multiplied in as the model would
    assert len(pickle.dumps(task_of(Recipe(), group, None))) < 2 * 96 * 40 + scaled + 2000


def test_weights_solved_alone_and_side_by_side_are_the_same(tmp_path):
    """Rounding needs no data, and none is made of several weights."""
    (group,) = weights_of(tmp_path)
    packed = solve_task(task_of(Recipe(), group, None)).packed
    whole = solve_task(replace(task_of(Recipe(), group, None), stats=stats_of(96))).packed
    for one, other in zip(packed, whole, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(method, bad, tmp_path):
    weights = {"A": random(96, 40), "B": random(24, 96)}
    weights["B"][3, 5] = bad
    (group,) = weights_of(tmp_path, weights=weights)
    task = task_of(Recipe(method), group, None if method == "rtn" else stats_of(96))
    for one in (task, pickle.loads(pickle.dumps(task))):
        with pytest.raises(ModelError, match="'B' of 'a' has NaN or infinite"):
            solve_task(one)


def test_workers_of_executors():
    assert workers_of(Serial()) == 1
    assert workers_of(ThreadPoolExecutor(5)) == 5
    assert workers_of(Executor()) >= 1


def test_an_unknown_executor_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean threads"), built_in("thread"):
        pass


def test_dask_without_distributed_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    weights_of(tmp_path)
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
    weights_of(tmp_path)
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
    weights_of(tmp_path)
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
