"""Values that are no tensors may appear anywhere: between layers, beside them, in bodies."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.collect import collect_statistics
from tests.support import measure
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, value, write

LAYERS, WIDTH = 6, 48
EIGHT = {"spec": Spec(8, 16), "accuracy_level": 0}
X = [{"x": zoo.correlated(seed, 20, WIDTH)} for seed in range(3)]


def layers(path, between):
    """Layers of two products each, behind every other one what `between` puts there."""
    nodes, weights, h = [], {"zero": np.array(0), "one": np.array(1), "axis": np.array([0])}, "x"
    for i in range(LAYERS):
        weights |= {f"W{i}": zoo.weight(2 * i, WIDTH, WIDTH), f"V{i}": zoo.weight(2 * i + 1, WIDTH, WIDTH)}
        nodes += [node("MatMul", [h, f"W{i}"], [f"a{i}"]), node("Tanh", [f"a{i}"], [f"b{i}"])]
        nodes += [node("MatMul", [f"b{i}", f"V{i}"], [f"c{i}"]), node("Add", [h, f"c{i}"], [f"h{i}"])]
        h = f"h{i}"
        if i % 2:
            made, h = between(h, i)
            nodes += made
    return write(path, graph(nodes, [value("x", ("b", WIDTH))], [value(h, ("b", WIDTH))], weights), opset=17)


def stream(h, i):
    """The residual stream itself is a sequence for a moment."""
    return [node("SequenceConstruct", [h], [f"s{i}"]), node("SequenceAt", [f"s{i}", "zero"], [f"t{i}"])], f"t{i}"


def halves(h, i):
    nodes = [node("SplitToSequence", [h, "half"], [f"s{i}"], axis=1)]
    nodes.append(node("ConcatFromSequence", [f"s{i}"], [f"t{i}"], axis=1))
    return [node("Constant", [], ["half"], value_int=24), *nodes] if i == 1 else nodes, f"t{i}"


def beside(h, i):
    """A sequence of the input alone, which every layer reads."""
    made = [node("SequenceAt", ["kept", "zero"], [f"k{i}"]), node("Add", [h, f"k{i}"], [f"t{i}"])]
    return [*([node("SequenceConstruct", ["x", "x"], ["kept"])] if i == 1 else []), *made], f"t{i}"


def optional(h, i):
    return [node("Optional", [h], [f"o{i}"]), node("OptionalGetElement", [f"o{i}"], [f"t{i}"])], f"t{i}"


def alive(h, i):
    """A sequence that grows from layer to layer beside the stream, and is read at the end."""
    old = [node("SequenceEmpty", [], ["s0"])] if i == 1 else []
    grown = node("SequenceInsert", ["s0" if i == 1 else f"s{i - 2}", h], [f"s{i}"])
    if i < LAYERS - 1:
        return [*old, grown], h
    return [*old, grown, node("SequenceAt", [f"s{i}", "one"], ["mid"]), node("Add", [h, "mid"], ["last"])], "last"


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "sequential", "asymmetric"])
@pytest.mark.parametrize("between", [stream, halves, beside, optional, alive])
def test_a_model_with_values_that_are_no_tensors(between, recipe, tmp_path):
    more = {"sequential": {"true_sequential": True}, "asymmetric": {"asymmetric_calibration": True}}.get(recipe, {})
    model, out = layers(tmp_path / "m.onnx", between), tmp_path / "q.onnx"
    report = quantize(model, out, Recipe("rtn" if recipe == "rtn" else "gptq", **EIGHT, **more), X)
    assert sum(len(row.nodes) for row in report.groups) == 2 * LAYERS
    (before,), (after,) = (measure.run(path, X).values() for path in (model, out))
    assert measure.sqnr(before, after) > 30


@pytest.mark.parametrize("between", [stream, halves, beside, optional, alive])
def test_in_parts_the_statistics_are_the_same(between, tmp_path):
    """Within next to no memory each window starts from what is kept of the one before, and that are tensors alone."""
    model = load(layers(tmp_path / "m.onnx", between))
    groups = make_plan(model, Recipe("gptq", **EIGHT)).linear_groups
    found = [dict(collect_statistics(model, groups, X, memory_budget=budget)) for budget in (1, 1 << 30)]
    assert [group.name for group in found[0]] == [group.name for group in found[1]]
    for group, stats in found[0].items():
        np.testing.assert_array_equal(stats.gram, found[1][group].gram)
    for block in (block for cut in cuts(model) for block in cut.blocks):
        assert not {"s1", "s3", "s5", "o1", "o3", "o5", "kept"} & set(block.outputs)
