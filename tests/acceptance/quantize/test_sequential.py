"""What a tap is solved on: the activations of the float model, or of the model quantized up to its block, or to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.errors import RecipeError
from onnx_woq.graph.find.blocks import blocks_of
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from tests.support import hooks, measure
from tests.zoo import architectures as arch

LAYERS = 3
MODELS = {
    "decoder": (partial(arch.decoder, opset=18), "decoder"),  # its codes are dense in the file, the others' are not
    "fused": (arch.fused_decoder, "fused"),
    "bert": (arch.bert, "bert"),
}
UNITS = ("off", "block", "tap")


def recipe(unit: str, **changes: Any) -> Recipe:
    """Three bits, so that it matters what came before; computed in float, so that numpy can tell what that is."""
    how = {} if unit == "off" else {"true_sequential": True, "sequential_unit": unit}
    return Recipe("gptq", Spec(3, 32), accuracy_level=0, **how, **changes)


def feeds(kind: str) -> list[arch.Feed]:
    shapes = [(2, 12, 3), (1, 17, 0), (3, 9, 4)]
    return [
        arch.ids_feed(b, t, layers=LAYERS, padded=p, left=kind == "decoder", kind=kind, seed=i)
        for i in range(6)
        for b, t, p in [shapes[i % 3]]
    ]


class Spy:
    """Keeps the Gram matrix that each solve was given, by the output name of its first MatMul."""

    def __init__(self, model: Path) -> None:
        self.names = {w[:, 0].astype(np.float32).tobytes(): out for out, w in measure.float_weights(model).items()}
        self.grams: dict[str, np.ndarray] = {}

    def __call__(self, real: hooks.Solve) -> hooks.Solve:
        def solve(weight: np.ndarray, stats: Any, *args: Any, **kwargs: Any) -> Any:
            name = self.names[np.ascontiguousarray(weight[:, 0], np.float32).tobytes()]
            assert name not in self.grams, f"{name} was solved twice"
            self.grams[name] = np.array(stats.gram, np.float64)
            return real(weight, stats, *args, **kwargs)

        return solve


def naive_gram(model: Path, out: str, replaced: dict[str, np.ndarray], data: Sequence[arch.Feed]) -> np.ndarray:
    """XᵀX in float64 of what the MatMul `out` reads in the whole model with the weights `replaced`, without padding."""
    proto = onnx.load(model)
    nodes = {node.output[0]: node for node in proto.graph.node if node.op_type == "MatMul"}
    places = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, w in replaced.items():
        tensor = places[nodes[name].input[1]]
        tensor.CopyFrom(numpy_helper.from_array(w.astype(np.float32), tensor.name))
    value = nodes[out].input[0]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    session = measure.session(proto.SerializeToString())
    gram: Any = 0.0
    for feed in data:
        (x,) = session.run([value], feed)
        x = x[feed["attention_mask"] != 0].astype(np.float64)
        gram = gram + x.T @ x
    return gram


def earlier(model: Path, unit: str) -> dict[str, list[str]]:
    """The MatMuls that are quantized already when a tap, named by its first one, is calibrated."""
    source = load(model)
    groups, _ = find_linear_groups(source, recipe(unit))
    members_of = {"off": [groups], "block": blocks_of(source, groups), "tap": [[group] for group in groups]}[unit]
    known: list[str] = []
    found = {}
    for members in members_of:
        found |= {group.name: list(known) for group in members}
        known += [linear.name for group in members for linear in group.linears]
    assert len(known) == len(set(known)) == len(measure.float_weights(model))
    return found


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequential")
    return lambda kind: (
        p if (p := folder / f"{kind}.onnx").exists() else MODELS[kind][0](p, layers=LAYERS)
    )  # the same file for all


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_gram_matrix_is_that_of_the_partly_quantized_model(kind, unit, model_of, tmp_path):
    model, data = model_of(kind), feeds(kind)
    spy = Spy(model)
    with hooks.solver("gptq", spy):
        quantize(model, tmp_path / "q.onnx", recipe(unit), data)
    final, before = measure.decoded(tmp_path / "q.onnx"), earlier(model, unit)
    assert spy.grams.keys() == before.keys()
    assert len(before) >= 4 * LAYERS
    moved = 0.0
    for name, gram in spy.grams.items():
        wanted = naive_gram(model, name, {n: final[n] for n in before[name]}, data)
        assert np.abs(gram - wanted).max() <= 1e-4 * np.abs(wanted).max(), name
        if unit != "off":
            plain = naive_gram(model, name, {}, data)
            moved = max(moved, np.abs(plain - wanted).max() / np.abs(wanted).max())
    assert unit == "off" or moved > 0.01  # or a wrong matrix would have passed


def test_the_three_ways_differ_where_they_must_and_nowhere_else(model_of, tmp_path):
    model, data = model_of("decoder"), feeds("decoder")
    decoded = {}
    for unit in UNITS:
        quantize(model, tmp_path / f"{unit}.onnx", recipe(unit), data)
        decoded[unit] = measure.decoded(tmp_path / f"{unit}.onnx")
    source = load(model)
    first, *rest = blocks_of(source, find_linear_groups(source, recipe("off"))[0])
    head, *others = (linear.name for group in first for linear in group.linears if "layer0" in linear.name)
    same = lambda a, b, name: np.array_equal(decoded[a][name], decoded[b][name])  # noqa: E731
    close = lambda a, b, name: measure.agreement(decoded[a][name], decoded[b][name]) > 0.98  # noqa: E731
    for name in (head, *others):
        assert same("off", "block", name), name  # nothing before the first block is quantized
    assert same("block", "tap", head)
    assert not all(close("block", "tap", name) for name in others)
    later = [linear.name for members in rest for group in members for linear in group.linears]
    assert later
    for a, b in (("off", "block"), ("off", "tap"), ("block", "tap")):
        assert not any(close(a, b, name) for name in later if name.endswith(("down", "gate"))), (a, b)


def test_by_block_is_the_default_nowhere_and_the_recipe_says_which(model_of, tmp_path):
    assert Recipe().sequential_unit == "tap"
    assert Recipe.from_dict(recipe("block").to_dict()) == recipe("block")
    assert recipe("block").fingerprint() != recipe("tap").fingerprint()
    quantize(model_of("decoder"), tmp_path / "q.onnx", recipe("block"), feeds("decoder"))
    assert measure.recipe_of(tmp_path / "q.onnx")["sequential_unit"] == "block"


@pytest.mark.parametrize("unit", ["Block", "layer", "", None, 3])
def test_another_unit_is_refused(unit):
    with pytest.raises(RecipeError, match="sequential_unit") as raised:
        Recipe("gptq", true_sequential=True, sequential_unit=unit)
    assert "block" in str(raised.value)  # the nearest, or all there are


def test_on_the_command_line(tmp_path, cli):
    model = arch.bert(tmp_path / "m.onnx", layers=2)
    folder = tmp_path / "data"
    folder.mkdir()
    data = feeds("bert")
    for i, feed in enumerate(data):
        np.savez(folder / f"{i}.npz", **feed)
    flags = ["--algorithm", "gptq", "--bits", "3", "--accuracy-level", "0", "--option", "true_sequential=true"]
    cli.ok("quantize", model, "-o", tmp_path / "a.onnx", *flags, "--option", "sequential_unit=block", "--calib", folder)
    quantize(model, tmp_path / "b.onnx", recipe("block"), data)
    quantize(model, tmp_path / "c.onnx", recipe("tap"), data)
    one, two, other = (measure.decoded(tmp_path / f"{name}.onnx") for name in "abc")
    assert min(measure.agreement(one[name], two[name]) for name in two) > 0.99  # a file's rows are samples of their own
    assert min(measure.agreement(one[name], other[name]) for name in other) < 0.95
