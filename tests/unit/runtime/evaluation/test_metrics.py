"""The metrics are those of a plain numpy computation."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_woq.errors import DataError, ModelError
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.runtime.data.feeds import feeds, model_inputs
from onnx_woq.runtime.evaluation import metrics as module
from onnx_woq.runtime.evaluation.metrics import compare
from tests.zoo.chains import VOCABULARY, K, chain, language_model
from tests.zoo.nodes import FLOAT16, INT64, graph, lower, node, random, run, value, write

ROWS = [np.random.default_rng(i).integers(1, VOCABULARY, (2, t)) for i, t in enumerate((5, 9, 3, 12))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A language model, itself in 4 bits, and feeds."""
    folder = tmp_path_factory.mktemp("pair")
    reference = language_model(folder / "m.onnx")
    model = load(reference)
    lower(model)
    save(model, folder / "q.onnx", metadata={})
    inputs = model_inputs(load(reference))
    return folder / "q.onnx", reference, feeds(ROWS, inputs, samples=4, seqlen=64)


def logp(path, feed):
    logits = run(path, feed, ["logits"])[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def naive(model, reference, batches):
    """KL per token, agreement per token and next-token losses, one flat list each; KL sums per sequence."""
    kl, same, losses, sequences = [], [], ([], []), []
    for feed in batches:
        p, q = logp(reference, feed), logp(model, feed)
        mask, ids = feed["attention_mask"] != 0, feed["input_ids"]
        divergence = (np.exp(p) * (p - q)).sum(-1)
        for row in range(len(ids)):
            sequences.append(divergence[row][mask[row]])
            kl += list(divergence[row][mask[row]])
            same += list((p[row].argmax(-1) == q[row].argmax(-1))[mask[row]])
            for t in range(ids.shape[1] - 1):
                if mask[row, t] and mask[row, t + 1]:
                    losses[0].append(-p[row, t, ids[row, t + 1]])
                    losses[1].append(-q[row, t, ids[row, t + 1]])
    return kl, same, losses, sequences


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_language_metrics_are_those_of_numpy(chunk, padded, pair, monkeypatch):
    model, reference, batches = pair
    monkeypatch.setattr(module, "_CHUNK", chunk)
    if padded:
        batches = [feed | {"attention_mask": feed["attention_mask"].copy()} for feed in batches]
        batches[0]["attention_mask"][0, :2] = 0
        batches[3]["attention_mask"][1, 7:] = 0
    metrics = compare(model, reference, batches)
    kl, same, losses, sequences = naive(model, reference, batches)
    assert metrics.kind == "lm"
    assert metrics.tokens == len(kl) == sum(map(len, sequences))
    assert np.mean(kl) > 1e-3
    assert metrics.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert metrics.top1 == pytest.approx(np.mean(same))
    assert metrics.ppl_ref == pytest.approx(np.exp(np.mean(losses[0])), rel=1e-6)
    assert metrics.ppl == pytest.approx(np.exp(np.mean(losses[1])), rel=1e-6)
    assert metrics.sqnr_db is None


def test_standard_error_over_sequences_of_equal_length(pair):
    model, reference, batches = pair
    rows = [{n: a[i : i + 1] for n, a in f.items()} for f in (batches[3], batches[3]) for i in (0, 1)]
    rows[2]["input_ids"] = rows[2]["input_ids"][:, ::-1].copy()
    metrics = compare(model, reference, rows)
    means = [np.mean(s) for s in naive(model, reference, rows)[3]]
    assert metrics.kl_se == pytest.approx(np.std(means, ddof=1) / 2, rel=1e-5)
    assert compare(model, reference, rows[:1]).kl_se is None


def test_standard_error_does_not_change_when_all_sequences_are_doubled_in_length(pair):
    """Token weights: what counts is the sum over a sequence, not its length."""
    tally = module._LanguageTally(counts=[4, 9, 2], divergences=[1.0, 3.0, 0.2])
    twice = module._LanguageTally(counts=[8, 18, 4], divergences=[2.0, 6.0, 0.4])
    assert tally.metrics().kl == pytest.approx(4.2 / 15)
    assert tally.metrics().kl_se == pytest.approx(twice.metrics().kl_se)


def test_a_model_against_itself(pair):
    _, reference, batches = pair
    metrics = compare(reference, reference, batches)
    assert metrics.kl == 0.0, "exactly"
    assert metrics.kl_se == 0.0
    assert metrics.top1 == 1.0
    assert metrics.ppl == metrics.ppl_ref


def test_divergence_is_not_symmetric_and_never_negative(pair):
    model, reference, batches = pair
    one, other = compare(model, reference, batches), compare(reference, model, batches)
    assert (one.ppl, one.top1) == (other.ppl_ref, other.top1)
    assert one.kl != other.kl
    assert other.kl > 0


def test_tokens_that_cannot_come():
    """A padded vocabulary has logits of -inf; they add nothing, unless only the model excludes them."""
    p = module._log_softmax(np.array([[0.0, 1.0, -np.inf], [0.0, 1.0, 2.0]], np.float32))
    q = module._log_softmax(np.array([[0.0, 1.0, -np.inf], [0.0, 1.0, -np.inf]], np.float32))
    with np.errstate(all="ignore"):
        assert module._divergence(p, q).tolist() == [0.0, math.inf]


def edited(path, out, name, change):
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(proto, out)
    return out


def poison(array):
    array.flat[3] = np.nan
    return array


def test_nan_is_a_result_not_a_crash(pair, tmp_path):
    _, reference, batches = pair
    broken = edited(reference, tmp_path / "nan.onnx", "head", poison)
    metrics = compare(broken, reference, batches)
    assert all(map(math.isnan, (metrics.kl, metrics.kl_se, metrics.top1, metrics.ppl)))
    assert math.isfinite(metrics.ppl_ref)
    floats = chain(tmp_path / "f.onnx")
    broken = edited(floats, tmp_path / "fnan.onnx", "E", poison)
    metrics = compare(broken, floats, [{"x": random(2, 3, K)}])
    assert math.isnan(metrics.sqnr_db)
    assert math.isnan(metrics.cosine)


def test_other_models(tmp_path):
    reference = chain(tmp_path / "m.onnx")
    model = load(reference)
    lower(model)
    save(model, tmp_path / "q.onnx", metadata={})
    batches = [{"x": random(2, t, K, seed=t)} for t in (3, 8)]
    seen = []
    metrics = compare(tmp_path / "q.onnx", reference, batches, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    a = np.concatenate([run(reference, f)[0].reshape(-1, K) for f in batches]).astype(np.float64)
    b = np.concatenate([run(tmp_path / "q.onnx", f)[0].reshape(-1, K) for f in batches]).astype(np.float64)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert metrics.kind == "tensor"
    assert metrics.tokens == 22
    assert metrics.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-4)
    assert metrics.cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert metrics.kl is None
    same = compare(reference, reference, batches)
    assert (same.sqnr_db, same.cosine) == (math.inf, pytest.approx(1.0))


def test_encoders_are_averaged_over_the_tokens_that_count(tmp_path):
    ids, mask = np.arange(20).reshape(2, 10), np.ones((2, 10), np.int64)
    mask[0, 6:] = 0
    table, other = random(64, K), random(64, K) + random(64, K, seed=1) / 4

    def model(name, array):
        nodes = [node("Gather", ["table", "input_ids"], ["h"]), node("Cast", ["attention_mask"], ["m"], to=1)]
        inputs = [value(n, ("b", "t"), INT64) for n in ("input_ids", "attention_mask")]
        return write(tmp_path / name, graph(nodes, inputs, [value("h"), value("m")], {"table": array}))

    metrics = compare(model("q.onnx", other), model("m.onnx", table), [{"input_ids": ids, "attention_mask": mask}])
    want, cosines = [], []
    for row in range(2):
        a, b = (t[ids[row][mask[row] == 1]].mean(0).astype(np.float64) for t in (table, other))
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        want.append(ids[row][mask[row] == 1])
    used = np.concatenate(want)
    signal = (table[used] ** 2).sum() + mask.sum()
    assert metrics.tokens == 2
    assert metrics.cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert metrics.sqnr_db == pytest.approx(10 * np.log10(signal / ((table[used] - other[used]) ** 2).sum()), rel=1e-5)


def test_half_precision_outputs(tmp_path):
    path = chain(tmp_path / "m.onnx", np.float16)
    metrics = compare(path, path, [{"x": random(2, 3, K, dtype=np.float16)}])
    assert metrics.cosine == pytest.approx(1.0)
    assert FLOAT16


def test_errors(pair, tmp_path):
    _, reference, batches = pair
    with pytest.raises(DataError, match="at least one sample"):
        compare(reference, reference, [])
    with pytest.raises(ModelError, match=r"no\.onnx"):
        compare(tmp_path / "no.onnx", reference, batches)
    floats = chain(tmp_path / "f.onnx")
    with pytest.raises(DataError, match="sample 1 has no x"):
        compare(floats, reference, batches)
    renamed = load(floats)
    renamed.ir.graph.outputs[0].name = "z"
    save(renamed, tmp_path / "z.onnx", metadata={})
    with pytest.raises(DataError, match="no float output in common: y and z"):
        compare(tmp_path / "z.onnx", floats, [{"x": random(2, 3, K)}])
    with pytest.raises(DataError, match="leave no token"):
        compare(reference, reference, [batches[0] | {"attention_mask": batches[0]["attention_mask"] * 0}])
