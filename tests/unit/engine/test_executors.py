"""What executors have in common: a future for all they are given, a failed one where nothing is taken any more."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import BrokenExecutor, CancelledError, Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from onnx_woq.core.cpu import cores
from onnx_woq.engine import executors
from onnx_woq.engine.executors import (
    EXECUTORS,
    Serial,
    built_in,
    leaves_process,
    pickled,
    pool_map,
    result_of,
    submitted,
    wait_for_any,
    workers_of,
)
from tests.support.commands import spawning


class Cluster:
    """What a Dask client gives as its executor, as far as anyone here asks: it keeps what it is given."""

    def __init__(self, status="running", threads=()):
        self._client = SimpleNamespace(status=status, nthreads=lambda: dict(threads))
        self.given = []

    def submit(self, *given, **named):
        self.given.append((given, named))
        return Future()


@pytest.mark.parametrize("name", EXECUTORS)
def test_built_in_ones_work_where_they_say_and_end_with_the_block(name):
    with built_in(name) as executor:
        assert executor.submit(divmod, 17, 5).result() == (3, 2)
        assert (executor.submit(os.getpid).result() != os.getpid()) == leaves_process(executor) == (name == "processes")
        assert workers_of(executor) == (1 if name == "serial" else cores())
    if name != "serial":
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(divmod, 17, 5)


def test_one_by_one_is_at_once_and_an_error_is_the_result():
    done = []
    future = Serial().submit(done.append, 7)
    assert done == [7]
    assert future.done()
    assert isinstance(Serial().submit(divmod, 1, 0).exception(), ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):  # no task's result: it ends what submits it
        Serial().submit(interrupt)


def interrupt():
    raise KeyboardInterrupt


def test_what_takes_nothing_any_more_gives_a_failed_future():
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    assert isinstance(submitted(ended, divmod, 17, 5).exception(), RuntimeError)
    for status in ("closing", "closed", "failed"):
        gone = Cluster(status)
        assert isinstance(submitted(gone, divmod, 17, 5).exception(), BrokenExecutor)
        assert gone.given == []


def test_a_cluster_is_asked_for_no_hash_of_what_it_is_given():
    there = Cluster()
    assert not submitted(there, divmod, 17, 5).done()
    assert there.given == [((divmod, 17, 5), {"pure": False})]
    with ThreadPoolExecutor(1) as pool:
        assert result_of(submitted(pool, divmod, 17, 5), pool) == (3, 2)


@pytest.mark.parametrize(("threads", "count"), [({}, 1), ({"a": 2, "b": 3}, 5)])
def test_a_cluster_works_with_all_of_its_threads(threads, count):
    assert workers_of(Cluster(threads=threads)) == count
    assert leaves_process(Cluster())


def test_nobody_waits_for_a_cluster_that_is_gone(monkeypatch):
    """Its futures are cancelled; of one that is there, the first to end is enough."""
    monkeypatch.setattr(executors, "PATIENCE", 0.01)
    waiting, ready = Future(), Future()
    ready.set_result(7)
    wait_for_any([waiting, ready], Cluster())
    assert not waiting.done()
    cluster = Cluster()
    cluster._client.status = "closed"
    with pytest.raises(CancelledError):
        result_of(waiting, cluster)


def test_what_is_sent_to_a_process_is_pickled_by_it_or_by_what_a_cluster_brings():
    here = lambda: 7  # noqa: E731
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickled(here, Serial())
    pytest.importorskip("cloudpickle")
    assert pickle.loads(pickled(here, Cluster()))() == 7
    assert pickle.loads(pickled(divmod, Serial())) is divmod


def test_blas_of_another_process_is_kept_to_one_thread():
    with spawning(1) as pool:
        assert set(pool.submit(blas_threads, before=2).result()) == {2}
        assert set(pool.submit(blas_threads, keep=True).result()) == {1}
        assert set(pool.submit(blas_threads).result()) == {1}, "for the rest of the process"


def blas_threads(before=0, keep=False):
    import scipy.linalg.blas  # noqa: F401
    import threadpoolctl

    if before:
        threadpoolctl.threadpool_limits(before, "blas")
    if keep:
        executors.keep_blas_to_one_thread()
    return [one["num_threads"] for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"]


def test_pieces_of_a_task_keep_their_order_and_each_is_done_once():
    """The first is done last, as long as anybody helps."""
    seen, last = [], threading.Event()

    def square(piece):
        if piece == 0:
            last.wait(5)
        seen.append(piece)
        if piece == 199:
            last.set()
        return piece * piece

    with ThreadPoolExecutor(4) as pool:
        got = pool.submit(pool_map(pool), square, range(200)).result()
    assert got == [piece * piece for piece in range(200)]
    assert sorted(seen) == list(range(200))
    assert seen[-1] == 0
