"""What the machine gives is asked of the system, and switches are put back however the work ends."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

import numpy as np
import pytest
import scipy.linalg.blas  # it has a BLAS of its own
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_woq.core.cpu import cores, no_garbage_search, one_blas_thread


def blas_threads():
    one = np.ones((2, 2))
    scipy.linalg.blas.dgemm(1.0, one, one @ one)
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_only_cores_that_this_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5} if pid == 0 else set(), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores() == 3


@pytest.mark.parametrize(("counted", "expected"), [(6, 6), (None, 1)])
def test_where_nobody_says_which_cores_all_of_them_count(counted, expected, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert cores() == expected


def test_blas_is_kept_to_one_thread_and_let_go_again():
    with threadpool_limits(2, user_api="blas"):
        if blas_threads() != {2}:
            pytest.skip("this BLAS does not take two threads")
        with suppress(KeyError), one_blas_thread():
            assert blas_threads() == {1}
            raise KeyError
        assert blas_threads() == {2}


def test_garbage_is_looked_for_again_after_an_error():
    assert gc.isenabled()
    with suppress(KeyError), no_garbage_search():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_only_who_turned_the_search_off_turns_it_on():
    with no_garbage_search():
        with no_garbage_search():
            pass
        assert not gc.isenabled()
    gc.disable()
    try:
        with no_garbage_search():
            pass
        assert not gc.isenabled(), "the caller had it off"
    finally:
        gc.enable()


def test_it_decorates_functions():
    @no_garbage_search()
    def work(a, *, b):
        return a + b, gc.isenabled()

    assert work(1, b=2) == (3, False)
    assert gc.isenabled()
