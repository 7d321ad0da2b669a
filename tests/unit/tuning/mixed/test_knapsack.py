"""Sharing bytes out over layers, against trying every combination."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnx_woq.tuning.mixed.knapsack import Choice, frontier, within_bytes, within_loss

CHOICES = st.builds(Choice, st.integers(0, 9), st.integers(0, 9).map(float))
UNITS = st.lists(st.lists(CHOICES, min_size=1, max_size=6), min_size=1, max_size=4)
BENT = [Choice(0, 9.0), Choice(4, 6.0), Choice(9, 0.0)]  # the middle one lies a little above the line


def everything(layers: list[list[Choice]]) -> list[tuple[int, float]]:
    """(bytes, loss) of every combination; whole numbers, so sums are exact."""
    return [(sum(c.bytes for c in picks), sum(c.loss for c in picks)) for picks in itertools.product(*layers)]


def totals(layers: list[list[Choice]], picks: tuple[int, ...]) -> tuple[int, float]:
    chosen = [layer[pick] for layer, pick in zip(layers, picks, strict=True)]
    return sum(c.bytes for c in chosen), sum(c.loss for c in chosen)


@given(UNITS)
def test_no_combination_beats_a_frontier_point_at_its_bytes(layers):
    combinations = everything(layers)
    for point in frontier(layers):
        assert totals(layers, point.picks) == (point.bytes, point.loss)
        assert point.loss == min(loss for size, loss in combinations if size <= point.bytes)


@example([BENT, [Choice(0, 3.0), Choice(9, 0.0)]])
@given(UNITS)
def test_the_frontier_falls_from_the_fewest_bytes_to_the_least_loss(layers):
    points, combinations = frontier(layers), everything(layers)
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in itertools.pairwise(points))
    assert points[0].bytes == min(size for size, _ in combinations)
    assert points[-1].loss == min(loss for _, loss in combinations)


@given(UNITS)
def test_slopes_get_flatter(layers):
    slopes = [(a.loss - b.loss) / (b.bytes - a.bytes) for a, b in itertools.pairwise(frontier(layers))]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(slopes))


@given(UNITS, st.integers(-1, 50))
def test_a_byte_budget_holds_and_is_never_worse_than_the_frontier(layers, budget):
    combinations = everything(layers)
    found = within_bytes(layers, budget)
    if found is None:
        assert all(size > budget for size, _ in combinations)
        return
    assert totals(layers, found.picks) == (found.bytes, found.loss)
    assert found.bytes <= budget
    assert found.loss <= min((p.loss for p in frontier(layers) if p.bytes <= budget), default=math.inf)
    for layer, pick in zip(layers, found.picks, strict=True):  # no single change is left that fits and helps
        old = layer[pick]
        assert not any(c.loss < old.loss and found.bytes - old.bytes + c.bytes <= budget for c in layer)


@given(UNITS, st.integers(-1, 50))
def test_a_loss_limit_holds_and_takes_no_more_bytes_than_the_frontier(layers, limit):
    combinations = everything(layers)
    found = within_loss(layers, limit)
    if found is None:
        assert all(loss > limit for _, loss in combinations)
        return
    assert totals(layers, found.picks) == (found.bytes, found.loss)
    assert found.loss <= limit
    assert found.bytes <= min((p.bytes for p in frontier(layers) if p.loss <= limit), default=math.inf)


def test_the_gap_that_one_large_unit_leaves_is_filled_by_small_ones():
    """The next point of the frontier takes the large layer; until then its bytes go to the small layers."""
    large = [Choice(0, 1000.0), Choice(100, 0.0)]
    small = [Choice(0, 5.0), Choice(10, 0.0)]
    layers = [large, *[small] * 6]
    assert [p.bytes for p in frontier(layers)] == [0, 100, 110, 120, 130, 140, 150, 160]
    assert (within_bytes(layers, 99).bytes, within_bytes(layers, 99).loss) == (60, 1000.0)
    assert within_bytes(layers, 115).picks == (1, 1, 0, 0, 0, 0, 0)


def test_filling_starts_on_the_frontier_and_takes_what_saves_most():
    dear, cheap = [Choice(0, 10.0), Choice(10, 0.0)], [Choice(0, 9.0), Choice(5, 0.0)]
    assert within_bytes([dear, cheap, cheap], 10).picks == (0, 1, 1)
    assert within_loss([dear, cheap, cheap], 10.0).picks == (0, 1, 1)
    less, more, large = (
        [Choice(0, 5.0), Choice(5, 1.0)],
        [Choice(0, 8.0), Choice(8, 3.0)],
        [Choice(0, 99.0), Choice(20, 0.0)],
    )
    assert within_bytes([large, less, more], 8).picks == (0, 0, 1)


def test_a_choice_above_the_hull_is_taken_where_it_fits():
    layers = [[Choice(0, 10.0), Choice(4, 8.0), Choice(10, 0.0)]]
    assert [p.bytes for p in frontier(layers)] == [0, 10]
    assert within_bytes(layers, 9).picks == (1,)
    assert within_loss(layers, 9.0).picks == (1,)


@given(UNITS, st.randoms())
def test_the_order_of_choices_does_not_matter(layers, random):
    shuffled = [random.sample(layer, len(layer)) for layer in layers]
    assert [(p.bytes, p.loss) for p in frontier(layers)] == [(p.bytes, p.loss) for p in frontier(shuffled)]


def test_the_same_question_has_the_same_answer():
    layers = [[Choice(3, 4.0), Choice(3, 4.0), Choice(5, 2.0)]] * 3  # everything is a tie
    assert frontier(layers) == frontier(layers)
    assert [p.picks for p in frontier(layers)] == [(0, 0, 0), (2, 0, 0), (2, 2, 0), (2, 2, 2)]


def test_one_choice_and_equal_bytes_and_no_loss():
    assert [(p.bytes, p.loss, p.picks) for p in frontier([[Choice(7, 3.0)]])] == [(7, 3.0, (0,))]
    assert [p.picks for p in frontier([[Choice(7, 3.0), Choice(7, 1.0)]])] == [(1,)]
    assert [p.picks for p in frontier([[Choice(9, 0.0), Choice(2, 0.0)]] * 2)] == [(1, 1)]
    assert within_bytes([[Choice(7, 3.0)]], 6) is None
    assert within_loss([[Choice(7, 3.0)]], 2.9) is None


@pytest.mark.parametrize(
    ("layers", "word"),
    [([], "layer"), ([[]], "choice"), ([[Choice(1, math.nan)]], "finite"), ([[Choice(1, -1.0)]], "negative")],
)
def test_what_cannot_be_shared_out_is_refused(layers, word):
    with pytest.raises(ValueError, match=word):
        frontier(layers)
