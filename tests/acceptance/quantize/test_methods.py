"""The methods end to end: what reaches the file must be as good as the mathematics promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.engine import memory
from tests.support import measure
from tests.zoo import small as zoo

GRIDS = [Spec(4, 32), Spec(4, 32, True), Spec(3, 64), Spec(2, 16), Spec(4, -1), Spec(8, 128)]


def total(loss: dict[str, float]) -> float:
    return sum(loss.values())


def written(model: Path, out: Path, recipe: Recipe, data: object = None) -> Path:
    quantize(model, out, recipe, data)
    return out


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gptq_loss_is_strictly_below_rtn_for_every_weight(spec, lm, lm_data, tmp_path):
    rtn = measure.losses(lm, written(lm, tmp_path / "r.onnx", Recipe("rtn", spec)), lm_data)
    gptq = measure.losses(lm, written(lm, tmp_path / "g.onnx", Recipe("gptq", spec), lm_data), lm_data)
    assert rtn.keys() == gptq.keys()
    assert len(rtn) == 15
    assert {name for name in rtn if not gptq[name] < rtn[name]} == set()
    assert total(gptq) < 0.8 * total(rtn)


def test_gptq_on_float_inputs_also_wins(enc, enc_data, tmp_path):
    rtn = measure.losses(enc, written(enc, tmp_path / "r.onnx", Recipe("rtn")), enc_data)
    gptq = measure.losses(enc, written(enc, tmp_path / "g.onnx", Recipe("gptq"), enc_data), enc_data)
    assert {name for name in rtn if not gptq[name] < 0.8 * rtn[name]} == set()


@pytest.mark.parametrize(
    "options",
    [
        {"actorder": True},
        {"actorder": True, "static_groups": True},
        {"static_groups": True},
        {"block_size": 16},
        {"block_size": 1000},
        {"percdamp": 0.1},
        {"enable_mse_search": True},
        {"enable_mse_search": True, "mse_range": (0.8, 1.0, 0.05)},
        {"actorder": True, "enable_mse_search": True},
    ],
    ids=str,
)
def test_every_gptq_option_still_beats_rtn(options, enc, enc_data, tmp_path):
    rtn = measure.losses(enc, written(enc, tmp_path / "r.onnx", Recipe("rtn")), enc_data)
    gptq = measure.losses(enc, written(enc, tmp_path / "g.onnx", Recipe("gptq", options=options), enc_data), enc_data)
    assert {name for name in rtn if not gptq[name] < rtn[name]} == set()


def test_gptq_does_not_depend_on_its_block_size(enc, enc_data, tmp_path):
    files = [
        measure.decoded(written(enc, tmp_path / f"{b}.onnx", Recipe("gptq", options={"block_size": b}), enc_data))
        for b in (8, 32, 128, 160)
    ]
    for other in files[1:]:
        for name, w in files[0].items():
            assert measure.agreement(other[name], w) > 0.999, name


def reference_gptq(w: np.ndarray, x: np.ndarray, group: int, bits: int) -> np.ndarray:
    """GPTQ row by row without any blocking, straight from the paper; w [K, N], x [T, K] -> dequantized [K, N]."""
    w, h, top = w.copy(), x.T @ x, 2**bits - 1
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    u, out = np.linalg.cholesky(np.linalg.inv(h)).T, np.empty_like(w)
    for i in range(len(w)):
        if i % group == 0:
            part = w[i : i + group]
            low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
            scale = ((high - low) / top).astype(np.float32).astype(np.float64)
            zero = np.clip(np.round(-low / scale), 0, top)
        out[i] = (np.clip(np.round(w[i] / scale) + zero, 0, top) - zero) * scale
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - out[i]) / u[i, i])
    return out


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (4, 64)])
def test_gptq_equals_a_ten_line_reference(bits, group, tmp_path):
    data = zoo.float_feeds(8, width=96)
    model = zoo.siblings(tmp_path / "m.onnx", {"y": zoo.weight(5, 96, 24)})
    got = measure.decoded(written(model, tmp_path / "q.onnx", Recipe("gptq", Spec(bits, group)), data))["y"]
    x = np.concatenate([feed["x"][0] for feed in data]).astype(np.float64)
    wanted = reference_gptq(zoo.weight(5, 96, 24).astype(np.float64), x, group, bits)
    assert np.mean(np.isclose(got, wanted, rtol=1e-3, atol=1e-4)) > 0.99
    loss = [np.square(x @ (w - zoo.weight(5, 96, 24))).sum() for w in (got, wanted)]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)


@pytest.mark.parametrize("options", [{}, {"actorder": True}], ids=str)
def test_siblings_solved_together_equal_separate_solves(options, lm, lm_data, tmp_path):
    together = measure.decoded(written(lm, tmp_path / "all.onnx", Recipe("gptq", options=options), lm_data))
    for name in ("layer0.q", "layer1.v", "layer1.up"):
        alone = Recipe("gptq", include=(f"^{name}$",), options=options)
        one = measure.decoded(written(lm, tmp_path / "one.onnx", alone, lm_data))
        assert list(one) == [name]
        assert measure.agreement(one[name], together[name]) > 0.998, name


def test_true_sequential_sees_the_quantized_model(lm, lm_data, tmp_path):
    """The first tap is solved on the same data either way, later ones are not, and for their real inputs it pays."""
    spec = Spec(3, 32)
    plain = written(lm, tmp_path / "p.onnx", Recipe("gptq", spec, accuracy_level=0), lm_data)
    recipe = Recipe("gptq", spec, true_sequential=True, accuracy_level=0)
    sequential = written(lm, tmp_path / "s.onnx", recipe, lm_data)
    a, b = measure.decoded(plain), measure.decoded(sequential)
    assert measure.agreement(a["layer0.q"], b["layer0.q"]) > 0.999
    assert measure.agreement(a["layer1.down"], b["layer1.down"]) < 0.999

    def own_loss(path: Path, name: str) -> float:
        value = next(node.input[0] for out, node in measure.low_bit(path).items() if out == name)
        x = measure.run(measure.exposed(path, [value]), lm_data)[value]
        return float(np.square(x @ (measure.decoded(path)[name] - measure.float_weights(lm)[name])).sum())

    last = [name for name in a if name.startswith("layer1")]
    assert sum(own_loss(sequential, n) for n in last) < sum(own_loss(plain, n) for n in last)


def skewed(seed: int, width: int = 96) -> list[dict[str, np.ndarray]]:
    """Inputs with a few channels 20 times larger than the rest: what AWQ is made for."""
    size = np.where(np.arange(width) % 19 == 0, 20.0, 1.0).astype(np.float32)
    return [{"x": feed["x"] * size} for feed in zoo.float_feeds(4, seed=seed, width=width)]


def output_loss(model: Path, out: Path, recipe: Recipe, data: list[dict[str, np.ndarray]]) -> float:
    """Error of all outputs on the calibration data: for a model of one tap, the calibrated loss of its siblings."""
    before, after = measure.run(model, data), measure.run(written(model, out, recipe, data), data)
    return float(sum(np.square(after[name] - before[name]).sum() for name in before))


@pytest.mark.parametrize("norm", [False, True], ids=["graph input", "norm"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (Spec(4, 32), {}),
        (Spec(4, 32, True), {}),
        (Spec(3, -1), {}),
        (Spec(4, 32), {"enable_mse_search": False}),
        (Spec(4, 32), {"enable_auto_scale": False}),
        (Spec(4, 32), {"folding": True}),
    ],
    ids=str,
)
def test_awq_is_never_worse_than_rtn(spec, options, seed, norm, tmp_path):
    data = skewed(seed) if seed % 2 else zoo.float_feeds(4, seed=seed, width=96)
    weights = {"a": zoo.weight(seed, 96, 24), "b": 3 * zoo.weight(seed + 50, 96, 40)}
    model = zoo.siblings(tmp_path / "m.onnx", weights, norm=norm)
    rtn = output_loss(model, tmp_path / "r.onnx", Recipe("rtn", spec, accuracy_level=0), data)
    awq = output_loss(model, tmp_path / "a.onnx", Recipe("awq", spec, options=options, accuracy_level=0), data)
    assert awq <= rtn * (1 + 1e-4)


@pytest.mark.parametrize("options", [{}, {"enable_mse_search": False}], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["graph input", "norm"])
def test_awq_scales_where_channels_differ(options, norm, tmp_path):
    data = skewed(1)
    model = zoo.siblings(tmp_path / "m.onnx", {"a": zoo.weight(1, 96, 24), "b": zoo.weight(2, 96, 40)}, norm=norm)
    rtn = output_loss(model, tmp_path / "r.onnx", Recipe("rtn", accuracy_level=0), data)
    awq = output_loss(model, tmp_path / "a.onnx", Recipe("awq", options=options, accuracy_level=0), data)
    assert awq < 0.9 * rtn


SCALING = [("awq", {}), ("teq", {"steps": 10}), ("gptq", {"scaling": "awq"}), ("gptq", {"scaling": "teq"})]


@pytest.mark.parametrize(("method", "options"), SCALING, ids=str)
def test_with_folding_no_node_is_inserted(method, options, enc, enc_data, tmp_path):
    """Whatever is scaled is folded exactly: nothing new runs, and at 8 bits the function stays what it was."""
    recipe = Recipe(method, Spec(8, 32), options={"folding": True} | options, accuracy_level=0)
    folded = written(enc, tmp_path / "f.onnx", recipe, enc_data)

    def kinds(path: Path) -> list[str]:
        import onnx

        found = (node.op_type for node in measure.nodes(onnx.load(path)))
        return sorted("MatMul" if kind == "MatMulNBits" else kind for kind in found)

    assert kinds(folded) == kinds(enc)
    assert measure.sqnr(measure.run(enc, enc_data)["y"], measure.run(folded, enc_data)["y"]) > 35


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize(("method", "options"), SCALING, ids=str)
def test_a_scale_leaves_the_function_alone(method, options, folding, lm, lm_data, tmp_path):
    """At 8 bits every misplaced scale would show: residual readers of a scaled norm, attention, the wrong sibling."""
    recipe = Recipe(method, Spec(8, 32), options={"folding": folding} | options, accuracy_level=0)
    out = written(lm, tmp_path / "q.onnx", recipe, lm_data)
    assert measure.sqnr(measure.run(lm, lm_data)["logits"], measure.run(out, lm_data)["logits"]) > 35


def on_grid(bits: int, symmetric: bool, full_range: bool, k: int = 64, n: int = 24, group: int = 32) -> np.ndarray:
    """A weight whose every group uses both ends of its grid, scales being powers of two."""
    rng = np.random.default_rng(bits)
    top = 2**bits - 1
    zero = 2 ** (bits - 1)
    low, high = (0, top) if not symmetric or full_range else (1, top)
    codes = rng.integers(low, high + 1, size=(k // group, group, n))
    codes[:, 0], codes[:, 1] = low, high
    zeros = np.full((k // group, 1, n), zero) if symmetric else rng.integers(0, top + 1, size=(k // group, 1, n))
    scales = 2.0 ** rng.integers(-6, -2, size=(k // group, 1, n))
    return ((codes - zeros) * scales).reshape(k, n).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["asym", "sym", "sym full range"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_weights_on_the_grid_survive_exactly(method, kind, bits, tmp_path):
    full = kind.endswith("range")
    w = on_grid(bits, kind != "asym", full)
    data = zoo.float_feeds(3)
    model = zoo.siblings(tmp_path / "m.onnx", {"y": w})
    recipe = Recipe(method, Spec(bits, 32, kind != "asym"), options={"enable_full_range": True} if full else {})
    out = written(model, tmp_path / "q.onnx", recipe, data)
    np.testing.assert_array_equal(measure.decoded(out)["y"], w)


def test_rtn_search_and_full_range_help_where_they_should(enc, tmp_path):
    def error(options: dict[str, bool], spec: Spec) -> float:
        after = measure.decoded(written(enc, tmp_path / "q.onnx", Recipe("rtn", spec, options=options)))
        return sum(np.square(after[name] - w).sum() for name, w in measure.float_weights(enc).items())

    for spec in (Spec(3, 64), Spec(4, 32, True)):
        assert error({"enable_mse_search": True}, spec) < error({}, spec)
    assert error({"enable_full_range": True}, Spec(2, 32, True)) < error({}, Spec(2, 32, True))


def test_rtn_searches_the_range_it_is_given(enc, tmp_path):
    def error(search: tuple[float, float, float]) -> float:
        recipe = Recipe("rtn", Spec(3, -1), options={"enable_mse_search": True, "mse_range": search})
        after = measure.decoded(written(enc, tmp_path / "q.onnx", recipe))
        return sum(np.square(after[name] - w).sum() for name, w in measure.float_weights(enc).items())

    assert error((0.5, 1.0, 0.01)) < error((0.99, 1.0, 0.01))


def test_a_larger_calibration_counts_tokens_not_samples(enc, tmp_path):
    """The same tokens in ragged samples or in equal ones are the same calibration."""
    rows = np.concatenate([feed["x"][0] for feed in zoo.float_feeds(6)])
    cuts = [rows[:5], rows[5:17], rows[17:100], rows[100:]]
    for method in ("gptq", "awq"):
        even = written(enc, tmp_path / "e.onnx", Recipe(method), [{"x": part[None]} for part in np.split(rows, 6)])
        ragged = written(enc, tmp_path / "r.onnx", Recipe(method), [{"x": part[None]} for part in cuts])
        a, b = measure.decoded(even), measure.decoded(ragged)
        assert all(measure.agreement(a[name], b[name]) > 0.995 for name in a)


def test_calibration_runs_the_model_once_per_sample(lm, lm_data, forwards, tmp_path):
    written(lm, tmp_path / "q.onnx", Recipe("gptq"), lm_data)
    assert len(lm_data) <= len(forwards) <= len(lm_data) + 2


def test_the_memory_budget_changes_nothing_but_memory(lm, lm_data, tmp_path, monkeypatch):
    """The statistics are the float model's whatever the window: later windows do not see quantized layers."""
    for method in ("gptq", "awq"):
        with monkeypatch.context() as little:
            little.setattr(memory, "WINDOW", 60_000)
            quantize(lm, tmp_path / "small.onnx", Recipe(method), lm_data)
        quantize(lm, tmp_path / "large.onnx", Recipe(method), lm_data)
        large, small = measure.decoded(tmp_path / "large.onnx"), measure.decoded(tmp_path / "small.onnx")
        assert all(measure.agreement(small[name], w) > 0.998 for name, w in large.items())


def test_dead_and_constant_channels_are_handled(tmp_path):
    """Zero inputs, zero weights, constant and one-signed groups, denormals: finite, and zero stays zero."""
    w = zoo.weight(9, 64, 16)
    w[:32, 0], w[32:, 1], w[:, 2], w[:, 3], w[:, 4] = 0, 0.25, np.abs(w[:, 2]), -np.abs(w[:, 3]), 1e-40
    data = zoo.float_feeds(4)
    for feed in data:
        feed["x"][..., 7:11] = 0
    model = zoo.siblings(tmp_path / "m.onnx", {"y": w})
    for method in ("rtn", "gptq", "awq"):
        for symmetric in (False, True):
            out = written(model, tmp_path / "q.onnx", Recipe(method, Spec(4, 32, symmetric), accuracy_level=0), data)
            got = measure.decoded(out)["y"]
            assert np.isfinite(got).all()
            assert np.isfinite(measure.run(out, data)["y"]).all()
            if method == "rtn":
                np.testing.assert_array_equal(got[:32, 0], 0)
                np.testing.assert_allclose(got[32:, 1], 0.25, rtol=1e-6)
                assert measure.sqnr(w[:, 2:4].astype(np.float64), got[:, 2:4]) > 15
