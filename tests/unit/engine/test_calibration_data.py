"""Calibration data: as much as is asked for, refused by the name of what needs it, told apart by a hash."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq import quantize
from onnx_woq.engine.calibration_data import calibrated_on, feeds_hash, read_data, warn_of_few_tokens
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo import small as zoo
from tests.zoo.nodes import linear, random


def read(path, data, recipe, samples, *, at_most=False):
    return read_data(load(path), path, data, recipe, samples, None, at_most=at_most)


def test_another_amount_of_data_changes_nothing_else():
    recipe = Recipe("gptq", nsamples=7, pad_max_length=99)
    assert calibrated_on(recipe, None, None) is recipe
    changed = calibrated_on(recipe, 3, 50)
    assert (changed.nsamples, changed.pad_max_length) == (3, 50)
    assert calibrated_on(changed, 7, 99) == recipe
    assert calibrated_on(recipe, 3, None) == calibrated_on(recipe, 3, 99)
    assert calibrated_on(recipe, None, 50) == calibrated_on(recipe, 7, 50)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (Recipe("gptq"), "GPTQ needs"),
        (Recipe(bias_correction=True), "bias_correction needs"),
        (Recipe("awq", lowrank=16), "AWQ and lowrank need"),
        (Recipe(asymmetric_calibration=True), "(both_streams|asymmetric_calibration) needs"),
        (Recipe(), "the built-in judge needs"),
    ],
    ids=str,
)
def test_whoever_needs_data_is_named_where_there_is_none(recipe, named, enc):
    with pytest.raises(DataError, match=named.replace("need", "needs?")) as refused:
        read(enc, None, recipe, 4)
    assert "--calib" in str(refused.value)


def test_as_many_samples_as_are_asked_for(enc, enc_data):
    assert [feed["x"].tobytes() for feed in read(enc, enc_data, Recipe("gptq"), 5)] == [
        feed["x"].tobytes() for feed in enc_data[:5]
    ]
    assert len(read(enc, enc_data, Recipe("gptq"), len(enc_data) + 9, at_most=True)) == len(enc_data)


def test_samples_are_as_long_as_the_recipe_says(lm, lm_data):
    ids = [feed["input_ids"] for feed in read(lm, lm_data, Recipe("gptq", pad_max_length=10), 3)]
    assert {one.shape for one in ids} == {(1, 10)}
    np.testing.assert_array_equal(ids[0], lm_data[0]["input_ids"][:, :10])
    with pytest.raises(DataError):
        read(lm, lm_data, Recipe("gptq", pad_max_length=1000, use_max_length=True), 3)


def test_a_hash_tells_data_apart():
    data = zoo.float_feeds(3)
    assert feeds_hash([]) == ""
    assert feeds_hash(data) == feeds_hash([{name: array.copy() for name, array in feed.items()} for feed in data])
    touched = [{"x": feed["x"].copy()} for feed in data]
    touched[1]["x"][0, 0, 0] = np.nextafter(touched[1]["x"][0, 0, 0], np.float32(9))
    others = [touched, data[:2], data[::-1], [{"z": feed["x"]} for feed in data]]
    assert len({feeds_hash(one) for one in (data, *others)}) == 5


def test_fewer_tokens_than_inputs_are_said(enc, caplog):
    weights = make_plan(load(enc), Recipe("gptq")).groups
    widest = max(weight.k for weight in weights)
    warn_of_few_tokens(weights, zoo.float_feeds(1, length=widest))
    warn_of_few_tokens(weights, [])
    assert not caplog.records
    warn_of_few_tokens(weights, zoo.float_feeds(1, length=widest - 1))
    assert f"{widest - 1} tokens, fewer than the {widest} inputs" in caplog.text


def test_quantize_warns_of_few_tokens(tmp_path, caplog):
    model = linear(tmp_path / "m.onnx", random(64, 48))
    for tokens, warned in ((8, True), (64, False)):
        caplog.clear()
        quantize(model, tmp_path / "q.onnx", "GPTQ_G32ASYM", [{"x": random(tokens, 64)}])
        assert ("fewer than the 64 inputs" in caplog.text) == warned
