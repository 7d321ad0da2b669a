"""Distances of outputs, against two log-softmaxes in float64 and against sums of squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.evaluation import output_distance as module
from onnx_woq.runtime.evaluation.output_distance import OutputDistance, _divergence, _softmax
from tests.zoo.chains import K, chain, language_model
from tests.zoo.nodes import random

VOCABULARY = 64


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def naive(logits, other):
    p, q = log_softmax(logits), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def feed(length, mask=None):
    ids = np.ones((1, length), np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else np.array([mask])}


@pytest.fixture
def language(tmp_path):
    feeds = [feed(5), feed(3, [1, 0, 1])]
    return OutputDistance(load(language_model(tmp_path / "lm.onnx", past=False)), feeds), feeds


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(2, 40), st.sampled_from([1e-4, 0.1, 3.0, 60.0]), st.integers(0, 99),
    st.integers(1, 99),
)  # fmt: skip
def test_the_divergence_is_that_of_two_softmaxes(tokens, size, noise, seed, chunk):
    rng = np.random.default_rng(seed)
    logits = (4 * rng.standard_normal((tokens, size))).astype(np.float32)
    other = logits + (noise * rng.standard_normal((tokens, size))).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = _divergence(logits, _softmax(logits), other)
    assert found == pytest.approx(naive(logits, other).sum(), rel=2e-3, abs=1e-6 * tokens)


def test_equal_outputs_are_at_no_distance_and_a_shift_of_all_logits_is_none():
    logits = random(4, VOCABULARY)
    assert _divergence(logits, _softmax(logits), logits) == 0
    assert _divergence(logits, _softmax(logits), logits + 3) == pytest.approx(0, abs=1e-5)


def test_noise_beyond_what_an_exponential_holds_is_still_a_number():
    logits, other = random(2, VOCABULARY), random(2, VOCABULARY, seed=1) * 1e4
    assert _divergence(logits, _softmax(logits), other) == pytest.approx(naive(logits, other).sum(), rel=1e-4)


def test_of_language_the_mean_over_tokens_that_count(language):
    distance, feeds = language
    assert (distance.language, distance.outputs) == (True, {"logits"})
    total, sums = 0.0, 0.0
    for number, one in enumerate(feeds):
        shape = (*one["input_ids"].shape, VOCABULARY)
        logits, other = random(*shape, seed=number), random(*shape, seed=number + 9)
        total += distance.measure({"logits": logits}, one)({"logits": other})
        sums += naive(logits, other)[one["attention_mask"] != 0].sum()
    assert distance.size == 7
    assert distance.distance(total, "w") == pytest.approx(sums / 7, rel=1e-4)


def test_a_sample_is_counted_once_however_often_it_is_measured(language):
    distance, feeds = language
    reference = {"logits": random(1, 5, VOCABULARY)}
    for _ in range(3):
        distance.measure(reference, feeds[0])
    assert distance.size == 5


def test_of_other_models_the_share_of_noise(tmp_path):
    one = {"x": random(1, 4, K)}
    distance = OutputDistance(load(chain(tmp_path / "m.onnx")), [one])
    assert (distance.language, distance.outputs) == (False, {"y"})
    y, other = random(1, 4, K, seed=2), random(1, 4, K, seed=3)
    total = distance.measure({"y": y}, one)({"y": other})
    assert distance.distance(total, "w") == pytest.approx(np.square(y - other).sum() / np.square(y).sum(), rel=1e-5)


@pytest.mark.parametrize("total", [np.nan, np.inf])
def test_what_is_no_number_names_the_weight(total, language):
    distance, feeds = language
    distance.measure({"logits": random(1, 5, VOCABULARY)}, feeds[0])
    with pytest.raises(DataError, match="the weight of 'w' is another one: exclude it"):
        distance.distance(total, "w")


def test_without_anything_that_counts_there_is_no_distance(language):
    with pytest.raises(DataError, match="no finite numbers"):
        language[0].distance(0.0, "w")
