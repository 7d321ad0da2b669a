"""What a model wants to be fed is read from it, and what follows from the tokens is made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.data.inputs import InputInfo, can_fill, fill, is_decoder, is_past, model_inputs
from tests.unit.runtime.data.test_feeds import ROWS, ints, read
from tests.zoo.chains import VOCABULARY, K
from tests.zoo.nodes import INT64, graph, node, random, run, value, write

INT32 = 6


def test_what_a_model_wants(lm, tmp_path):
    ids, mask, positions, past = lm
    assert (ids.name, ids.dtype, ids.shape) == ("input_ids", np.int64, ("batch_size", "sequence_length"))
    assert ids.limit == VOCABULARY, "the rows of the embedding"
    assert positions.limit == 256
    assert mask.limit is None
    assert past.shape == ("batch_size", 1, "past_length", K)
    assert str(past) == f"past_key_values.0.key float32 [batch_size, 1, past_length, {K}]"


def test_the_limit_is_seen_behind_a_cast(tmp_path):
    nodes = [node("Cast", ["input_ids"], ["c"], to=6), node("Gather", ["table", "c"], ["y"])]
    main = graph(nodes, [value("input_ids", ("b", "t"), INT64)], [value("y")], {"table": random(11, K)})
    assert model_inputs(load(write(tmp_path / "m.onnx", main)))[0].limit == 11


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("genai_config.json", {"model": {"decoder": {"head_size": 24, "hidden_size": 9}}}, 24),
        ("config.json", {"hidden_size": 96, "num_attention_heads": 4}, 24),
        ("config.json", {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32}, 32),
        ("config.json", {"hidden_size": 96, "num_attention_heads": 0}, "head"),
        ("config.json", [], "head"),
    ],
)
def test_an_open_head_size_is_read_from_the_configuration(name, config, size, tmp_path):
    inputs = [value("input_ids", ("b", "t"), INT64), value("past_key_values.0.key", ("b", 2, "past", "head"))]
    main = graph([node("Identity", ["past_key_values.0.key"], ["y"])], inputs, [value("y")])
    path = write(tmp_path / "m.onnx", main)
    assert model_inputs(load(path))[1].shape == ("b", 2, "past", "head")
    (tmp_path / name).write_text(json.dumps(config))
    found = model_inputs(load(path))
    assert found[1].shape == ("b", 2, "past", size)
    (feed,) = read([{"input_ids": ROWS[0]}], found, samples=1)
    assert feed["past_key_values.0.key"].shape == (1, 2, 0, 0 if size == "head" else size)


def test_everything_is_filled_in(lm):
    (feed,) = read([{"input_ids": ROWS[1]}], lm, samples=1)
    assert list(feed) == [info.name for info in lm], "in the model's order"
    assert np.array_equal(feed["input_ids"], ROWS[1])
    assert np.array_equal(feed["attention_mask"], np.ones((1, 9)))
    assert np.array_equal(feed["position_ids"], np.arange(9)[None])
    assert feed["past_key_values.0.key"].shape == (1, 1, 0, K)
    assert {name: a.dtype for name, a in feed.items()} == {info.name: info.dtype for info in lm}


def test_positions_follow_the_mask(lm):
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    (feed,) = read([{"input_ids": np.ones_like(mask), "attention_mask": mask}], lm, samples=1)
    assert np.array_equal(feed["position_ids"], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]])
    assert feed["past_key_values.0.key"].shape == (2, 1, 0, K)


def test_inputs_of_other_exports():
    inputs = [
        ints("input_ids", "b", "s"),
        ints("attention_mask", "b", "total"),
        ints("token_type_ids", "b", "s"),
        ints("cache_position", "s"),
        ints("num_logits_to_keep"),
        InputInfo("use_cache_branch", np.dtype(bool), (1,)),
        InputInfo("past_key_values.0.key", np.dtype(np.float16), (None, 4, None, 8)),
        InputInfo("past_key_values.0.value", np.dtype(np.float32), ("past_seq", "batch", 4, 8)),
    ]
    (feed,) = read([{"input_ids": np.ones((3, 7), np.int64)}], inputs, samples=1)
    assert np.array_equal(feed["token_type_ids"], np.zeros((3, 7)))
    assert np.array_equal(feed["cache_position"], np.arange(7))
    assert feed["num_logits_to_keep"].shape == ()
    assert np.array_equal(feed["use_cache_branch"], [False])
    assert (feed["past_key_values.0.key"].shape, feed["past_key_values.0.key"].dtype) == ((3, 4, 0, 8), np.float16)
    assert feed["past_key_values.0.value"].shape == (0, 3, 4, 8)


def test_masks_of_an_encoder_and_a_decoder():
    hidden = InputInfo("encoder_hidden_states", np.dtype(np.float32), ("b", "enc", 8))
    inputs = [ints("input_ids", "b", "s"), ints("encoder_attention_mask", "b", "enc"), hidden]
    sample = {"input_ids": np.ones((2, 7), np.int64), "encoder_hidden_states": random(2, 5, 8)}
    (feed,) = read([sample], inputs, samples=1)
    assert np.array_equal(feed["encoder_attention_mask"], np.ones((2, 5))), "as long as what it masks"
    both = [ints(name, "b", length) for name, length in (("input_ids", "s"), ("attention_mask", "s"))]
    both += [ints(name, "b", "t") for name in ("decoder_input_ids", "decoder_attention_mask")]
    (feed,) = read(
        [{"input_ids": np.ones((1, 7), np.int64), "decoder_input_ids": np.ones((1, 4), np.int64)}], both, samples=1
    )
    assert [feed[name].shape for name in ("attention_mask", "decoder_attention_mask")] == [(1, 7), (1, 4)]
    with pytest.raises(DataError, match="no encoder_attention_mask"):
        read([sample], inputs[:2], samples=1)


def windowed(path, cache=1):
    """Attention whose cache holds a window of 8 tokens, as the genai builder writes it."""
    past = [value(name, ("b", 2, "past", 16)) for name in ("past_key_values.0.key", "past_key_values.0.value")]
    attributes = {"num_heads": 2, "kv_num_heads": 2, "local_window_size": 8, "sliding_window_cache": cache}
    nodes = [
        node("Gather", ["table", "input_ids"], ["h"]),
        node("ReduceSum", ["attention_mask", "one"], ["total"], keepdims=0),
        node("Sub", ["total", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=INT32),
        node("ReduceMax", ["total"], ["most"], keepdims=0),
        node("Cast", ["most"], ["length"], to=INT32),
        node("GroupQueryAttention", ["h", "h", "h", past[0].name, past[1].name, "seqlens", "length"], ["y", "k", "v"],
             domain="com.microsoft", **attributes),
    ]  # fmt: skip
    ids = [value(name, ("b", "t"), INT64) for name in ("input_ids", "attention_mask")]
    outputs = [value("y", ("b", "t", 32)), *(value(name, ("b", 2, "p", 16)) for name in "kv")]
    weights = {"table": random(VOCABULARY, 32), "one": np.array([1])}
    return write(path, graph(nodes, [*ids, *past], outputs, weights), opset=17, domains={"com.microsoft": 1})


def test_a_past_has_room_for_the_window_that_its_attention_wants(tmp_path):
    path = windowed(tmp_path / "m.onnx")
    plain = windowed(tmp_path / "p.onnx", cache=0)
    inputs = model_inputs(load(path))
    assert [info.capacity for info in inputs] == [0, 0, 8, 8]
    assert [info.capacity for info in model_inputs(load(plain))] == [0] * 4
    for length in (5, 20):
        ids = np.arange(length)[None] + 1
        (feed,) = read([{"input_ids": ids}], inputs, samples=1)
        assert feed["past_key_values.0.key"].shape == (1, 2, 8, 16)
        (full,) = read([{"input_ids": ids}], model_inputs(load(plain)), samples=1)
        assert full["past_key_values.0.key"].shape == (1, 2, 0, 16)
        np.testing.assert_allclose(run(path, feed, ["y"])[0], run(plain, full, ["y"])[0], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_made_up_is_named(lm):
    inputs = [*lm, InputInfo("encoder_hidden_states", np.dtype(np.float32), ("b", "enc", 8))]
    with pytest.raises(
        DataError, match=r"no encoder_hidden_states float32 \[b, enc, 8\].*keys input_ids, encoder_hidden"
    ):
        read(ROWS[:1] and [{"input_ids": ROWS[0]}], inputs, samples=1)


def test_inputs_that_cannot_be_fed(tmp_path):
    main = graph([node("Identity", ["x"], ["y"])], [value("x", ("n",), 8)], [value("y", ("n",), 8)])
    with pytest.raises(DataError, match="'x' of the model is not a tensor of numbers"):
        model_inputs(load(write(tmp_path / "m.onnx", main)))


@pytest.mark.parametrize(
    ("info", "possible"),
    [
        (ints("attention_mask", "b", "t"), True), (ints("attention_mask", "b", 1, "t", "t"), False),
        (ints("position_ids", "b", "t"), True), (ints("position_ids", 3, "b", "t"), False),
        (ints("token_type_ids", "b", "t"), True), (ints("cache_position", "t"), True),
        (InputInfo("past_key_values.0.key", np.dtype(np.float32), None), False),
        (InputInfo("pixel_values", np.dtype(np.float32), ("b", 3)), False), (ints("input_ids", "b", "t"), False),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_be_made_of_tokens(info, possible):
    assert can_fill(info, [ints("input_ids", "b", "t"), info]) == possible
    assert not can_fill(info, [info]), "without tokens nothing can"


def test_a_past_is_of_floats_and_makes_a_decoder():
    past = InputInfo("past_key_values.0.key", np.dtype(np.float16), ("b", 2, "t", 8))
    length = ints("past_sequence_length", 1)
    assert (is_past(past), is_past(length)) == (True, False)
    assert is_decoder([length, past])
    assert not is_decoder([length])


def test_what_is_fed_is_left_as_it_is_and_others_are_left_out():
    inputs = [ints("input_ids", "b", "t"), ints("token_type_ids", "b", "t")]
    given = {"token_type_ids": np.full((1, 3), 7), "input_ids": np.ones((1, 3), np.int64), "labels": np.ones(3)}
    full = fill(given, inputs, "sample 1")
    assert list(full) == ["input_ids", "token_type_ids"]
    assert full["token_type_ids"] is given["token_type_ids"]
    assert list(given) == ["token_type_ids", "input_ids", "labels"]


def test_a_dimension_below_zero_may_have_any_size(tmp_path):
    main = graph([node("Relu", ["x"], ["y"])], [value("x", (-1, 3))], [value("y", (-1, 3))])
    (info,) = model_inputs(load(write(tmp_path / "m.onnx", main)))
    assert info.shape == (None, 3)
