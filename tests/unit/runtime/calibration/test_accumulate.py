"""One window over all samples: the sums that numpy makes of the same activations, and errors that say where."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats
from onnx_woq.errors import DataError, ModelError
from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration import accumulate
from onnx_woq.runtime.calibration.accumulate import collect_window
from onnx_woq.runtime.calibration.replay import Replay
from tests.zoo.chains import WEIGHTS, K, chain, chain_inputs
from tests.zoo.nodes import graph, node, random, value, write

RAGGED = [{"x": random(1, t, K, seed=t)} for t in (5, 9, 1)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


def collected(pool, model, feeds, recipe=None, groups=slice(None), **options):
    found, _ = find_linear_groups(model, recipe or Recipe())
    steps = []
    replay = Replay(feeds, 1 << 30, pool, 2)
    stats = collect_window(replay, model, found[groups], set(), lambda: steps.append(1), **options)
    assert len(steps) == len(feeds), "a step for every sample"
    return found[groups], stats


def tokens(weight, feeds=RAGGED, weights=WEIGHTS):
    parts = [chain_inputs(feed["x"], weights)[weight] for feed in feeds]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def test_every_group_gets_the_sums_of_its_own_activation(pool, tmp_path):
    groups, stats = collected(pool, load(chain(tmp_path / "m.onnx")), RAGGED)
    assert list(stats) == groups
    for group in groups:
        x = tokens(group.linears[0].weight_name)
        np.testing.assert_allclose(stats[group].gram, x.T @ x, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(stats[group].mean, x.mean(0), rtol=1e-3, atol=1e-4)
        assert stats[group].tokens == 15


def test_groups_that_read_the_same_share_one_object(pool, tmp_path):
    nodes = [node("MatMul", ["x", name], [f"y{name}"], name=name) for name in "AB"]
    main = graph(nodes, [value("x", ("b", "t", K))], [value("yA"), value("yB")], {n: random(K, K) for n in "AB"})
    model = load(write(tmp_path / "m.onnx", main))
    groups, stats = collected(pool, model, RAGGED, Recipe(overrides={"B": Spec(8)}))
    assert len(groups) == 2
    assert stats[groups[0]] is stats[groups[1]]


@pytest.mark.parametrize("shape", [(2, 3, K), (6, K)], ids=["b t k", "flattened"])
def test_padding_is_left_out(shape, pool, tmp_path):
    nodes = [node("MatMul", ["x", "A"], ["y"]), node("Cast", ["attention_mask"], ["m"], to=1)]
    inputs = [value("x", shape), value("attention_mask", (2, 3), 7)]
    model = load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y"), value("m")], {"A": random(K, K)})))
    mask, x = np.array([[0, 1, 1], [1, 0, 0]]), random(*shape)
    _, stats = collected(pool, model, [{"x": x, "attention_mask": mask}])
    (found,) = stats.values()
    counted = x.reshape(6, K)[mask.reshape(-1) != 0]
    np.testing.assert_allclose(found.gram, counted.T @ counted, rtol=1e-5, atol=1e-5)
    assert found.tokens == 3


def test_the_float_model_in_step_gives_cross_products(pool, tmp_path):
    exact = load(chain(tmp_path / "m.onnx"))
    other = load(chain(tmp_path / "n.onnx"))
    weight = other.ir.graph.initializers["A"]
    changed = WEIGHTS | {"A": WEIGHTS["A"] * np.float32(0.7)}
    weight.replace_all_uses_with(add_initializer(other.ir.graph, "A~", changed["A"]))
    groups, stats = collected(
        pool, other, RAGGED, groups=slice(1, 4), float_replay=(Replay(RAGGED, 1 << 30, pool, 2), exact)
    )
    for group in groups:
        name = group.linears[0].weight_name
        quantized, floats = tokens(name, weights=changed), tokens(name)
        np.testing.assert_allclose(stats[group].cross, quantized.T @ floats, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(stats[group].float_mean, floats.mean(0), rtol=1e-3, atol=1e-4)


def test_what_is_not_finite_is_named_by_value_and_sample(pool, tmp_path):
    bad = [RAGGED[0], {"x": np.full((1, 2, K), np.inf, np.float32)}]
    with pytest.raises(DataError, match=r"value 'n1', sample 2\): leave out that sample"):
        collected(pool, load(chain(tmp_path / "m.onnx")), bad, groups=slice(0, 1))


def test_a_weight_that_is_to_blame_is_named_instead(pool, tmp_path):
    weights = {"A": np.full((K, K), np.nan, np.float32), "B": random(K, K)}
    nodes = [node("MatMul", ["x", "A"], ["h"], name="first"), node("MatMul", ["h", "B"], ["y"])]
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("b", "t", K))], [value("y")], weights)))
    with pytest.raises(ModelError, match="weight 'A' of 'first' has NaN"):
        collected(pool, model, RAGGED)


def test_a_model_that_another_sample_cannot_be_run_on(pool, tmp_path):
    with pytest.raises(DataError, match="sample 2"):
        collected(pool, load(chain(tmp_path / "m.onnx")), [RAGGED[0], {"x": random(1, 2, K + 1)}])


def test_what_no_sample_reaches_is_said(pool, tmp_path, caplog):
    empty = [{"x": np.zeros((1, 0, K), np.float32)}]
    groups, stats = collected(pool, load(chain(tmp_path / "m.onnx")), empty, groups=slice(0, 1))
    assert stats[groups[0]].tokens == 0
    assert "no sample reaches n1: there is nothing to calibrate it on" in caplog.text


def test_activations_without_the_channels_of_their_weight_are_the_datas_fault():
    """A graph that is cut before its product does not notice."""
    stats = Stats(np.zeros((8, 8)), np.zeros(8), np.zeros(8), 0)
    with pytest.raises(DataError, match=r"'x' has the shape \(2, 16\) \(sample 3\), and its weight has 8 input"):
        accumulate._add_sample(stats, {"x": np.ones((2, 16), np.float32)}, (("x", ""),), None, 2, {})
