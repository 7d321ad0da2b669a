"""What is quantized and what is not, and that the report says so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.support import measure
from tests.zoo import small as zoo

METHODS = ("rtn", "gptq", "awq")
ALL = {f"layer{i}.{n}" for i in (0, 1) for n in ("q", "k", "v", "o", "gate", "up", "down")} | {"logits"}


def float_bytes(path: Path) -> dict[str, bytes]:
    """Raw bytes of the float weights by the output name of the MatMul that reads them."""
    return {name: w.tobytes() for name, w in measure.float_weights(path).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("expression", "left_float"),
    [
        (("^node/layer0.up$",), {"layer0.up"}),  # node name
        (("^layer1.down$",), {"layer1.down"}),  # output value name
        (("^W_layer0.v$",), {"layer0.v"}),  # weight name
        (("^head$",), {"logits"}),
        (("up$", "0.o$"), {"layer0.up", "layer1.up", "layer0.o"}),  # repeatable
        (("ayer0",), {name for name in ALL if name.startswith("layer0")}),  # searched, not matched
    ],
    ids=measure.stable_id,
)
def test_excluded_weights_stay_untouched(method, expression, left_float, lm, lm_data, tmp_path):
    quantize(lm, tmp_path / "q.onnx", Recipe(method, exclude=expression), lm_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == ALL - left_float
    before, after = float_bytes(lm), float_bytes(tmp_path / "q.onnx")
    assert after == {name: before[name] for name in left_float}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("expressions", "chosen"),
    [
        (("^node/layer0.up$",), {"layer0.up"}),
        (("^layer1.q$", "W_layer0.down"), {"layer1.q", "layer0.down"}),
        (("head",), {"logits"}),
    ],
    ids=measure.stable_id,
)
def test_include_selects_only_what_it_names(method, expressions, chosen, lm, lm_data, tmp_path):
    quantize(lm, tmp_path / "q.onnx", Recipe(method, include=expressions), lm_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == chosen
    before, after = float_bytes(lm), float_bytes(tmp_path / "q.onnx")
    assert after == {name: w for name, w in before.items() if name not in chosen}


def test_exclude_wins_over_include(lm, tmp_path):
    quantize(lm, tmp_path / "q.onnx", Recipe(include=("layer0",), exclude=("layer0.q",)))
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {n for n in ALL if n.startswith("layer0")} - {"layer0.q"}


@pytest.mark.parametrize("method", METHODS)
def test_selection_reaches_into_bodies(method, tmp_path):
    model = zoo.branches(tmp_path / "m.onnx")
    data = [{"x": zoo.correlated(i, 8, 48)[None], "flag": np.array(i % 2 == 0)} for i in range(4)]
    quantize(model, tmp_path / "q.onnx", Recipe(method, exclude=("^no_out$",)), data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {"yes_out", "y"}
    values = measure.tensors(onnx.load(tmp_path / "q.onnx"))
    assert any(np.array_equal(value, zoo.weight(2, 48, 48)) for value in values.values())


@pytest.mark.parametrize("method", METHODS)
def test_excluding_one_reader_of_a_shared_weight_keeps_its_float_bytes(method, tmp_path):
    model = zoo.constants(tmp_path / "m.onnx")
    data = [{"x": zoo.correlated(i, 8, 48)[None]} for i in range(4)]
    report = quantize(model, tmp_path / "q.onnx", Recipe(method, exclude=("^shared_1$",)), data)
    found = measure.low_bit(tmp_path / "q.onnx")
    assert "shared_1" not in found
    assert "shared_2" in found
    assert sum(report.copies.values()) == 48 * 40 * 4
    exact = [measure.run(m, data)["shared_1"] for m in (model, tmp_path / "q.onnx")]
    np.testing.assert_array_equal(*exact)


def test_shared_weights_are_stored_once(tmp_path):
    model = zoo.constants(tmp_path / "m.onnx")
    quantize(model, tmp_path / "q.onnx", Recipe("rtn"))
    found = measure.low_bit(tmp_path / "q.onnx")
    assert list(found["shared_1"].input[1:]) == list(found["shared_2"].input[1:])


def test_only_the_last_matmul_is_left_by_the_disable_preset(lm, lm_data, tmp_path):
    quantize(lm, tmp_path / "q.onnx", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", lm_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == ALL - {"logits"}
    quantize(lm, tmp_path / "q.onnx", "GPTQ_G32ASYM", lm_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == ALL


def test_the_last_matmul_of_a_tied_head_is_found(tied_lm, lm_data, tmp_path):
    quantize(tied_lm, tmp_path / "q.onnx", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", lm_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == ALL - {"logits"}


def test_the_last_matmul_is_seen_through_a_bias_and_a_cast(tmp_path):
    """The head need not be the very node that makes the output."""
    net = zoo.Net()
    h = net.op("Relu", net.matmul("x", zoo.weight(1, 48, 40), "h"), out="r")
    y = net.op("Add", net.matmul(h, zoo.weight(2, 40, 24), "head"), net.const("b", zoo.weight(3, 1, 24)), out="biased")
    net.op("Cast", y, out="y", to=zoo.F32)
    model = net.save(tmp_path / "m.onnx", {"x": (zoo.F32, ["b", 48])}, {"y": (zoo.F32, ["b", 24])})
    quantize(model, tmp_path / "q.onnx", Recipe(lm_head=False))
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {"h"}


@pytest.mark.parametrize("method", METHODS)
def test_overrides_give_single_weights_their_own_grid(method, lm, lm_data, tmp_path):
    overrides = {"down": Spec(8, 64, True), "layer0.q": None, "logits": Spec(2, 32)}
    quantize(lm, tmp_path / "q.onnx", Recipe(method, overrides=overrides), lm_data)
    found = {name: measure.attributes(node) for name, node in measure.low_bit(tmp_path / "q.onnx").items()}
    assert set(found) == ALL - {"layer0.q"}
    assert {name for name, a in found.items() if a["bits"] == 8} == {"layer0.down", "layer1.down"}
    assert {name for name, a in found.items() if a["bits"] == 2} == {"logits"}
    assert found["layer1.down"]["block_size"] == 64


def test_siblings_split_by_an_exclusion_still_compute_the_same_function(lm, lm_data, tmp_path):
    """AWQ scales the shared input of q/k/v: the float sibling must not see the scaled one."""
    for folding in (False, True):
        recipe = Recipe(
            "awq", Spec(8, 32), exclude=("layer..k$", "gate"), options={"folding": folding}, accuracy_level=0
        )
        quantize(lm, tmp_path / "q.onnx", recipe, lm_data)
        assert measure.sqnr(*(measure.run(m, lm_data)["logits"] for m in (lm, tmp_path / "q.onnx"))) > 35


def test_everything_left_float_is_listed_with_its_reason(tmp_path, cli):
    model = zoo.leftovers(tmp_path / "m.onnx")
    found = cli.json("inspect", model)
    assert list(itertools.chain.from_iterable(group["sites"] for group in found["taps"])) == ["good", "turned"]
    skipped = {entry["name"]: entry["reason"] for entry in found["skipped"]}
    assert {"batched", "no_constant"} <= set(skipped)
    assert all(skipped.values())


def test_inspect_accounts_for_every_site_under_a_selection(lm, cli):
    found = cli.json(
        "inspect", lm, "--exclude", "layer0", "--exclude", "^head$", "--include", "q$", "--include", "logits|up"
    )
    quantized = {linear for group in found["taps"] for linear in group["sites"]}
    reasons = {entry["name"]: entry["reason"] for entry in found["skipped"]}
    assert quantized == {"layer1.q", "layer1.up"}
    assert ALL - quantized <= set(reasons)
    assert all(reasons[name] for name in ALL - quantized)
    assert reasons["logits"] != reasons["layer1.v"]


def test_inspect_foretells_what_quantize_does(lm, tied_lm, cli, tmp_path):
    for model in (lm, tied_lm):
        for flags in ([], ["--bits", 8, "--group-size", 64, "--scheme", "sym"], ["--bits", 3, "--group-size", -1]):
            foreseen = cli.json("inspect", model, *flags)
            real = cli.json("quantize", model, "-o", tmp_path / "q.onnx", *flags)
            linears = [{linear for group in report["taps"] for linear in group["sites"]} for report in (foreseen, real)]
            assert linears[0] == linears[1]
            assert foreseen["copies"] == real["copies"]
            assert foreseen["bytes_before"] == real["bytes_before"] == model.stat().st_size
            assert foreseen["bytes_after"] == pytest.approx(real["bytes_after"], rel=0.05)


def test_inspect_writes_nothing(lm, cli, tmp_path):
    before = measure.listing(lm.parent)
    cli.ok("inspect", lm)
    assert measure.listing(lm.parent) == before


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        (["--bits", "3"], Spec(3, 32)),
        (["--group-size", "64"], Spec(4, 64)),
        (["--group-size", "-1"], Spec(4, -1)),
        (["--scheme", "sym"], Spec(4, 32, True)),
        (["--bits", "8", "--group-size", "16", "--scheme", "sym"], Spec(8, 16, True)),
    ],
    ids=measure.stable_id,
)
def test_flags_beside_a_config_override_that_part_only(flags, spec, enc, cli, tmp_path):
    for config in (["--config", "RTN_G32ASYM"], []):
        cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", *config, *flags)
        written = Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx"))
        assert (written.method, written.spec) == ("rtn", spec)
        if spec.bits in (4, 8) and spec.group_size in (16, 32, 64):
            a = measure.attributes(measure.low_bit(tmp_path / "q.onnx")["y"])
            assert (a["bits"], a["block_size"]) == (spec.bits, spec.group_size)


def test_flags_keep_what_else_the_preset_says(lm, ids, cli, tmp_path):
    config = ["--config", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", "--calib", ids]
    cli.ok("quantize", lm, "-o", tmp_path / "q.onnx", *config, "--bits", 8)
    written = Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx"))
    assert (written.method, written.spec, written.lm_head) == ("gptq", Spec(8, 32), False)
    cli.ok("quantize", lm, "-o", tmp_path / "q.onnx", *config, "--algorithm", "AWQ", "--exclude", "layer1")
    written = Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx"))
    assert (written.method, written.lm_head) == ("awq", False)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {name for name in ALL if name.startswith("layer0")}


def test_an_expression_that_finds_nothing_is_not_silent(lm, cli, tmp_path):
    """--include of nothing leaves nothing to quantize: an error that says so, not a copy of the input."""
    result = cli("quantize", lm, "-o", tmp_path / "q.onnx", "--include", "no_such_layer")
    assert result.exit_code == 2
    assert "include" in result.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_python_inspect_equals_the_command(lm, cli):
    found = cli.json("inspect", lm, "--group-size", 128, "--algorithm", "GPTQ")
    assert json.loads(json.dumps(inspect(lm, "GPTQ_G128ASYM").to_dict()))["taps"] == found["taps"]


def test_a_weight_too_thin_for_the_kernels_is_listed(tmp_path):
    model = zoo.chain(tmp_path / "m.onnx", (64, 15, 24, 1))
    quantize(model, tmp_path / "q.onnx", Recipe(accuracy_level=0))
    found, reasons = measure.low_bit(tmp_path / "q.onnx"), {s.name: s.reason for s in inspect(model).skipped}
    assert set(found) | set(reasons) == {"h0", "h1", "h2"}
    assert {"h0", "h2"} <= set(found)
    assert all(reasons.values())
