"""Bias correction and low-rank compensation end to end: what ONNX Runtime computes from the file that is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize, tune
from onnx_woq.errors import DataError, RecipeError
from onnx_woq.targets.matmulnbits import minimum_runtime
from tests.acceptance.quantize.test_methods import skewed
from tests.support import measure
from tests.support.runtimes import need
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

METHODS = ("rtn", "gptq", "awq")
SPEC = Spec(3, 32)  # rounding that can be seen
WEIGHTS = {"a": zoo.weight(1, 96, 40), "b": zoo.weight(2, 96, 72)}
FACTORS = ("_down", "_up")


@pytest.fixture(autouse=True, scope="module")
def _runtime() -> None:
    need(minimum_runtime(8, accuracy_level=0), "8 bits in float arithmetic")


def recipe(method: str = "gptq", spec: Spec = SPEC, **fields: object) -> Recipe:
    return Recipe(method, spec, accuracy_level=0, **fields)


def shifted(seed: int, width: int = 96) -> list[dict[str, np.ndarray]]:
    """Inputs of different sizes whose mean is not zero."""
    offset = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return [{"x": feed["x"] + offset} for feed in skewed(seed, width)]


def errors(model: Path, out: Path, what: Recipe, data: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Quantizes; gives by name how far each output [tokens, width] is off on the calibration data."""
    quantize(model, out, what, data)
    onnx.checker.check_model(str(out))
    before, after = measure.run(model, data), measure.run(out, data)
    return {name: after[name] - before[name] for name in before}


def total(found: dict[str, np.ndarray]) -> float:
    return sum(float(np.square(error).sum()) for error in found.values())


def main_nodes(path: Path) -> dict[str, onnx.NodeProto]:
    """MatMulNBits nodes but those of factors."""
    return {name: node for name, node in measure.low_bit(path).items() if not node.name.endswith(FACTORS)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [False, True], ids=["input", "norm"])
def test_the_mean_output_is_that_of_the_float_model(method, norm, tmp_path):
    """Exactly, but for rounding, and the squared error is smaller than without."""
    model, data = zoo.siblings(tmp_path / "m.onnx", WEIGHTS, norm=norm), shifted(1)
    plain = errors(model, tmp_path / "p.onnx", recipe(method), data)
    found = errors(model, tmp_path / "q.onnx", recipe(method, bias_correction=True), data)
    for name, error in found.items():
        size = np.abs(error).mean()
        assert np.abs(error.mean(axis=0)).max() < 1e-3 * size
        assert np.abs(plain[name].mean(axis=0)).max() > 0.1 * size  # or it would have been so without
        if method == "rtn":  # whose codes are the same
            np.testing.assert_allclose(error, plain[name] - plain[name].mean(axis=0), atol=1e-3 * size)
    if method != "gptq":  # which is greedy: for other inputs it takes another way
        assert total(found) < total(plain)


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_those_for_inputs_less_their_mean(method, tmp_path):
    """A constant takes the mean: solvers see the rest."""
    model, data = zoo.siblings(tmp_path / "m.onnx", WEIGHTS), shifted(1)
    mean = np.concatenate([feed["x"] for feed in data], axis=1).mean(axis=1, keepdims=True)
    options = {"enable_auto_scale": False} if method == "awq" else {}  # scales are chosen by mean |x|
    quantize(model, tmp_path / "q.onnx", recipe(method, options=options, bias_correction=True), data)
    quantize(model, tmp_path / "p.onnx", recipe(method, options=options), [{"x": f["x"] - mean} for f in data])
    plain, found = (measure.decoded(tmp_path / f"{name}.onnx") for name in "pq")
    for name, w in plain.items():
        assert np.mean(np.isclose(found[name], w, atol=1e-4)) > 0.99


def test_an_input_that_never_changes_is_left_to_the_constant(tmp_path):
    data = shifted(6)
    for feed in data:
        feed["x"][..., [5, 40]] = [3.0, -700.0]
    model = zoo.siblings(tmp_path / "m.onnx", WEIGHTS)
    for method in METHODS:
        for rank in (0, 16):
            found = errors(model, tmp_path / "q.onnx", recipe(method, lowrank=rank, bias_correction=True), data)
            plain = errors(model, tmp_path / "p.onnx", recipe(method, lowrank=rank), data)
            for error in found.values():
                assert np.abs(error.mean(axis=0)).max() < 0.01 * np.abs(error).mean()
            assert total(found) < total(plain)


def test_sixteen_directions_and_a_mean_are_taken_by_sixteen_factors_and_a_constant(tmp_path):
    """The factors leave the mean alone."""
    rng = np.random.default_rng(0)
    directions, offset = rng.standard_normal((16, 96)), 3 * rng.standard_normal(96)
    data = [{"x": (rng.standard_normal((1, 50, 16)) @ directions + offset).astype(np.float32)} for _ in range(4)]
    model = zoo.siblings(tmp_path / "m.onnx", WEIGHTS)
    left = [
        total(errors(model, tmp_path / "q.onnx", recipe("rtn", lowrank=rank, bias_correction=True), data))
        for rank in (0, 16)
    ]
    assert left[1] < 1e-3 * left[0]


def test_tokens_that_are_padding_do_not_count(lm, tmp_path):
    """The corrections are those of the same samples without their padding."""
    rows = zoo.token_ids(6)
    short = [{**feed, **{name: array[:, :15] for name, array in feed.items()}} for feed in zoo.lm_feeds(rows)]
    padded = zoo.lm_feeds(rows)
    for feed in padded:
        feed["attention_mask"][:, 15:] = 0
    for name, data in (("short", short), ("padded", padded)):
        quantize(lm, tmp_path / f"{name}.onnx", recipe(bias_correction=True), data)
    a, b = (biases(tmp_path / f"{name}.onnx") for name in ("short", "padded"))
    assert len(a) == 15
    for name, bias in a.items():
        np.testing.assert_allclose(b[name], bias, atol=1e-3 * np.abs(bias).max())


def biases(path: Path) -> dict[str, np.ndarray]:
    values = measure.tensors(onnx.load(path))
    return {name: values[node.input[5]] for name, node in main_nodes(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_tap_of_a_whole_model_is_corrected_for_its_own_inputs(method, lm, lm_data, tmp_path):
    out = tmp_path / "q.onnx"
    report = quantize(lm, out, recipe(method, bias_correction=True), lm_data)
    inputs, weights, stored, found = (
        measure.activations(lm, lm_data), measure.float_weights(lm), measure.decoded(out), biases(out)
    )  # fmt: skip
    assert found.keys() == weights.keys()
    # Or what is stored is scaled.
    for name in (name for group in report.groups if not group.scaling for name in group.nodes):
        wanted = inputs[name].mean(axis=0) @ (weights[name] - stored[name])
        np.testing.assert_allclose(found[name], wanted, atol=1e-4 * np.abs(inputs[name]).mean())


@pytest.mark.parametrize("method", [*METHODS, "teq", "hqq"])
@pytest.mark.parametrize("corrected", [False, True], ids=["", "and bias"])
@pytest.mark.parametrize("norm", [False, True], ids=["mul", "norm"])
def test_factors_take_what_the_best_of_their_rank_can_take(method, corrected, norm, tmp_path):
    """By the singular values of the outputs' own errors, whatever the input is divided by."""
    model, data = zoo.siblings(tmp_path / "m.onnx", WEIGHTS, norm=norm), shifted(2)
    plain = errors(model, tmp_path / "p.onnx", recipe(method, bias_correction=corrected), data)
    found = errors(model, tmp_path / "q.onnx", recipe(method, lowrank=16, bias_correction=corrected), data)
    least = np.square(np.linalg.svd(np.hstack(list(plain.values())), compute_uv=False)[16:]).sum()
    assert least * 0.999 < total(found) < least + 0.05 * (total(plain) - least)
    if corrected:
        for error in found.values():
            assert np.abs(error.mean(axis=0)).max() < 1e-3 * np.abs(error).mean()


def test_awq_did_divide_the_input(tmp_path):
    """Or the test above shows nothing about it."""
    for norm, scaling in ((True, "norm"), (False, "mul")):
        model = zoo.siblings(tmp_path / "m.onnx", WEIGHTS, norm=norm)
        report = quantize(model, tmp_path / "q.onnx", recipe("awq", lowrank=16, bias_correction=True), shifted(2))
        assert [group.scaling for group in report.groups] == [scaling]


@pytest.mark.parametrize("method", METHODS)
def test_more_rank_leaves_less(method, tmp_path):
    model, data = zoo.siblings(tmp_path / "m.onnx", WEIGHTS), shifted(3)
    left = [total(errors(model, tmp_path / "q.onnx", recipe(method, lowrank=r), data)) for r in (0, 16, 32, 48, 96)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-3 * left[0]  # nothing but the 8 bits of the factors


def test_both_branches_read_the_same_activation(tmp_path):
    """What is computed in one of them is not there in the other."""
    k, net, bodies = 48, zoo.Net(), []
    for seed, name in enumerate(("yes", "no")):
        inner = zoo.Net()
        inner.matmul("x", zoo.weight(seed, k, k), f"{name}_out")
        value = onnx.helper.make_tensor_value_info(f"{name}_out", zoo.F32, None)
        bodies.append(onnx.helper.make_graph(inner.nodes, name, [], [value], initializer=inner.tensors))
    net.op("If", "flag", out="y", then_branch=bodies[0], else_branch=bodies[1])
    inputs = {"x": (zoo.F32, ["b", "s", k]), "flag": (zoo.BOOL, [])}
    model = net.save(tmp_path / "m.onnx", inputs, {"y": (zoo.F32, ["b", "s", k])})
    data = [feed | {"flag": np.array(i % 2 == 1)} for i, feed in enumerate(zoo.float_feeds(4, width=k))]
    left = [total(errors(model, tmp_path / "q.onnx", recipe("rtn", lowrank=rank), data)) for rank in (0, 16)]
    assert left[1] < left[0]
    assert len(measure.low_bit(tmp_path / "q.onnx")) == 6


def test_what_reads_one_activation_shares_its_factor(lm, lm_data, tmp_path):
    quantize(lm, tmp_path / "q.onnx", recipe(lowrank=16), lm_data)
    found = measure.low_bit(tmp_path / "q.onnx")
    names = [node.name for node in found.values()]
    assert sum(name.endswith("_down") for name in names) == 4 * 2 + 1
    assert sum(name.endswith("_up") for name in names) == 7 * 2 + 1
    model = onnx.load(tmp_path / "q.onnx")
    adds = {n.output[0]: n for n in model.graph.node if n.op_type == "Add"}
    for name in ("layer0.q", "layer0.k", "layer0.v"):
        product, addend = adds[name].input
        assert found[addend].input[0] == found["layer0.q_down"].output[0]
        assert found[product].input[0] == found["layer0.q_down"].input[0]


@pytest.mark.parametrize(
    ("build", "feeds"),
    [
        (zoo.gemms, [{"a": zoo.correlated(i, 20, 40) + 1} for i in range(4)]),
        (zoo.constants, zoo.float_feeds(4, width=48)),
        (zoo.branches, [f | {"flag": np.array(i % 2 == 1)} for i, f in enumerate(zoo.float_feeds(4, width=48))]),
        (zoo.loop, zoo.float_feeds(4, width=48)),
        (zoo.functions, None),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_wherever_a_product_is_it_computes_what_is_stored(build, feeds, method, tmp_path):
    model, out = build(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    if feeds is None:
        width = next(i.type.tensor_type.shape.dim[-1].dim_value for i in onnx.load(model).graph.input)
        feeds = zoo.float_feeds(4, width=width)
    sizes = {}
    for rank in (0, 16):
        found = errors(model, out, recipe(method, lowrank=rank, bias_correction=True), feeds)
        sizes[rank] = total(found)
        if build is zoo.gemms:  # whose products are the outputs
            for name, error in found.items():
                assert np.abs(error.mean(axis=0)).max() < 1e-2 * np.abs(error).mean(), name
        twin = measure.run(measure.decoded_twin(out), feeds)
        for name, got in measure.run(out, feeds).items():
            np.testing.assert_allclose(got, twin[name], atol=1e-4 * np.abs(got).max())
    assert sizes[16] < sizes[0]


def test_half_precision(tmp_path):
    model = arch.decoder(tmp_path / "m.onnx", layers=1, dtype=zoo.F16)
    data = [arch.ids_feed(2, 12, layers=1, dtype=zoo.F16, seed=i) for i in range(4)]
    plain, added = (
        quantize(model, tmp_path / f"{n}.onnx", recipe("gptq", Spec(2, 32), **fields), data)
        for n, fields in (("p", {}), ("q", {"lowrank": 16, "bias_correction": True}))
    )
    onnx.checker.check_model(str(added.output))
    before = measure.run(model, data)["logits"]
    sqnr = [measure.sqnr(before, measure.run(report.output, data)["logits"]) for report in (plain, added)]
    assert sqnr[1] > sqnr[0] + 1
    got, twin = (measure.run(m, data)["logits"] for m in (added.output, measure.decoded_twin(added.output)))
    np.testing.assert_allclose(got, twin, atol=2e-2 * np.abs(twin).max())


def test_bfloat16_is_computed_between_casts(tmp_path):
    net, weights = zoo.Net(), {name: zoo.weight(i, 96, 48) for i, name in enumerate("ab")}
    half = net.op("Cast", "x", out="half", to=zoo.BF16)
    for name, w in weights.items():
        net.op("Cast", net.matmul(half, w, f"{name}_half", dtype=zoo.BF16), out=name, to=zoo.F32)
    outputs = {name: (zoo.F32, ["batch", "seq", 48]) for name in weights}
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, ["batch", "seq", 96])}, outputs, check=False)
    data, out = shifted(5), tmp_path / "q.onnx"
    exact = {n: np.concatenate([f["x"][0] for f in data]).astype(np.float64) @ w for n, w in weights.items()}
    left = []
    for fields in ({}, {"lowrank": 32, "bias_correction": True}):
        quantize(model, out, recipe("rtn", Spec(2, 32), **fields), data)
        found = measure.run(out, data)
        left.append(sum(np.square(found[name] - y).sum() for name, y in exact.items()))
    assert left[1] < 0.2 * left[0]
    onnx.shape_inference.infer_shapes(onnx.load(out), check_type=True, strict_mode=True)


def test_fp16_of_one_layer(tmp_path):
    model = zoo.chain(tmp_path / "m.onnx", (160, 64), dtype=zoo.F16)
    data = [{"x": (zoo.correlated(i, 40, 160) + 0.5).astype(np.float16)} for i in range(2)]
    plain = errors(model, tmp_path / "p.onnx", recipe("rtn"), data)["h0"]
    found = errors(model, tmp_path / "q.onnx", recipe("rtn", lowrank=16, bias_correction=True), data)["h0"]
    least = np.square(np.linalg.svd(plain - plain.mean(axis=0), compute_uv=False)[16:]).sum()
    assert np.square(found).sum() < least + 0.1 * (np.square(plain).sum() - least)
    assert np.abs(found.mean(axis=0)).max() < 0.05 * np.abs(plain.mean(axis=0)).max()


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("dtype", [zoo.F32, zoo.F16], ids=["fp32", "fp16"])
def test_bytes_are_those_written(level, dtype, tmp_path):
    model = zoo.chain(tmp_path / "m.onnx", (160, 144, 100), dtype=dtype)
    data = [{"x": zoo.correlated(0, 40, 160).astype(np.float16 if dtype == zoo.F16 else np.float32)}]
    what = Recipe("rtn", SPEC, accuracy_level=level, lowrank=32, bias_correction=True)
    looked = inspect(model, what)
    report = quantize(model, tmp_path / "q.onnx", what, data)
    assert [group.bytes_after for group in looked.groups] == [group.bytes_after for group in report.groups]
    assert report.bytes_after == sum(p.stat().st_size for p in tmp_path.glob("q.onnx*"))
    stored = sum(a.nbytes for a in measure.tensors(onnx.load(report.output)).values())
    assert sum(group.bytes_after for group in report.groups) == stored
    assert {group.rank for group in report.groups} == {32}
    assert {measure.attributes(n)["accuracy_level"] for n in measure.low_bit(report.output).values()} == {level}


def test_a_reported_error_is_that_of_all_that_is_added(tmp_path):
    """It falls with each of them, and is the outputs' own."""
    model, data, reported = zoo.siblings(tmp_path / "m.onnx", {"a": WEIGHTS["a"]}), shifted(4), []
    for fields in ({}, {"bias_correction": True}, {"bias_correction": True, "lowrank": 16}):
        report = quantize(model, tmp_path / "q.onnx", recipe("gptq", **fields), data)
        before, after = (measure.run(m, data)["a"] for m in (model, tmp_path / "q.onnx"))
        share = np.square(after - before).sum() / np.square(before).sum()
        assert report.groups[0].error == pytest.approx(share, rel=1e-2)
        reported.append(report.groups[0].error)
    assert reported == sorted(reported, reverse=True)
    assert reported[2] < reported[1] < reported[0]


@pytest.mark.parametrize("fields", [{"bias_correction": True}, {"lowrank": 16}], ids=str)
def test_rounding_needs_data_then(fields, enc, enc_data, tmp_path):
    with pytest.raises(DataError, match=rf"{next(iter(fields))} needs calibration data.*--calib"):
        quantize(enc, tmp_path / "q.onnx", recipe("rtn", **fields))
    assert not list(tmp_path.iterdir())
    report = quantize(enc, tmp_path / "q.onnx", recipe("rtn", **fields), enc_data)
    assert report.calibration
    assert all(group.error is not None for group in report.groups)


@pytest.mark.parametrize("rank", [-16, 8, 24, 2048, True, 16.0, "16"])
def test_a_rank_that_no_kernel_knows_is_refused(rank):
    with pytest.raises(RecipeError, match="multiple of 16"):
        Recipe(lowrank=rank)


def test_on_the_command_line(lm, ids, cli, tmp_path):
    arguments = ["quantize", lm, "-o", tmp_path / "q.onnx", "--config", "RTN_G32ASYM", "--calib", ids]
    arguments += ["--option", "lowrank=16", "--option", "bias_correction=true"]
    assert {group["rank"] for group in json.loads(cli.ok(*arguments, "--json").stdout)["taps"]} == {16}
    assert "4 bit g32 asym + rank 16" in cli.ok(*arguments).stdout
    assert "4 bit g32 asym + rank 16" in cli.ok("inspect", lm, "--option", "lowrank=16").stdout
    written = measure.recipe_of(tmp_path / "q.onnx")
    assert (written["lowrank"], written["bias_correction"]) == (16, True)


def test_tuning_calibrates_once_for_all(lm, lm_data, tmp_path):
    """Shared statistics, in memory or in files, give what quantizing alone gives."""
    configs = {"plain": recipe("rtn"), "bias": recipe("rtn", bias_correction=True), "both": recipe("gptq", lowrank=16)}
    alone = {name: tmp_path / f"{name}.onnx" for name in configs}
    for name, what in configs.items():
        quantize(lm, alone[name], what, lm_data)
    seen = []

    def look(path: Path) -> float:
        seen.append(measure.tensors(onnx.load(path)))
        return 1.0

    for limit in (None, 2 << 30):
        seen.clear()
        result = tune(lm, look, lm_data, configs=configs, objective="best", max_memory=limit)
        assert [trial.status for trial in result.trials] == ["ok"] * 3, [trial.error for trial in result.trials]
        assert len(seen) == 4  # the float model first
        for name, found in zip(configs, seen[1:], strict=True):
            wanted = measure.tensors(onnx.load(alone[name]))
            assert found.keys() == wanted.keys()
            assert all(np.array_equal(found[key], array) for key, array in wanted.items())
