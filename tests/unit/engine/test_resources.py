"""Resources of a run: opened and closed with it, except what belongs to the caller."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.errors import MemoryLimit
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe


@pytest.fixture
def plan(enc):
    return make_plan(load(enc), Recipe())


def test_the_built_in_executor_ends_with_the_run(plan):
    with open_resources(plan, []) as resources:
        assert resources.executor.submit(lambda: 7).result() == 7
        assert resources.memory.workers == resources.executor._max_workers
        assert not resources.scarce
    with pytest.raises(RuntimeError, match="shutdown"):
        resources.executor.submit(lambda: 7)


def test_the_executor_of_the_caller_is_left_alone(plan):
    with ThreadPoolExecutor(3) as mine:
        with open_resources(plan, [], executor=mine) as resources:
            assert (resources.executor, resources.memory.workers) == (mine, 3)
        with pytest.raises(ZeroDivisionError), open_resources(plan, [], executor=mine):
            raise ZeroDivisionError
        assert mine.submit(lambda: 7).result() == 7


@pytest.mark.parametrize("limit", [None, 10 << 30])
def test_memory_is_scarce_where_there_is_a_limit(limit, plan):
    with open_resources(plan, [], executor=Serial(), max_memory=limit) as resources:
        assert resources.scarce == (limit is not None)
        assert limit is None or resources.memory.peak <= limit


def test_too_little_memory_is_refused_before_anything_begins(plan):
    begun = []
    with pytest.raises(MemoryLimit, match=r"give at least --max-memory \d+MiB"):  # noqa: SIM117
        with open_resources(plan, [], executor=Serial(), max_memory=1, announce=begun.append):
            begun.append("the work")
    assert begun == []


def test_people_are_told_of_memory_and_of_what_is_slow(enc):
    plan = make_plan(load(enc), Recipe(spec=Spec(4, 24), target="qdq"))
    lines = []
    with open_resources(plan, [], executor=Serial(), announce=lines.append) as resources:
        assert lines == [resources.memory.text, *plan.notes]
    assert len(lines) == 2


def test_progress_is_said_to_whoever_asked_for_it(plan):
    said = []
    with open_resources(plan, [], executor=Serial(), progress=lambda *what: said.append(what)) as resources:
        resources.say("solve", 3, 24)
    with open_resources(plan, [], executor=Serial()) as resources:
        resources.say("solve", 4, 24)
    assert said == [("solve", 3, 24)]
