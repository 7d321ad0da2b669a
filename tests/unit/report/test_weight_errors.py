"""Histograms of the worst weights: every number counted, and the error is that of what the written node does."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.report.summary import layers_of, summary
from onnx_woq.report.weight_errors import WORST, histograms, weight_errors
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo


def effective(path: Path) -> dict[str, np.ndarray]:
    """What each product of a file multiplies by, [K, N] by its name: codes, and factors where an Add brings them in."""
    model, decoded = onnx.load(path), measure.decoded(path)
    by_output = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "Add" and set(node.input) <= set(decoded):
            plain, up = sorted(node.input, key=lambda name: "_up" in name)
            decoded[node.output[0]] = decoded[plain] + decoded[by_output[up].input[0]] @ decoded[up]
    return decoded


def wild(samples: int) -> list[dict[str, np.ndarray]]:
    """Inputs that AWQ scales: channels of very different size."""
    draws = (np.random.default_rng(i).normal(size=(1, 40, 96)) for i in range(samples))
    return [{"x": np.exp(draw * 2).astype(np.float32)} for draw in draws]


def gated(path: Path) -> Path:
    """x -> up -> down, in between a Mul: AWQ can put down's input scale into the output channels of up."""
    net = zoo.Net()
    gate = net.op("Sigmoid", net.matmul("x", zoo.weight(1, 96, 64), "gate"), out="on")
    up = net.matmul("x", (zoo.weight(2, 96, 64) * np.geomspace(0.1, 10, 64)).astype(np.float32), "up")
    net.matmul(net.op("Mul", gate, up, out="product"), zoo.weight(3, 64, 48), "down")
    shape = ["batch", "seq"]
    return net.save(path, {"x": (zoo.F32, [*shape, 96])}, {"down": (zoo.F32, [*shape, 48])})


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("histograms") / "m.onnx", layers=2)


@pytest.fixture(scope="module")
def data() -> list[dict[str, np.ndarray]]:
    return [arch.ids_feed(1, 24, layers=2, seed=i) for i in range(6)]


@pytest.mark.parametrize("options", [{}, {"lowrank": 16}, {"bias_correction": True}], ids=str)
def test_every_number_of_a_tap_is_counted_and_the_error_is_that_of_the_file(decoder, data, tmp_path, options):
    recipe = Recipe("gptq", Spec(4, 32), accuracy_level=0, **options)
    report = quantize(decoder, tmp_path / "q.onnx", recipe, data)
    before, after = measure.float_weights(decoder), effective(report.output)
    entries = histograms(decoder, report.output, layers_of(report.output))
    assert [e["name"] for e in entries] == [t.name for t in sorted(report.groups, key=lambda t: -t.error)][:WORST]
    for entry in entries:
        weight = np.concatenate([before[linear].ravel() for linear in entry["sites"]])
        error = np.concatenate([(after[linear] - before[linear]).ravel() for linear in entry["sites"]])
        for part, numbers in ((entry["weight"], weight), (entry["rounding"], error)):
            assert sum(part["counts"]) + part["outside"] == numbers.size
            inside = (numbers >= part["edges"][0]) & (numbers <= part["edges"][-1])
            assert abs(part["outside"] - np.sum(~inside)) <= 0.002 * numbers.size
            assert part["outside"] <= 0.02 * numbers.size
            assert part["rms"] == pytest.approx(np.sqrt(np.square(numbers).mean()), rel=1e-3)
            assert part["largest"] == pytest.approx(np.abs(numbers).max(), rel=1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_of_a_rotated_model_the_rotated_weights_are_meant(decoder, data, tmp_path, method):
    report = quantize(decoder, tmp_path / "q.onnx", Recipe(method, Spec(4, 32), rotation=True), data)
    for entry in summary(report)["worst"]:
        assert 0 < entry["rounding"]["rms"] < 0.3 * entry["weight"]["rms"], entry["name"]


def test_where_a_scale_went_into_a_weight_its_rounding_error_is_left_out(tmp_path):
    path = gated(tmp_path / "g.onnx")
    report = quantize(path, tmp_path / "q.onnx", Recipe("awq", Spec(4, 32), accuracy_level=0), wild(4))
    assert {group.name: group.scaling for group in report.groups}["down"] == "linear"
    before, after = measure.float_weights(path)["up"], measure.decoded(report.output)["up"]
    factors = (before * after).sum(0) / np.square(before).sum(0)
    assert factors.max() > 1.5 * factors.min(), "columns of up are scaled, so its difference is no rounding error"
    entries = {entry["name"]: entry["rounding"] for entry in summary(report)["worst"]}
    assert entries == {"gate": None, "down": None}


def test_a_scale_in_a_node_of_its_own_counts(tmp_path):
    path = zoo.siblings(tmp_path / "s.onnx", {"a": zoo.weight(1, 96, 32)})  # a graph input: nothing to fold into
    report = quantize(path, tmp_path / "q.onnx", Recipe("awq", Spec(4, 32), accuracy_level=0), wild(4))
    assert report.groups[0].scaling == "mul"
    (entry,) = summary(report)["worst"]
    values = measure.tensors(onnx.load(report.output))
    (factor,) = [node for node in onnx.load(report.output).graph.node if node.op_type == "Mul"]
    inverse = next(values[name] for name in factor.input if name in values)
    acting = inverse.reshape(-1, 1) * measure.decoded(report.output)["a"]
    assert entry["rounding"]["rms"] == pytest.approx(np.square(acting - zoo.weight(1, 96, 32)).mean() ** 0.5, rel=1e-3)


def test_without_data_weights_rank_by_their_own_error(decoder, tmp_path):
    recipe = Recipe("rtn", Spec(4, 32), accuracy_level=0, overrides={"layer1.o": Spec(2, 32)})
    report = quantize(decoder, tmp_path / "q.onnx", recipe)
    before, after = measure.float_weights(decoder), measure.decoded(report.output)
    found = weight_errors(decoder, report.output, layers_of(report.output))
    for group in report.groups:
        error = sum(np.square(after[linear] - before[linear]).sum() for linear in group.nodes)
        energy = sum(np.square(before[linear]).sum() for linear in group.nodes)
        assert found[group.name] == pytest.approx(error / energy, rel=1e-3), "small weights are looked at whole"
    assert summary(report)["worst"][0]["name"] == "layer1.o"


def test_histograms_of_a_wide_weight_take_less_memory_than_the_weight(tmp_path):
    k, n = 512, 16384
    net = zoo.Net()
    net.matmul("x", zoo.weight(1, k, n), "wide")
    shapes = {"x": (zoo.F32, ["batch", "seq", k])}, {"wide": (zoo.F32, ["batch", "seq", n])}
    path = net.save(tmp_path / "w.onnx", *shapes, external="w.data")
    report = quantize(path, tmp_path / "q.onnx", Recipe("rtn", Spec(4, 32)))
    layers = layers_of(report.output)
    tracemalloc.start()
    (entry,) = histograms(path, report.output, layers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(entry["rounding"]["counts"]) + entry["rounding"]["outside"] == k * n
    assert peak < 2 * k * n, f"{peak:,} bytes for a weight of {4 * k * n:,}"
