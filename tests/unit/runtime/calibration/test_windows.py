"""Windows hold all linear groups in order, as many as the memory allows, and estimates add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.graph.find.blocks import Block, Cut
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration.windows import HIDDEN_SHARE, PREPACK_BYTES, CalibrationMemory, prepacks, token_count
from tests.zoo import architectures as arch
from tests.zoo.chains import K, chain
from tests.zoo.nodes import random

RAGGED = [{"x": random(1, t, K, seed=t)} for t in (5, 9, 1, 12)]


@pytest.fixture
def chained(tmp_path):
    model = load(chain(tmp_path / "m.onnx"))
    return model, find_linear_groups(model, Recipe())[0]


def test_estimates_count_tokens_not_masks(chained):
    model, groups = chained
    ids = {"input_ids": np.zeros((2, 100), np.int64), "mask": np.zeros((2, 1, 100, 100), bool)}
    fixed = sum(4 * group.k**2 for group in groups) + 2 * sum(4 * group.k * group.n for group in groups[:-1])
    for feed in (ids, {"x": np.zeros((2, 100, K))}):
        needs = CalibrationMemory.of(model, groups, [feed])
        assert needs.collecting(groups, None) == fixed + 2 * sum(4 * group.k * 200 for group in groups)
        assert needs.collecting(groups[:1], None) + needs.collecting(groups[1:], groups[0]) == needs.collecting(
            groups, None
        )


def test_windows_cover_all_taps_in_order(chained):
    model, groups = chained
    needs = CalibrationMemory.of(model, groups, RAGGED)
    for budget in (0, 1, 50_000, 1 << 30):
        split = needs.windows(budget, [groups[:2], groups[2:]])
        assert [group for window in split for group in window] == groups
        assert all(split)
        assert max(len(window) for window in split) == 1 or needs.used(budget) <= budget + needs.between
    assert len(needs.windows(0, [groups])) == len(groups)
    assert len(needs.windows(1 << 30, [[group] for group in groups])) == 1


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    model = load(arch.decoder(tmp_path_factory.mktemp("w") / "m.onnx", layers=3))
    return CalibrationMemory.of(model, find_linear_groups(model, Recipe())[0], [arch.ids_feed(1, 20, layers=3)])


@given(st.integers(0, 1 << 21))
def test_more_memory_is_never_more_windows_and_every_one_fits(needs, budget):
    split = needs.windows(budget)
    assert [group for window in split for group in window] == [group for block in needs.blocks for group in block]
    assert len(needs.windows(2 * budget)) <= len(split)
    if budget >= needs.least() * HIDDEN_SHARE / (HIDDEN_SHARE - 1):
        assert needs.used(budget) <= budget + needs.between


def test_hidden_states_take_their_share_at_most_and_go_to_disk_beyond_it(needs):
    enough = HIDDEN_SHARE * needs.hidden
    assert (needs.remembered(enough), needs.spilled(enough)) == (needs.hidden, 0)
    assert needs.remembered(enough - HIDDEN_SHARE) == needs.hidden - 1
    assert needs.remembered(2 * enough) == needs.hidden
    assert needs.spilled(enough - HIDDEN_SHARE) == needs.hidden


def test_a_second_model_beside_it_takes_as_much_again(tmp_path, chained):
    model, groups = chained
    one, two = (CalibrationMemory.of(model, groups, RAGGED, models=count) for count in (1, 2))
    assert (two.hidden, two.between) == (2 * one.hidden, 2 * one.between)
    assert two.collecting(groups, None) == 2 * one.collecting(groups, None)


def test_statistics_that_are_shared_count_once(chained):
    model, groups = chained
    needs = CalibrationMemory.of(model, groups, RAGGED)
    again = replace(groups[0], name="again")
    assert needs.collecting([groups[0], again], None) == needs.collecting(groups[:1], None)


@pytest.mark.parametrize(
    ("feed", "tokens"),
    [
        ({"input_ids": np.ones((2, 7)), "mask": np.ones((2, 1, 7, 7))}, 14), ({"x": np.ones((2, 5, 8))}, 10),
        ({"x": np.ones((3, 8)), "wide": np.ones((4, 100))}, 4), ({"x": np.ones(6)}, 6), ({"s": np.ones(())}, 1),
        ({"past": np.ones((1, 2, 0, 8)), "other": np.ones((2, 0))}, 0), ({}, 0),
    ],
)  # fmt: skip
def test_tokens_of_a_sample(feed, tokens):
    assert token_count(feed) == tokens


@pytest.mark.parametrize(
    ("sizes", "rearranged"),
    [([], False), ([1, 1, PREPACK_BYTES + 1], True), ([1, PREPACK_BYTES + 1], False), ([PREPACK_BYTES], True)],
)
def test_whether_weights_are_rearranged_is_a_matter_of_the_middle_block(sizes, rearranged):
    blocks = tuple(Block((), (), (), size) for size in sizes)
    assert prepacks(Cut("", "repeated", "", None, blocks)) == rearranged
