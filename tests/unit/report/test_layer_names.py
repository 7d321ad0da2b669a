"""Names of nodes say where a weight is: the number that repeats is the layer, and no two kinds are called alike."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnx_woq.report.layer_names import layer_positions, short_names


def test_a_layer_is_the_number_that_repeats():
    names = [f"/layers.{i}/mlp/fc{j}/MatMul" for i in range(4) for j in (1, 2)] + ["lm_head", "pooler.0"]
    assert layer_positions(names)[:4] == [
        (0, "/layers.#/mlp/fc1/MatMul"),
        (0, "/layers.#/mlp/fc2/MatMul"),
        (1, "/layers.#/mlp/fc1/MatMul"),
        (1, "/layers.#/mlp/fc2/MatMul"),
    ]
    assert layer_positions(names)[-2:] == [(None, "lm_head"), (None, "pooler.0")]
    assert layer_positions([]) == []


def test_names_that_say_nothing_are_told_apart_by_shape():
    shapes = [(64, 192), (64, 64), (64, 256), (256, 64)] * 5
    found = layer_positions([f"MatMul_{7 * i}" for i in range(20)], shapes)
    assert [layer for layer, _ in found] == [i // 4 for i in range(20)]
    assert [kind for _, kind in found[:4]] == [kind for _, kind in found[-4:]]
    assert len({kind for _, kind in found}) == 4


def test_labels_are_short_and_no_two_alike():
    kinds = [f"/{side}/layers.#/{block}/fc/MatMul" for side in ("enc", "dec") for block in ("attn", "mlp")]
    assert short_names(["/model/layers.#/mlp/up/MatMul_output_0", "logits"]) == ["mlp/up", "logits"]
    odd = [*kinds, "/", "", "#", *("x" * 90 + end for end in "ab"), "a/b", "a.b"]
    assert len(set(short_names(odd))) == len(odd)
    assert max(map(len, short_names(odd))) < 40


@given(st.lists(st.text("ab1/._#", max_size=8), max_size=12))
def test_any_names_get_a_place_each_and_kinds_get_labels_of_their_own(names):
    found = layer_positions(names)
    assert len(found) == len(names)
    assert all(kind.replace("#", str(layer), 1) == name for name, (layer, kind) in zip(names, found, strict=True)
               if layer is not None and "#" not in name and "0" not in name)  # fmt: skip
    kinds = list(dict.fromkeys(kind for _, kind in found))
    assert len(set(short_names(kinds))) == len(kinds)


@given(st.lists(st.text("01/#", max_size=6), max_size=12, unique=True))
@example(["a#0", "a#1", "a0#", "a1#"])
@example(["a0", "a1", "a00"])
def test_no_two_weights_share_a_place(names):
    """A kind is called by a name with # for the layer, and a name may have a # of its own."""
    found = [place for place in layer_positions(names) if place[0] is not None]
    assert len(set(found)) == len(found)


def test_a_name_with_a_sign_of_its_own_keeps_its_kind():
    names = [f"a#{i}" for i in range(3)] + [f"a{i}#" for i in range(1, 4)]
    assert layer_positions(names) == [(i, "a##") for i in range(3)] + [(i, "a## (2)") for i in range(1, 4)]


def test_of_two_numbers_the_one_that_takes_more_values_is_the_layer():
    names = [f"block{b}.layer{i}.fc" for b in range(2) for i in range(3)]
    assert layer_positions(names)[4] == (1, "block1.layer#.fc")


@pytest.mark.parametrize("names", [["fc1"], ["a", "b"], ["x1", "y1"]])
def test_what_repeats_nowhere_has_no_layer(names):
    assert layer_positions(names) == [(None, name) for name in names]
