"""`evaluate` finds models and data as `quantize` does, and gives what comparing the two files gives."""

from __future__ import annotations

import pytest

from onnx_woq import quantize
from onnx_woq.errors import DataError, ModelError
from onnx_woq.runtime.evaluation.compare import EVALUATION_SAMPLES, evaluate
from onnx_woq.runtime.evaluation.metrics import compare
from tests.zoo import small as zoo


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model = zoo.language_model(folder / "float" / "model.onnx", layers=1)
    quantize(model, folder / "q.onnx", "RTN_G32ASYM")
    return model, folder / "q.onnx"


def test_it_is_the_comparison_of_the_two_files(pair):
    model, quantized = pair
    data = zoo.lm_feeds(zoo.token_ids(3, length=9))
    found = evaluate(quantized, model.parent, data)
    assert found == compare(quantized, model, data)
    assert found.kl > 0
    assert found.tokens == 27


def test_a_model_against_itself(pair):
    assert evaluate(pair[0], pair[0], zoo.lm_feeds(zoo.token_ids(2, length=9))).kl == 0


def test_as_many_samples_as_there_are_but_exactly_those_asked_for(pair):
    model, quantized = pair
    data = zoo.lm_feeds(zoo.token_ids(EVALUATION_SAMPLES + 2, length=3))
    assert evaluate(quantized, model, data).tokens == 3 * EVALUATION_SAMPLES
    assert evaluate(quantized, model, data[:2]).tokens == 6
    assert evaluate(quantized, model, data, samples=5).tokens == 15
    with pytest.raises(DataError, match="3"):
        evaluate(quantized, model, data[:2], samples=3)


def test_progress_counts_samples(pair):
    calls = []
    evaluate(*pair, zoo.lm_feeds(zoo.token_ids(3, length=4)), progress=lambda *call: calls.append(call))
    assert calls[-1] == ("evaluate", 3, 3)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_text_takes_the_tokenizer_that_it_is_told(pair, tmp_path):
    text = tmp_path / "dev.txt"
    text.write_text("some words and some more. " * 40, encoding="utf-8")
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(*pair, text, seqlen=16)
    (tmp_path / "tok").mkdir()
    zoo.byte_tokenizer(tmp_path / "tok")
    found = evaluate(pair[1], pair[0], text, seqlen=16, samples=4, tokenizer=tmp_path / "tok")
    assert found.tokens == 64


def test_a_folder_without_a_model_is_named(pair, tmp_path):
    with pytest.raises(ModelError, match=r"no \.onnx file"):
        evaluate(tmp_path, pair[0], "random")
