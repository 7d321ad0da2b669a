"""Memory that is freed goes back to the system where there is a limit."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from onnx_woq import quantize
from onnx_woq.engine import resources
from tests.zoo.nodes import graph, node, random, value, write

KEPT = """
import threading
import numpy as np
from onnx_woq.engine.memory import give_back_at_once, resident
give_back_at_once()
ready = threading.Barrier(7)
def work():
    for _ in range(4):
        np.ones(20 << 20, np.uint8)
    ready.wait()
    ready.wait()
before = resident()
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
ready.wait()
print(resident() - before)
ready.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_threads_do_not_keep_what_they_have_freed():
    """Six threads keep 126 MB of 20 that each has freed, left to themselves."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, check=True, timeout=60)
    assert int(done.stdout) < 16 << 20


@pytest.mark.parametrize("limit", [None, 10 << 30])
def test_only_a_limit_makes_it_give_back(limit, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(resources, "give_back_at_once", lambda: told.append(True))
    nodes = [node("MatMul", ["x", "A"], ["a"])]
    main = graph(nodes, [value("x", ("t", 96))], [value("a", ("t", 40))], {"A": random(96, 40)})
    quantize(write(tmp_path / "m.onnx", main), tmp_path / "q.onnx", max_memory=limit)
    assert told == [True] * (limit is not None)
