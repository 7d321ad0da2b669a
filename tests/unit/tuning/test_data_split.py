"""Samples are shared out between calibration and the judge: each goes to one of them, and both get what they need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.configurations import named_recipes
from onnx_woq.tuning.data_split import HELD_OUT, MOST_HELD_OUT, split_data
from onnx_woq.tuning.options import CalibrationData


def samples(count):
    return [{"x": np.full((1, 2, 64), number, np.float32)} for number in range(count)]


def split(path, count, *, wanted=128, asked=None, judged=True, method="gptq"):
    """The numbers of the samples that calibrate, and of those held out."""
    data = CalibrationData(None if count is None else samples(count), asked)
    recipes = named_recipes([Recipe(method, nsamples=wanted)], data)
    found = split_data(load(path), path, recipes, data, judged=judged)
    return [[int(feed["x"][0, 0, 0]) for feed in part] for part in found]


@given(wanted=st.integers(1, 140), spare=st.integers(-20, 20) | st.integers(-140, 150), asked=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_sample_goes_to_one_of_them(enc, wanted, spare, asked):
    """As many are held out as the data has to spare, 8 or a third of them at least where a recipe merely takes many."""
    count = max(2, wanted + spare)
    if asked and count < wanted:
        with pytest.raises(DataError, match=f"{wanted} samples are asked for and the data has {count}"):
            split(enc, count, asked=wanted)
        return
    calibrating, held = split(enc, count, **({"asked": wanted} if asked else {"wanted": wanted}))
    assert calibrating + held == list(range(min(count, wanted + MOST_HELD_OUT)))
    assert calibrating
    assert held
    if count - wanted >= HELD_OUT or (asked and count > wanted):
        assert len(calibrating) == wanted
    else:
        assert len(held) == min(HELD_OUT, max(1, count // 3))


@pytest.mark.parametrize("count", [0, 1])
def test_the_judge_needs_one_sample_beside_one_that_calibrates(count, enc):
    with pytest.raises(DataError):
        split(enc, count)


def test_what_needs_no_data_reads_none(enc):
    assert split(enc, None, judged=False, method="rtn") == [[], []]
    with pytest.raises(DataError, match="the built-in judge needs"):
        split(enc, None, judged=True, method="rtn")
    with pytest.raises(DataError, match="GPTQ needs"):
        split(enc, None, judged=False)


def test_with_an_evaluation_of_the_users_own_all_samples_calibrate(enc):
    assert split(enc, 10, judged=False) == [list(range(10)), []]
    assert split(enc, 10, wanted=4, judged=False) == [list(range(4)), []]
    with pytest.raises(DataError):
        split(enc, 10, asked=11, judged=False)


def test_fewer_held_out_than_should_be_are_said(enc, caplog):
    """Where all samples are asked for, some are taken away."""
    assert [len(part) for part in split(enc, 9, asked=9)] == [6, 3]
    assert "3 of the 9 samples are held out" in caplog.text
    caplog.clear()
    split(enc, 30, asked=9)
    split(enc, 9, wanted=9)
    assert not caplog.records, "nothing that was asked for is taken away"
