"""Where a graph is cut: what repeats is found, what does not is balanced, and every value is reached once it is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.graph.find import blocks as module
from onnx_woq.graph.find.blocks import blocks_of, cuts, forget, groups_by_block, reach
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import clone, load
from onnx_woq.recipe import Recipe
from tests.zoo import architectures as arch
from tests.zoo.nodes import BOOL, graph, lower, node, random, value, write

K = 16


@pytest.fixture
def decoder(tmp_path):
    return load(arch.decoder(tmp_path / "m.onnx", layers=3))


def covered(marks, start, period, count):
    """How many marks a repetition covers, 0 if it is none."""
    pieces = [marks[start + i * period : start + (i + 1) * period] for i in range(count)]
    return count * period if all(piece == pieces[0] and len(piece) == period for piece in pieces) else 0


@given(st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_the_repetition_that_covers_most_is_found(marks):
    start, period, count = module._repetition(marks)
    size = len(marks)
    tried = [
        (covered(marks, s, p, c), -p)
        for p in range(1, size // 2 + 1) for s in range(size) for c in range(2, size // p + 1) if s + p * c <= size
    ]  # fmt: skip
    best = max(tried, default=(0, -1))
    if best[0]:
        assert (covered(marks, start, period, count), -period) == best
    else:
        assert (start, period, count) == (0, 1, 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_pieces_are_as_full_as_the_limit_allows(sizes, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_size", sum)
        pieces = module._balanced([[size] for size in sizes], limit)
    assert [size for piece in pieces for size in piece] == sizes
    assert all(sum(piece) <= limit or len(piece) == 1 or sum(piece[:-1]) == 0 for piece in pieces)
    assert all(sum(one) + other[0] > limit for one, other in itertools.pairwise(pieces))


@pytest.mark.parametrize(
    ("build", "kind", "count", "reason"),
    [
        (lambda p: arch.decoder(p, layers=3), "repeated", 4, "4 blocks, cut where the residual stream"),
        (arch.funnel, "balanced", 6, "nothing repeats: 6 blocks of about equal size"),
        (arch.tangle, "whole", 1, "runs whole: more than two values are alive"),
    ],
    ids=["layers", "no layers", "no place to cut"],
)
def test_the_kinds_of_cut(build, kind, count, reason, tmp_path):
    (cut,) = cuts(load(build(tmp_path / "m.onnx")))
    assert (cut.graph, cut.kind, len(cut.blocks)) == ("", kind, count)
    assert cut.reason.startswith(reason)


def test_one_product_is_nothing_to_cut(tmp_path):
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", ("m", K))], [value("y")], {"W": random(K, K)})
    model = load(write(tmp_path / "m.onnx", main))
    (cut,) = cuts(model)
    assert (cut.kind, cut.reason, cut.side) == ("whole", "runs whole: there is nothing to cut", None)
    (block,) = cut.blocks
    assert (block.values, block.inputs, block.outputs, block.weight_bytes) == (("y",), ("x",), ("y",), 4 * K * K)


def test_blocks_hand_on_the_residual_stream(decoder):
    (cut,) = cuts(decoder)
    crossing = [set(one.outputs) & set(other.inputs) for one, other in itertools.pairwise(cut.blocks)]
    assert crossing == [{"layer0.h2"}, {"layer1.h2"}, {"layer2.h2"}]


def test_groups_by_block_are_the_groups_in_order(decoder):
    groups, _ = find_linear_groups(decoder, Recipe())
    found = groups_by_block(decoder, groups)
    assert [group for _, members in found for group in members] == groups
    assert blocks_of(decoder, groups) == [members for _, members in found]
    assert [len(members) for _, members in found] == [4, 4, 4, 1]  # q k v, o, gate up, down; the head
    for block, members in found:
        assert {linear.name for group in members for linear in group.linears} <= set(block.values)


def test_a_cut_is_remembered_until_it_is_forgotten(decoder):
    first = cuts(decoder)
    assert cuts(clone(decoder))[0] is first[0]
    first.clear()
    assert len(cuts(decoder)) == 1, "a list of the caller's own"
    again = cuts(decoder)[0]
    forget(decoder)
    assert cuts(decoder)[0] == again
    assert cuts(decoder)[0] is not again


def test_reach_adds_up_weights_in_the_order_they_run_and_stays_when_they_are_quantized(decoder):
    before = reach(decoder)
    total, want = 0, {}
    for n in decoder.ir.graph:
        if n.op_type == "MatMul" and n.inputs[1].const_value is not None:
            total += n.inputs[1].const_value.nbytes
        want |= {v.name: total for v in n.outputs}
    assert before == want
    lower(decoder)
    forget(decoder)
    after = reach(decoder)
    assert {name: after[name] for name in before} == before


def test_of_two_branches_the_longer_one_is_waited_for(tmp_path):
    short = graph([node("MatMul", ["x", "A"], ["s"])], [], [value("s")])
    long = graph([node("MatMul", ["x", "A"], ["l1"]), node("MatMul", ["l1", "A"], ["l2"])], [], [value("l2")])
    nodes = [
        node("MatMul", ["x", "A"], ["h"]),
        node("If", ["flag"], ["y"], then_branch=short, else_branch=long),
        node("Neg", ["y"], ["z"]),
    ]
    inputs = [value("x", ("m", K)), value("flag", [], BOOL)]
    model = load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("z")], {"A": random(K, K)})))
    one = 4 * K * K
    assert reach(model) == {"h": one, "s": 2 * one, "l1": 2 * one, "l2": 3 * one, "y": 3 * one, "z": 3 * one}
