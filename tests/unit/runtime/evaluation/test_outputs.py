"""What two models are compared by: float tensors, tokens that count, numbers that a mask has left alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.evaluation.outputs import (
    float_outputs,
    is_language_model,
    judging_session,
    logits_mask,
    mask_of,
    signals,
    token_ids,
)
from tests.zoo.chains import VOCABULARY, K, chain, language_model
from tests.zoo.nodes import BFLOAT16, FLOAT, INT64, graph, node, random, run, value, write


def test_what_a_language_model_is(tmp_path):
    model = load(language_model(tmp_path / "m.onnx"))
    feed = {"input_ids": np.array([[1, 2]])}
    assert is_language_model(model, feed)
    assert not is_language_model(model, {"x": random(2, 3)})
    assert not is_language_model(model, {"input_ids": np.array([[VOCABULARY]])}), "labels of tokens, not tokens"
    assert is_language_model(model, {"input_ids": random(1, 2, 3), "decoder_input_ids": np.array([[3]])})
    model.ir.graph.outputs[0].name = "scores"
    assert not is_language_model(model, feed)


def two_outputs(path, kind):
    nodes = [node("MatMul", ["x", "W"], ["h"])]
    outputs = {
        "sequence": (
            node("SplitToSequence", ["h"], ["y"], axis=1),
            helper.make_tensor_sequence_value_info("y", FLOAT, None),
        ),
        "integer": (node("ArgMax", ["h"], ["y"]), value("y", None, INT64)),
    }
    nodes.append(outputs[kind][0])
    return write(path, graph(nodes, [value("x", (2, K))], [outputs[kind][1]], {"W": random(K, K)}))


@pytest.mark.parametrize("kind", ["sequence", "integer"])
def test_only_float_tensors_can_be_compared(kind, tmp_path):
    path = two_outputs(tmp_path / "m.onnx", kind)
    with pytest.raises(DataError, match=r"m\.onnx has no float tensor among its outputs \(y .*--eval"):
        float_outputs(load(path))
    proto = onnx.load(path)
    proto.graph.output.append(value("h", (2, K)))
    onnx.save(proto, path)
    assert float_outputs(load(path)) == ["h"]
    assert float_outputs(load(chain(tmp_path / "c.onnx"))) == ["y"]


def test_masks_are_those_of_the_tokens_that_have_logits():
    feed = {"input_ids": np.ones((2, 4), np.int64), "attention_mask": np.array([[1, 1, 1, 0], [0, 1, 1, 1]])}
    assert mask_of(feed, (2, 4)).tolist() == (feed["attention_mask"] != 0).tolist()
    assert mask_of(feed, (2, 3)).all()
    assert logits_mask(feed, (2, 4, 9)).tolist() == (feed["attention_mask"] != 0).tolist()
    assert logits_mask(feed, (2, 2, 9)).tolist() == [[True, False], [True, True]]
    assert logits_mask(feed, (2, 1, 9)).tolist() == [[True], [True]], "the last token, wherever it stands"
    for shape in ((2, 5, 9), (1, 4, 9), (2, 9), (2, 0, 9)):
        with pytest.raises(DataError, match=r"logits have shape .* for tokens of shape \[2, 4\]"):
            logits_mask(feed, shape)


def test_the_tokens_of_a_decoder_are_not_those_of_its_encoder():
    feed = {
        "input_ids": np.ones((1, 3), np.int64),
        "attention_mask": np.array([[1, 1, 0]]),
        "decoder_input_ids": np.full((1, 3), 2),
    }
    assert token_ids(feed) is feed["decoder_input_ids"]
    assert logits_mask(feed, (1, 3, 9)).all()
    feed["decoder_attention_mask"] = np.array([[0, 1, 1]])
    assert logits_mask(feed, (1, 3, 9)).tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_a_mask_forbids_in_both_models_is_neither_signal_nor_noise(dtype):
    low = np.finfo(dtype).min
    want, have = (
        np.array([-np.inf, np.inf, low, 1, -np.inf, low, np.nan], dtype),
        np.array([-np.inf, np.inf, low, 2, 3, 4, np.nan], dtype),
    )
    a, b = signals(want, have)
    assert a.dtype == b.dtype == np.float64
    np.testing.assert_array_equal(a, [0, 0, 0, 1, -np.inf, low, np.nan])
    np.testing.assert_array_equal(b, [0, 0, 0, 2, 3, 4, np.nan])


@pytest.mark.parametrize("only", ["weights", "a cast"])
def test_bfloat16_is_judged_in_float32(only, tmp_path):
    """The CPU has no kernel for a product in bfloat16."""
    weight = random(K, K).astype(ml_dtypes.bfloat16)
    kind = BFLOAT16 if only == "weights" else FLOAT
    nodes = [node("Cast", ["W"], ["w"], to=BFLOAT16), node("Cast", ["x"], ["b"], to=BFLOAT16)]
    nodes += [node("MatMul", ["b", "w"], ["h"]), node("Cast", ["h"], ["y"], to=kind)]
    stored = weight if only == "weights" else weight.astype(np.float32)
    path = write(
        tmp_path / "m.onnx", graph(nodes, [value("x", (2, K), kind)], [value("y", (2, K), kind)], {"W": stored})
    )
    x = random(2, K, seed=1).astype(ml_dtypes.bfloat16).astype(np.float32)
    (found,) = judging_session(path).run(None, {"x": x})
    np.testing.assert_allclose(found, x @ weight.astype(np.float32), rtol=1e-5, atol=1e-5)
    floats = chain(tmp_path / "f.onnx")
    feed = {"x": random(2, 3, K)}
    np.testing.assert_array_equal(judging_session(floats).run(None, feed)[0], run(floats, feed)[0])
