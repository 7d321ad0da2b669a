"""Mixed precision by target, held against the files that come out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, TuneResult, quantize, tune
from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.stats import Stats, output_error
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.solve import task_of
from onnx_woq.errors import RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.evaluation.metrics import compare
from onnx_woq.tuning.mixed.sensitivity import layer_losses
from tests.support import measure
from tests.zoo import small as zoo

BASE = Recipe("gptq", Spec(4, 32))
WEIGHTS = 2 * (4 * zoo.HIDDEN**2 + 3 * zoo.HIDDEN * zoo.WIDE) + zoo.HIDDEN * zoo.VOCAB
"""In the matrices of the zoo's language model."""


def mix(model: Path, data: list, folder: Path, **options) -> TuneResult:
    return tune(model, None, data, configs={"uniform": BASE}, workdir=folder / "work", **options)


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def matrix_bytes(path: Path) -> int:
    """Of every constant that a matrix product of the main graph reads."""
    model = onnx.load(path)
    values = measure.tensors(model)
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "MatMulNBits")]
    names = {name for node in products for name in node.input[1:] if name in values}
    return sum(values[name].nbytes for name in names)


@pytest.fixture(scope="module")
def data() -> list[dict[str, np.ndarray]]:
    return zoo.lm_feeds(zoo.token_ids(24))


@pytest.fixture(scope="module")
def pareto(lm, data, tmp_path_factory) -> TuneResult:
    return mix(lm, data, tmp_path_factory.mktemp("pareto"), objective="pareto", points=5)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_size_is_never_exceeded_and_nearly_used(share, lm, data, tmp_path):
    with pytest.raises(RecipeError, match="to") as refused:
        mix(lm, data, tmp_path, target_size=1)
    found = re.search(r"take ([\d,]+) to ([\d,]+) bytes", str(refused.value))
    low, high = (int(number.replace(",", "")) for number in found.groups())
    target = int(low + share * (high - low))
    result = mix(lm, data, tmp_path, target_size=target, output=tmp_path / "a much longer name than the model has.onnx")
    size = file_bytes(result.path)
    assert result.met
    assert 0.97 * target <= size <= target
    assert result.best.bytes <= target
    measure.session(result.path)


@pytest.mark.parametrize("target", [2.9, 4.25, 7.0])
def test_bits_per_weight_are_those_of_the_file(target, lm, data, tmp_path):
    result = mix(lm, data, tmp_path, target_bpw=target, output=tmp_path / "m.onnx")
    bits = 8 * matrix_bytes(result.path) / WEIGHTS
    assert 0.97 * target <= bits <= target
    chosen = next(point for point in result.frontier if point.chosen)
    assert chosen.bpw == pytest.approx(bits, rel=1e-12)
    assert sum(layer.bytes for layer in result.layers) == matrix_bytes(result.path)
    assert len({layer.spec for layer in result.layers}) > 1


def test_configurations_beside_the_mixes_count_their_own_scales(lm, data, tmp_path):
    """A mix may store scales in float16 where a configuration that it is held against does not."""
    configs = {"mixes": replace(BASE, half_scales=True), "whole scales": BASE}
    whole = quantize(lm, tmp_path / "whole.onnx", BASE, data[:16]).output
    bits = 8 * matrix_bytes(whole) / WEIGHTS
    options = {"configs": configs, "workdir": tmp_path / "w"}
    for points, target, tried in ((1, {"objective": "pareto"}, True), (0, {"target_bpw": bits - 0.1}, False)):
        result = tune(lm, None, data, points=points, **target, **options)
        found = {point.name: point.bpw for point in result.frontier if point.name}
        assert ("whole scales" in found) == tried
        if tried:
            assert found["whole scales"] == pytest.approx(bits, rel=1e-12)
            assert found["mixes"] == pytest.approx(bits - 16 / 32, rel=1e-2)


@pytest.mark.parametrize("half", [False, True])
def test_three_bits_are_chosen_where_they_take_three(half, data, tmp_path):
    source = zoo.language_model(tmp_path / "float.onnx", opset=18)
    configs = {"uniform": dataclasses.replace(BASE, half_scales=half)}
    out = tmp_path / "m.onnx"
    result = tune(source, None, data, configs=configs, workdir=tmp_path / "work", target_bpw=3.7, output=out)
    before, after = ({t.name: t for t in onnx.load(path).graph.initializer} for path in (source, out))
    new = [t for name, t in after.items() if name not in before and "uint8" not in name]
    stored = sum(onnx.numpy_helper.to_array(t).nbytes for t in new)
    assert stored == sum(layer.bytes for layer in result.layers)
    assert 0.97 * 3.7 <= 8 * stored / WEIGHTS <= 3.7
    specs = {layer.name: layer.spec for layer in result.layers}
    assert 3 in {spec.bits for spec in specs.values() if spec}
    for name, weight in measure.decoded(out).items():
        if name in specs:
            assert len(np.unique(weight[:32, 0])) <= 2 ** specs[name].bits, "codes are those of the layer's own grid"


def test_at_the_bytes_of_uniform_four_bits_a_mix_is_closer_to_the_float_model(lm, data, tmp_path):
    fresh = zoo.lm_feeds(zoo.token_ids(24, seed=99))
    uniform = tmp_path / "uniform.onnx"
    quantize(lm, uniform, BASE, data[:16])
    result = mix(lm, data, tmp_path, target_size=file_bytes(uniform), output=tmp_path / "m.onnx", samples=16)
    assert [trial.name for trial in result.trials][-1] == "uniform"
    assert result.best.name != "uniform"
    assert file_bytes(result.path) <= file_bytes(uniform)
    assert compare(result.path, lm, fresh).kl < 0.9 * compare(uniform, lm, fresh).kl


def test_the_frontier_falls_and_predictions_are_near_what_is_measured(pareto):
    predicted = [point for point in pareto.frontier if not point.name]
    assert len(predicted) > 5
    assert all(a.bytes < b.bytes and a.predicted > b.predicted for a, b in itertools.pairwise(predicted))
    assert all(a.bpw <= b.bpw for a, b in itertools.pairwise(predicted))
    mixes = [point for point in pareto.frontier if point.name and point.kind == "mix"]
    assert len(mixes) == 5
    assert all(a.measured > b.measured for a, b in itertools.pairwise(mixes))
    assert all(point.standard_error > 0 for point in mixes)
    assert max(abs(math.log(point.predicted / point.measured)) for point in mixes) < math.log(2)
    assert mixes[0].measured > 20 * mixes[-1].measured
    [uniform] = [point for point in pareto.frontier if point.kind == "uniform"]
    assert uniform.recipe == BASE
    beside = np.interp(uniform.bytes, [p.bytes for p in mixes], np.log([p.measured for p in mixes]))
    assert uniform.measured > np.exp(beside)
    assert pareto.target == "the frontier"
    json.dumps(pareto.to_dict(), allow_nan=False)


def test_the_point_that_is_written_is_the_smallest_within_the_limit(pareto):
    met = [trial for trial in pareto.trials if trial.met]
    assert pareto.met
    assert pareto.best.bytes == min(trial.bytes for trial in met)
    assert [point.name for point in pareto.frontier if point.chosen] == [pareto.best.name]
    assert pareto.path.exists()


@pytest.mark.parametrize("limit", [0.3, 0.03])
def test_a_divergence_is_kept_with_few_bytes(limit, lm, data, pareto, tmp_path):
    result = mix(lm, data, tmp_path, max_kl=limit)
    assert result.met
    assert result.best.verdict == "within"
    assert 0.6 * limit < result.best.metric <= limit
    assert result.limit == limit
    mixes = [point for point in pareto.frontier if point.name and point.kind == "mix"]
    assert result.best.bytes < min(point.bytes for point in mixes if point.measured <= limit)
    assert len(result.trials) <= 9


def test_a_loss_of_the_users_metric_is_kept_whichever_way_it_points(enc, enc_data, tmp_path):
    def distance(path: Path) -> float:
        return -measure.sqnr(measure.run(enc, enc_data)["y"] + 1e-9, measure.run(Path(path), enc_data)["y"])

    def evaluations(sign: int):
        def evaluate(path: Path) -> float:
            return sign * (10 ** (distance(path) / 10)) + 5.0

        return evaluate

    for sign, higher in ((1, False), (-1, True)):
        result = tune(
            enc,
            evaluations(sign),
            enc_data,
            configs=[BASE],
            max_loss=0.02,
            higher_is_better=higher,
            workdir=tmp_path / str(sign),
        )
        assert result.met
        assert abs(result.best.metric - 5.0) <= 0.02
        smaller = [trial for trial in result.trials if trial.bytes < result.best.bytes]
        assert smaller
        assert not any(trial.met for trial in smaller)
        assert result.limit == pytest.approx(5.0 + sign * 0.02, rel=1e-6)


def test_the_same_question_has_the_same_answer(lm, data, tmp_path):
    first, second = (
        mix(lm, data, tmp_path / name, target_bpw=3.5, output=tmp_path / name / "m.onnx") for name in ("a", "b")
    )
    assert [t.recipe for t in first.trials] == [t.recipe for t in second.trials]
    assert [t.metric for t in first.trials] == [t.metric for t in second.trials]
    assert first.frontier == second.frontier
    assert first.path.with_name("m.onnx.data").read_bytes() == second.path.with_name("m.onnx.data").read_bytes()


def test_a_resumed_run_measures_nothing_twice(lm, data, tmp_path, forwards):
    first = mix(lm, data, tmp_path, max_kl=0.1)
    before = len(forwards)
    assert before
    again = mix(lm, data, tmp_path, max_kl=0.1)
    assert len(forwards) == before
    assert all(trial.resumed for trial in again.trials)
    assert (again.best.name, again.best.metric) == (first.best.name, first.best.metric)
    assert [p.measured for p in again.frontier] == [p.measured for p in first.frontier]
    other = mix(lm, data, tmp_path, target_bpw=3.5)  # another target: the sensitivities are known
    samples = len(data) - 8
    assert len(forwards) - before == samples + 2 * len(other.trials[0].pairs)


def test_the_file_says_how_to_make_it_again(lm, data, tmp_path):
    result = mix(lm, data, tmp_path, target_bpw=3.5, output=tmp_path / "m.onnx", samples=16)
    recipe = Recipe.from_dict(measure.recipe_of(result.path))
    assert recipe == result.best.recipe
    quantize(lm, tmp_path / "again.onnx", recipe, data[:16])
    weights = [measure.tensors(onnx.load(tmp_path / name)) for name in ("m.onnx", "again.onnx")]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_the_recipe_settles_stays_as_it_is(lm, data, tmp_path):
    base = Recipe("gptq", Spec(4, 32), overrides={"down": Spec(8, 64), "o$": None}, exclude=("logits",))
    result = tune(lm, None, data, configs=[base], target_bpw=5.0, workdir=tmp_path)
    specs = {layer.name: layer.spec for layer in result.layers}
    assert {name: spec for name, spec in specs.items() if "down" in name} == {
        f"layer{i}.down": Spec(8, 64) for i in (0, 1)
    }
    assert not [name for name in specs if name.endswith(".o") or name == "logits"]
    assert any(spec != base.spec for name, spec in specs.items() if "down" not in name)


def test_a_tied_head_costs_what_it_adds_to_the_file(tied_lm, data, tmp_path):
    """Its float weights stay for the embedding: left float it adds nothing, quantized it adds all that it takes."""
    result = mix(tied_lm, data, tmp_path, target_size=int(0.75 * file_bytes(tied_lm)), output=tmp_path / "m.onnx")
    assert next(layer for layer in result.layers if layer.name == "logits").spec is None
    assert file_bytes(result.path) <= 0.75 * file_bytes(tied_lm)


TABLES = replace(BASE, embedding=Spec(4, 32))


def test_a_tied_head_and_its_table_are_one_unit(tied_lm, data, tmp_path):
    options = {"configs": [TABLES], "workdir": tmp_path / "work"}
    result = tune(tied_lm, None, data, target_bpw=4.5, output=tmp_path / "m.onnx", **options)
    [head] = [layer for layer in result.layers if layer.name == "logits"]
    assert head.nodes == head.sites == ("logits", "tokens")
    assert head.spec is not None
    bits = 8 * sum(layer.bytes for layer in result.layers) / WEIGHTS
    assert 0.97 * 4.5 <= bits <= 4.5
    model = onnx.load(result.path)
    [gather] = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    [product] = [node for node in model.graph.node if node.output[0] == "logits"]
    producers = {node.output[0]: node for node in model.graph.node}
    assert producers[gather.input[0]].input[0] == product.input[1], "the codes are there once"
    assert "embedding" not in measure.tensors(model)
    third = file_bytes(tied_lm) // 3
    small = tune(tied_lm, None, data, target_size=third, output=tmp_path / "s.onnx", **options)
    assert 0.97 * third <= file_bytes(small.path) <= third


def test_a_table_of_its_own_is_a_unit_of_its_own(lm, data, tmp_path):
    options = {"target_bpw": 4.0, "workdir": tmp_path / "work"}
    result = tune(lm, None, data, configs=[TABLES], **options)
    [table] = [layer for layer in result.layers if layer.name == "tokens"]
    assert (table.k, table.n, table.nodes) == (zoo.HIDDEN, zoo.VOCAB, ("tokens",))
    assert table.predicted > 0
    bits = 8 * sum(layer.bytes for layer in result.layers) / (WEIGHTS + zoo.HIDDEN * zoo.VOCAB)
    assert 0.97 * 4.0 <= bits <= 4.0
    [predicted] = [layer.predicted for layer in result.layers if layer.name == "tokens"]
    assert predicted < 0.5 * sum(layer.predicted for layer in result.layers)
    excluded = replace(TABLES, exclude=("embedding",))
    result = tune(lm, None, data, configs=[excluded], **options)
    assert "tokens" not in [layer.name for layer in result.layers]


@pytest.mark.parametrize(("target", "bits"), [(3.75, 3), (5.25, 5)])
def test_widths_that_no_kernel_has_take_their_bits_where_the_opset_has_what_expands_them(target, bits, tmp_path, data):
    model = zoo.language_model(tmp_path / "m.onnx", opset=18)
    options = {"configs": [replace(BASE, half_scales=True)], "workdir": tmp_path / "work"}
    result = tune(model, None, data, target_bpw=target, output=tmp_path / "o.onnx", **options)
    chosen = [layer for layer in result.layers if layer.spec and layer.spec.bits == bits]
    assert chosen
    assert all(bits < layer.bits < bits + 1 for layer in chosen if layer.k % layer.spec.group_size == 0)
    size = file_bytes(result.path)
    again = tune(model, None, data, target_size=size, output=tmp_path / "s.onnx", **options)
    assert 0.97 * size <= file_bytes(again.path) <= size


def test_widths_between_those_of_the_kernels_lose_less_at_equal_bytes(tmp_path, data):
    """At 5.1 bits 4 and 8 are far away; before opset 18 there is nothing in between."""
    fresh, losses = zoo.lm_feeds(zoo.token_ids(24, seed=99)), {}
    for opset in (17, 18):
        folder = tmp_path / str(opset)
        folder.mkdir()
        model = zoo.language_model(folder / "m.onnx", opset=opset)
        result = tune(model, None, data, configs=[BASE], target_bpw=5.6, workdir=folder / "w", output=folder / "o.onnx")
        losses[opset] = compare(result.path, model, fresh).kl
    assert losses[18] < 0.8 * losses[17]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_finer_grids_lose_is_foretold_from_four_bits(method, symmetric, lm):
    recipe = Recipe(method, options={"enable_full_range": True})
    rng = np.random.default_rng(0)
    for planned in make_plan(load(lm), recipe).groups[:3]:
        group = planned.source
        x = rng.standard_normal((400, group.k)).astype(np.float32) @ rng.standard_normal((group.k, group.k))
        stats = Stats.empty(group.k)
        stats.update(x.astype(np.float32))
        task, specs = task_of(recipe, planned, stats), [Spec(bits, 32, symmetric) for bits in (4, 5, 6, 8)]
        foretold = layer_losses(task, specs).group
        for spec, loss in zip(specs, foretold, strict=True):
            q = METHODS[method].solve(group.weight(), stats, spec, **recipe.options)
            assert loss == pytest.approx(output_error(q.effective() - group.weight(), stats.gram), rel=0.25), spec


def test_a_tied_head_of_three_bits_lends_its_table_what_they_mean(tmp_path, data):
    model = zoo.language_model(tmp_path / "m.onnx", tied=True, opset=18)
    settled = {f"^{name}$": Spec(3, 32) for name in ("logits", "tokens")}
    base = replace(TABLES, overrides=settled)
    result = tune(model, None, data, configs=[base], target_bpw=4.5, workdir=tmp_path / "w", output=tmp_path / "o.onnx")
    [head] = [layer for layer in result.layers if layer.name == "logits"]
    assert (head.spec, head.bits) == (Spec(3, 32), 3 + 1 + 0.125)
    assert result.best.metric < 2 * sum(layer.predicted for layer in result.layers)


def test_a_rotated_model_is_rotated_before_it_is_measured(lm, data, tmp_path):
    base = replace(BASE, rotation=True)
    result = tune(lm, None, data, configs=[base], target_bpw=4.0, workdir=tmp_path)
    assert result.met
    assert result.best.recipe.rotation
    assert result.best.metric < 2 * sum(layer.predicted for layer in result.layers)


def test_an_encoder_is_judged_by_its_noise(enc, enc_data, tmp_path):
    result = tune(enc, None, enc_data, configs=[BASE], target_bpw=4.0, workdir=tmp_path, points=3)
    assert result.met
    assert result.metric_name == "sqnr_db"
    measured = [point for point in result.frontier if point.measured is not None]
    for point in measured:
        [trial] = [trial for trial in result.trials if trial.name == point.name]
        assert point.measured == pytest.approx(10 ** (-trial.metric / 10), rel=1e-6)
    with pytest.raises(RecipeError, match="logits"):
        tune(enc, None, enc_data, configs=[BASE], max_kl=0.1, workdir=tmp_path)


def test_what_no_sample_reaches_keeps_the_spec_of_the_recipe(tmp_path):
    model = zoo.branches(tmp_path / "m.onnx")
    feeds = [{"x": zoo.correlated(i, 24, 48)[None], "flag": np.array(True)} for i in range(12)]
    result = tune(model, None, feeds, configs=[BASE], target_bpw=5.2, workdir=tmp_path / "work")
    specs = {layer.name: layer.spec for layer in result.layers}
    assert specs["no_out"] == BASE.spec, specs
    assert specs["yes_out"] != BASE.spec or specs["y"] != BASE.spec
    with pytest.raises(RecipeError, match="mixes of this model have"):  # what is left cannot make up for it
        tune(model, None, feeds, configs=[BASE], target_bpw=4.0, workdir=tmp_path / "work")


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_every_method_mixes(method, lm, data, tmp_path):
    result = tune(lm, None, data, configs=[Recipe(method)], target_bpw=4.0, workdir=tmp_path)
    assert result.met
    assert {trial.recipe.method for trial in result.trials} == {method}
    assert len({layer.spec for layer in result.layers}) > 1


def test_half_precision_models_mix(tmp_path):
    model = zoo.chain(tmp_path / "m.onnx", (96, 80, 64, 48), dtype=zoo.F16)
    feeds = [{"x": zoo.correlated(i, 24, 96).astype(np.float16)} for i in range(12)]
    result = tune(model, None, feeds, configs=[BASE], target_bpw=4.5, workdir=tmp_path / "work")
    assert result.met
    assert 8 * sum(layer.bytes for layer in result.layers) / (96 * 80 + 80 * 64 + 64 * 48) <= 4.5
    assert max(point.bpw for point in result.frontier) < 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_bpw": 1.0}, ["1 bits", "2.593", "32.000"]),
        ({"target_bpw": 33.0}, ["33 bits", "32.000"]),
        ({"target_size": 1000}, ["1,000 bytes", "MB"]),
        ({"target_size": 10**9}, ["1,000,000,000 bytes", "MB"]),
        ({"target_bpw": 4.0, "max_kl": 0.1}, ["target_bpw", "max_kl"]),
        ({"target_size": 10**5, "objective": "pareto"}, ["target_size", "pareto"]),
        ({"max_kl": 0.0}, ["max_kl", "above 0"]),
        ({"target_bpw": math.nan}, ["target_bpw", "above 0"]),
        ({"max_loss": 0.1}, ["max_loss", "eval_fn"]),
        ({"max_kl": 0.1, "eval_fn": float}, ["max_kl", "eval_fn"]),
    ],
    ids=str,
)
def test_impossible_targets_are_refused_before_any_work(options, words, lm, data, tmp_path, forwards):
    options = {"eval_fn": None, **options}
    with pytest.raises(RecipeError) as refused:
        tune(lm, dataloader=data, configs=[BASE], workdir=tmp_path, **options)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not forwards
    assert not list(tmp_path.rglob("*.onnx"))


def test_limits_on_trials_and_time_hold(lm, data, tmp_path):
    result = mix(lm, data, tmp_path, objective="pareto", points=5, max_trials=2)
    assert (len(result.trials), result.stopped) == (2, "max_trials")
    assert result.best is not None
    result = mix(lm, data, tmp_path / "late", objective="pareto", timeout=1e-6)
    assert (result.trials, result.best, result.stopped, result.met) == ((), None, "timeout", False)


def test_a_tied_embedding_follows_its_head(tied_lm, data, tmp_path):
    """One layer: whatever the head becomes, the table is stored once, and no float copy is left."""
    base = dataclasses.replace(BASE, embedding=Spec(4, 32))
    whole = sum(path.stat().st_size for path in tied_lm.parent.glob(f"{tied_lm.name}*"))
    result = tune(
        tied_lm, dataloader=data, configs=[base], target_size=int(0.22 * whole), workdir=tmp_path / "w",
        output=tmp_path / "q.onnx",
    )  # fmt: skip
    assert result.best, (result.trials, result.stopped)
    assert result.best.bytes <= 0.22 * whole
    head = next(layer for layer in result.layers if "logits" in layer.nodes)
    proto = onnx.load(tmp_path / "q.onnx")
    (gather,) = (node for node in proto.graph.node if node.op_type == "GatherBlockQuantized")
    (product,) = (node for node in proto.graph.node if node.op_type == "MatMulNBits" and node.output[0] == "logits")
    bits = {attribute.name: attribute.i for attribute in product.attribute}["bits"]
    assert bits == head.spec.bits in (2, 4, 8)
    assert {attribute.name: attribute.i for attribute in gather.attribute}["bits"] == bits
    assert all(
        t.data_type != onnx.TensorProto.FLOAT or np.prod(t.dims) < head.k * head.n for t in proto.graph.initializer
    )
