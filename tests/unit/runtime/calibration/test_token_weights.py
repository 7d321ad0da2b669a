"""Tokens of keys and values count by the squared attention they receive, whatever batch, mask and window."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.errors import DataError
from onnx_woq.graph.find.attention import FIRST_TOKEN
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration.collect import collect_statistics
from onnx_woq.runtime.calibration.token_weights import SINK_SHARE, token_weights
from onnx_woq.runtime.calibration.windows import CalibrationMemory
from tests.support import measure
from tests.zoo import architectures as arch

RECIPE = Recipe("gptq", attention_weighted=True)
KINDS = {"decoder": arch.decoder, "merged": arch.merged_decoder, "bert": arch.bert}


def looked_at(path, names, feed):
    proto = onnx.load(path)
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return dict(zip(names, measure.session(proto.SerializeToString()).run(names, feed), strict=True))


def naive_gram(path, activation, probabilities, feeds):
    """Σ_t weight_t·x_t·x_tᵀ, token by token; weights are squares of attention received, their mean 1 per sequence."""
    gram = 0.0
    for feed in feeds:
        arrays = looked_at(path, [activation, *([probabilities] if probabilities != FIRST_TOKEN else [])], feed)
        x, mask = arrays[activation].astype(float), feed["attention_mask"]
        for row in range(len(x)):
            counted = np.flatnonzero(mask[row]) if mask.shape == x.shape[:2] else range(x.shape[1])
            weights = {}
            for t in counted:
                if probabilities == FIRST_TOKEN:
                    weights[t] = SINK_SHARE if t == counted[0] else (1 - SINK_SHARE) / max(1, len(counted) - 1)
                else:
                    p = arrays[probabilities][row].astype(float)
                    before = p.shape[-1] - x.shape[1]
                    weights[t] = sum(p[h, i, before + t] ** 2 for h in range(len(p)) for i in counted)
            mean = sum(weights.values()) / len(weights)
            gram = gram + sum(w / mean * np.outer(x[row, t], x[row, t]) for t, w in weights.items())
    return gram


@pytest.mark.parametrize("budget", [1, 1 << 30], ids=["tap by tap", "at once"])
@pytest.mark.parametrize("kind", ["decoder", "bert", "fused"])
def test_statistics_are_those_of_weighted_tokens(kind, budget, tmp_path):
    path = (KINDS | {"fused": arch.fused_decoder})[kind](tmp_path / "m.onnx", layers=2)
    feeds = [
        arch.ids_feed(b, t, layers=2, padded=p, left=kind == "decoder", kind=kind, seed=b)
        for b, t, p in ((1, 7, 0), (2, 9, 4), (3, 4, 2))
    ]
    model = load(path)
    groups, _ = find_linear_groups(model, RECIPE)
    seen = 0
    for group, stats in collect_statistics(model, groups, feeds, memory_budget=budget):
        ((activation, attention),) = group.sources
        if not attention:
            continue
        seen += 1
        wanted = naive_gram(path, activation, attention, feeds)
        np.testing.assert_allclose(stats.gram, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert seen == 2


@pytest.mark.parametrize("sequential", ["off", "block", "tap"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_leave_no_trace(kind, sequential, tmp_path):
    model = load(KINDS[kind](tmp_path / "m.onnx", layers=2))
    past = 0 if kind == "bert" else 2
    feeds = [arch.ids_feed(1, 6, past=past * (kind == "merged"), layers=2, kind=kind, seed=i) for i in range(3)]
    groups, _ = find_linear_groups(model, RECIPE)
    wide, narrow = (
        {
            group.name: stats.gram
            for group, stats in collect_statistics(model, groups, feeds, memory_budget=b, sequential=sequential)
        }
        for b in (1 << 30, 1)
    )
    assert wide.keys() == narrow.keys()
    assert all(np.array_equal(wide[name], narrow[name]) for name in wide)


def test_queries_and_all_other_taps_are_calibrated_as_ever(tmp_path):
    model = load(arch.decoder(tmp_path / "m.onnx", layers=2))
    feeds = [arch.ids_feed(1, 6, layers=2, seed=i) for i in range(2)]
    collected = [
        {
            group.linears[0].name: stats.gram
            for group, stats in collect_statistics(model, find_linear_groups(model, recipe)[0], feeds)
        }
        for recipe in (Recipe("gptq"), RECIPE)
    ]
    for name, gram in collected[0].items():
        assert np.array_equal(gram, collected[1][name])


def test_probabilities_are_counted_in_the_plan(tmp_path):
    model = load(arch.decoder(tmp_path / "m.onnx", layers=1))
    feeds = [arch.ids_feed(1, 64, layers=1)]
    q, kv = find_linear_groups(model, RECIPE)[0][:2]
    needs = CalibrationMemory.of(model, [q, kv], feeds)
    assert needs.collecting([kv], q) >= needs.collecting([q], None) - q.weight_bytes + 4 * 64 * 64


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_weights_average_to_one_over_what_counts(rows, length, past, masked, seed):
    rng = np.random.default_rng(seed)
    squares = rng.random((rows, length, past + length)) ** 2
    mask = rng.random((rows, length)) < 0.6 if masked else np.ones((rows, length), bool)
    mask[:, -1] = True
    for shown in (squares, None):
        weights = token_weights(np.empty((rows, length, 1)), shown, mask if masked else None).reshape(rows, length)
        assert (weights >= 0).all()
        np.testing.assert_allclose((weights * mask).sum(1) / mask.sum(1), 1)


def test_what_does_not_fit_is_named():
    with pytest.raises(DataError, match="attention_weighted"):
        token_weights(np.empty((3, 4, 1)), np.ones((4, 4)), None)
