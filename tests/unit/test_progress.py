"""Whoever reports progress counts as the type says: a stage, steps done, steps in all, and it arrives at the end."""

from __future__ import annotations

import inspect
import itertools
from typing import get_args

import pytest

import onnx_woq
from onnx_woq.progress import Progress
from onnx_woq.tuning.options import RunResources
from tests.zoo import small as zoo


@pytest.mark.parametrize("function", [onnx_woq.quantize, onnx_woq.evaluate, RunResources])
def test_long_work_takes_a_callback_of_this_type(function):
    annotation = inspect.signature(function).parameters["progress"].annotation
    assert annotation in ("Progress | None", Progress | None)
    assert get_args(Progress)[0] == [str, int, int]


@pytest.mark.parametrize("recipe", ["RTN_G32ASYM", "GPTQ_G32ASYM"])
def test_every_stage_counts_up_to_its_total(recipe, tmp_path):
    calls = []
    model = zoo.language_model(tmp_path / "lm.onnx")
    data = zoo.lm_feeds(zoo.token_ids(2, length=8))
    progress = lambda *call: calls.append(call)  # noqa: E731
    onnx_woq.quantize(model, tmp_path / "q.onnx", recipe, data, progress=progress)
    onnx_woq.evaluate(tmp_path / "q.onnx", model, data, progress=progress)
    assert {tuple(map(type, call)) for call in calls} == {(str, int, int)}
    for stage, group in itertools.groupby(sorted(calls, key=lambda call: call[0]), key=lambda call: call[0]):
        steps = list(group)
        assert all(0 <= done <= total for _, done, total in steps), stage
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps), stage
        assert steps[-1][1] == steps[-1][2], stage
    assert {call[0] for call in calls} >= {"solve", "evaluate"}
