"""A budget that no mix keeps is refused with those that some mix keeps."""

from __future__ import annotations

import re

import pytest

from onnx_woq.errors import RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.tuning.budget import Budget
from onnx_woq.tuning.mixed.feasibility import check_reachable, check_sizes
from tests.zoo import small as zoo


def limits(mixer, kind):
    with pytest.raises(RecipeError) as refused:
        check_sizes(mixer, Budget(kind, 1e-3))
    pattern = r"have ([\d.]+) to ([\d.]+)" if kind == "bpw" else r"take ([\d,]+) to ([\d,]+) bytes"
    return [float(number.replace(",", "")) for number in re.search(pattern, str(refused.value)).groups()]


@pytest.mark.parametrize(("kind", "step"), [("bpw", 2e-3), ("size", 1)])
def test_the_ends_that_are_named_can_be_reached_and_nothing_beyond(kind, step, mixer):
    low, high = limits(mixer, kind)
    for value in (low + step, (low + high) / 2, high - step):
        check_sizes(mixer, Budget(kind, value))
    for value in (low - step, high + step):
        with pytest.raises(RecipeError, match="cannot be reached"):
            check_sizes(mixer, Budget(kind, value))


def test_the_ends_are_the_smallest_and_the_largest_mix(mixer):
    low, high = limits(mixer, "bpw")
    assert low == pytest.approx(mixer.bits_per_weight(mixer.smallest("stored").picks), abs=1e-3)
    assert high == pytest.approx(32, abs=1e-3), "of a model in single precision that stays float"


@pytest.mark.parametrize("kind", ["kl", "loss", "pareto"])
def test_other_budgets_have_no_size(kind, mixer):
    check_sizes(mixer, Budget(kind, 1e-9))


def test_a_divergence_needs_logits(mixer, tied, tmp_path):
    check_reachable(mixer, Budget("kl", 0.1), tied, zoo.lm_feeds(zoo.token_ids(1)))
    encoder = load(zoo.encoder(tmp_path / "enc.onnx"))
    with pytest.raises(RecipeError, match=r"enc\.onnx has no logits, so no KL divergence: ask for a size"):
        check_reachable(mixer, Budget("kl", 0.1), encoder, zoo.float_feeds(1))
    check_reachable(mixer, Budget("loss", 0.1), encoder, zoo.float_feeds(1))
