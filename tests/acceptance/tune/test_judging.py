"""The built-in judge on models as people have them: what can be compared is compared, the rest is said at once."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_woq import OnnxWoqError, Recipe, Spec, evaluate, quantize, tune
from tests.zoo import small as zoo
from tests.zoo.nodes import BFLOAT16, FLOAT, INT64, graph, node, random, run, value, write

K, N, VOCABULARY = 64, 48, 96
FOUR_BITS = {"q4": Recipe("rtn", Spec(4, 32, symmetric=False), accuracy_level=0)}


def model(path, nodes, outputs, weights, inputs=(("x", ("b", K), FLOAT),)):
    main = graph(nodes, [value(name, shape, kind) for name, shape, kind in inputs], outputs, weights)
    return write(path, main, opset=17)


def rows(samples=24, dtype=np.float32):
    return [{"x": random(9, K, seed=seed).astype(dtype)} for seed in range(samples)]


def judged(path, tmp_path, data, **options):
    """Tunes with one configuration; returns its only trial, whose model must be written."""
    result = tune(path, None, data, configs=FOUR_BITS, output=tmp_path / "t.onnx", **options)
    [trial] = result.trials
    assert trial.status == "ok", trial.error
    assert (tmp_path / "t.onnx").exists()
    return result, trial


def sqnr(path, other, data, output="y"):
    """The ratio by plain numpy, of all numbers that are finite in both models."""
    pairs = [[run(one, feed, [output])[0].astype(np.float64) for one in (path, other)] for feed in data]
    a, b = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    finite = np.isfinite(a) & np.isfinite(b)
    return 10 * math.log10((a[finite] ** 2).sum() / ((a - b)[finite] ** 2).sum())


@pytest.mark.parametrize("last", [1, 3])
def test_logits_of_the_last_tokens_only(last, tmp_path):
    """As pruned heads give them: [B, 1, V] for [B, T] tokens."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]),
        node("Slice", ["e", "from", "to", "axis"], ["l"]),
        node("MatMul", ["l", "head"], ["logits"]),
    ]
    weights = {"table": random(VOCABULARY, K), "head": 0.2 * random(K, VOCABULARY, seed=1)}
    weights |= {"from": np.array([-last]), "to": np.array([2**31]), "axis": np.array([1])}
    path = model(
        tmp_path / "m.onnx",
        nodes,
        [value("logits", ("b", "s", VOCABULARY))],
        weights,
        [("input_ids", ("b", "t"), INT64)],
    )
    data = [{"input_ids": np.random.default_rng(i).integers(0, VOCABULARY, (1, 24))} for i in range(24)]
    result, trial = judged(path, tmp_path, data)
    assert result.metric_name == "kl"
    found = evaluate(tmp_path / "t.onnx", path, data)
    logits = [[run(one, feed)[0].astype(np.float64) for one in (path, tmp_path / "t.onnx")] for feed in data]
    p, q = (np.concatenate([pair[i] for pair in logits]).reshape(-1, VOCABULARY) for i in (0, 1))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    assert found.tokens == 24 * last
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert (found.ppl is None) == (last == 1), "nothing follows the last token"
    assert trial.metric == pytest.approx(found.kl, rel=0.5)


@pytest.mark.parametrize("never", [-np.inf, np.finfo(np.float32).min])
def test_outputs_that_a_mask_forbids(never, tmp_path):
    mask = np.where(np.arange(N) < 9, never, 0).astype(np.float32)
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Add", ["h", "mask"], ["y"])]
    path = model(tmp_path / "m.onnx", nodes, [value("y", ("b", N))], {"W": random(K, N), "mask": mask})
    data = rows()
    judged(path, tmp_path, data)
    found = evaluate(tmp_path / "t.onnx", path, data)
    plain = model(
        tmp_path / "p.onnx", [node("MatMul", ["x", "W"], ["y"])], [value("y", ("b", N - 9))], {"W": random(K, N)[:, 9:]}
    )
    quantize(plain, tmp_path / "pq.onnx", FOUR_BITS["q4"])
    assert found.sqnr_db == pytest.approx(sqnr(plain, tmp_path / "pq.onnx", data), abs=0.01)
    assert 0.9 < found.cosine < 1


def test_a_mix_of_precisions_for_outputs_that_a_mask_forbids(tmp_path):
    net = zoo.Net()
    h = net.op("Relu", net.matmul("x", zoo.weight(1, K, 96), "first"), out="relu")
    h = net.matmul(h, zoo.weight(2, 96, N), "second")
    net.op("Add", h, net.const("mask", np.where(np.arange(N) < 9, -np.inf, 0).astype(np.float32)), out="y")
    path = net.save(tmp_path / "m.onnx", {"x": (FLOAT, ["b", K])}, {"y": (FLOAT, ["b", N])})
    result = tune(path, None, rows(), target_bpw=5.0, configs=[Recipe("rtn", nsamples=8)], output=tmp_path / "t.onnx")
    assert [trial.error for trial in result.trials if trial.status != "ok"] == []
    assert all(0 < layer.alpha < math.inf for layer in result.layers)


def test_a_model_without_any_loss_is_the_best_there_is(tmp_path):
    """Weights that lie on the grid already, and sums that float32 holds: no noise at all."""
    weight = (np.random.default_rng(0).integers(-1, 2, (K, N)) * 0.5).astype(np.float32)
    path = model(tmp_path / "m.onnx", [node("MatMul", ["x", "W"], ["y"])], [value("y", ("b", N))], {"W": weight})
    data = [{"x": np.random.default_rng(i).integers(-9, 10, (9, K)).astype(np.float32)} for i in range(24)]
    configs = FOUR_BITS | {"q4 sym": Recipe("rtn", Spec(4, 32, symmetric=True), accuracy_level=0)}
    for again in (False, True):
        result = tune(
            path, None, data, configs=configs, objective="best", output=tmp_path / "t.onnx", workdir=tmp_path / "w"
        )
        assert (result.met, result.best.name, result.best.metric) == (True, "q4 sym", math.inf)
        assert [trial.resumed for trial in result.trials] == [again, again], "the journal knows it too"
        for feed in data:
            np.testing.assert_array_equal(run(tmp_path / "t.onnx", feed)[0], run(path, feed)[0])
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["best"] == "q4 sym"
        (tmp_path / "t.onnx").unlink()


def test_a_metric_of_the_users_own_must_stay_finite(enc):
    result = tune(enc, lambda path: 1.0 if path == enc else math.inf, configs=FOUR_BITS)
    assert [trial.status for trial in result.trials] == ["nan"]


def argmax(path):
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("ArgMax", ["h"], ["y"], axis=-1)]
    return model(path, nodes, [value("y", ("b", 1), INT64)], {"W": random(K, N)})


def test_no_output_to_judge_by_is_said_before_the_first_trial(tmp_path, cli):
    path = argmax(tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=random(40, K))
    done = cli("quantize", path, "-o", tmp_path / "q.onnx", "--auto", "--calib", tmp_path / "x.npz")
    assert done.exit_code == 2
    assert "--eval" in done.stderr
    assert "y" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["m.onnx", "x.npz"]
    with pytest.raises(OnnxWoqError, match="no float tensor"):
        tune(path, None, rows(), target_bpw=5.0)
    assert tune(path, lambda _: 1.0, rows(), configs=FOUR_BITS).met, "a metric of one's own is the way out"


def test_sequences_of_tensors_are_left_out(tmp_path):
    nodes = [node("MatMul", ["x", "W"], ["y"]), node("SplitToSequence", ["y"], ["s"], axis=1)]
    outputs = [helper.make_tensor_sequence_value_info("s", FLOAT, None), value("y", ("b", N))]
    path = model(tmp_path / "m.onnx", nodes, outputs, {"W": random(K, N)})
    data = rows()
    judged(path, tmp_path, data)
    found = evaluate(tmp_path / "t.onnx", path, data)
    assert found.sqnr_db == pytest.approx(sqnr(path, tmp_path / "t.onnx", data), abs=0.01)


def test_a_model_in_bfloat16_is_judged_in_float32(tmp_path):
    """ONNX Runtime has no kernel for it on the CPU: the float model cannot be run as it is."""
    weight = random(K, N).astype(ml_dtypes.bfloat16)
    nodes = [node("MatMul", ["x", "W"], ["y"])]
    path = model(
        tmp_path / "m.onnx", nodes, [value("y", ("b", N), BFLOAT16)], {"W": weight}, [("x", ("b", K), BFLOAT16)]
    )
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        run(path, rows()[0])
    judged(path, tmp_path, rows(dtype=ml_dtypes.bfloat16))
    found = evaluate(tmp_path / "t.onnx", path, rows())
    wide = model(tmp_path / "w.onnx", nodes, [value("y", ("b", N))], {"W": weight.astype(np.float32)})
    quantize(wide, tmp_path / "wq.onnx", FOUR_BITS["q4"])
    expected = evaluate(tmp_path / "wq.onnx", wide, rows(dtype=ml_dtypes.bfloat16))
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.5)
    assert onnx.load(tmp_path / "t.onnx").graph.input[0].type.tensor_type.elem_type == BFLOAT16
