"""What a layer loses by each of its choices: the error of its outputs, and of rows that are looked up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_woq.core.methods import gptq, rtn
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import Stats, output_error
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.solve import task_of
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.errors import ModelError
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed import sensitivity as module
from onnx_woq.tuning.mixed.layers import mixed_layers
from onnx_woq.tuning.mixed.sensitivity import NOISE, Losses, layer_losses, measured, shortened, statistics_recipe
from onnx_woq.tuning.trials import Run
from tests.unit.tuning.mixed.conftest import BASE
from tests.zoo import small as zoo

SPECS = (Spec(2, 32), Spec(3, 64), Spec(4, 32), Spec(6, 32), Spec(8, 32))


@pytest.fixture
def group(tied):
    return make_plan(tied, BASE).groups[0]


@pytest.fixture
def stats(group):
    found = Stats.empty(group.k)
    found.update(np.random.default_rng(0).standard_normal((200, group.k)).astype(np.float32))
    return found


def squares(q, weight):
    return float(np.square(q.dequantize() - weight).sum())


def test_losses_are_those_of_the_solved_weight(group, stats):
    found = layer_losses(task_of(BASE, group, stats), SPECS)
    weight = group.source.weight()
    for loss, spec in zip(found.group[:3], SPECS[:3], strict=True):
        q = gptq.solve(weight, stats, spec)
        assert loss == pytest.approx(output_error(q.effective() - weight, stats.gram), rel=1e-4)
    noise = rtn.solve(weight, None, NOISE)
    assert found.group_noise == pytest.approx(output_error(noise.dequantize() - weight, stats.gram), rel=1e-4)
    assert (found.table, found.table_noise) == ((), 0.0)


def test_each_bit_beyond_four_is_a_quarter_of_the_loss(group, stats):
    found = layer_losses(task_of(BASE, group, stats), SPECS).group
    assert found[3] == pytest.approx(found[2] / 16)
    assert found[4] == pytest.approx(found[2] / 256)


def test_a_table_is_looked_up_and_a_head_that_shares_its_codes_is_both(tied, group, stats):
    plan = make_plan(tied, BASE)
    (table,) = plan.embeddings
    alone = layer_losses(task_of(BASE, table, None), SPECS[:3])
    assert alone.group == ()
    weight = np.asarray(table.weight_sources()[0].read(), np.float32)
    assert alone.table_noise == pytest.approx(squares(rtn.solve(weight, None, NOISE), weight), rel=1e-4)
    both = layer_losses(task_of(BASE, group, stats), SPECS[:3], shares=True)
    assert len(both.group) == len(both.table) == 3
    solved = gptq.solve(group.source.weight(), stats, SPECS[0])
    assert both.table[0] == pytest.approx(squares(solved, group.source.weight()), rel=1e-4)


def test_of_wide_weights_a_sample_stands_for_all(group, stats, monkeypatch):
    task = task_of(BASE, group, stats)
    whole = layer_losses(task, SPECS[:1]).group[0]
    monkeypatch.setattr(module, "COLUMNS", 50)
    weight, share = module._sampled(task)
    np.testing.assert_array_equal(weight, group.source.weight()[:, :: -(-group.n // 50)])
    assert share == group.n / weight.shape[1]
    assert layer_losses(task, SPECS[:1]).group[0] == pytest.approx(whole, rel=0.3)


def test_without_any_signal_nothing_is_lost(group, caplog):
    nothing = Stats.empty(group.k)
    nothing.update(np.zeros((3, group.k), np.float32))
    found = layer_losses(task_of(BASE, group, nothing), SPECS, shares=True)
    assert set(found.group) == {0.0}
    assert not caplog.text, "no solver is asked to do without data"
    assert found.table[0] > found.table[2] > 0


def test_a_weight_that_is_not_finite_is_named(group, stats):
    task = task_of(BASE, group, stats)
    bad = [replace(part, read=lambda part=part: np.full((part.k, part.n), np.nan, np.float32)) for part in task.weights]
    with pytest.raises(ModelError, match=f"of '{group.name}' has NaN"):
        layer_losses(replace(task, weights=tuple(bad)), SPECS)


def test_statistics_are_of_the_float_model_for_any_method():
    assert statistics_recipe(Recipe("rtn", options={"enable_full_range": True})).needs_data
    moving = Recipe("gptq", options={"percdamp": 0.1}, true_sequential=True, both_streams=True)
    found = statistics_recipe(moving)
    assert (found.true_sequential, found.asymmetric_calibration) == (False, False)
    assert found.options == moving.options


def entry(layer, alpha, table_alpha=0.0):
    count = len([spec for spec in layer.specs if spec is not None])
    losses = Losses(tuple(float(i + 1) for i in range(count)), 1.0, tuple([2.0] * count if layer.table else []), 1.0)
    return {"losses": losses.to_dict(), "alpha": alpha, "table_alpha": table_alpha}


def test_predictions_are_what_a_unit_of_loss_does_times_the_loss(tied):
    *_, head = mixed_layers(tied, BASE)
    found = module._with_losses(head, entry(head, 0.5, 0.25))
    assert found.losses[:3] == (0.5 * 1 + 0.25 * 2, 0.5 * 2 + 0.25 * 2, 0.5 * 3 + 0.25 * 2)
    assert (found.losses[-1], found.specs[-1], found.alpha) == (0.0, None, 0.5)
    assert len(found.losses) == len(found.specs)


def test_of_what_nothing_is_known_the_recipe_is_kept(tied):
    first, *_ = mixed_layers(tied, BASE)
    found = module._with_losses(first, entry(first, 0.0))
    assert (found.specs, found.losses, found.stored) == ((BASE.spec,), (0.0,), (first.group.bytes,))
    *_, head = mixed_layers(tied, BASE)
    assert module._with_losses(head, entry(head, 0.0, 0.25)).settled, "what its table loses is half of what it does"


def test_an_entry_that_is_not_whole_is_measured_again(tied):
    first, *_, head = mixed_layers(tied, BASE)
    assert module._is_whole(entry(first, 1.0), first)
    assert module._is_whole(entry(head, 1.0, 2.0), head)
    assert not module._is_whole(entry(head, 1.0, 2.0), first), "that of another layer"
    losses = entry(first, 1.0)["losses"]
    for wrong in (
        {}, {"losses": None}, {"losses": {}}, {"losses": losses | {"tap": losses["tap"][1:]}}, {"alpha": None},
        {"losses": losses | {"tap": ["1.0"] * len(losses["tap"])}}, {"losses": losses | {"table": 7}},
        {"alpha": np.nan}, {"table_alpha": np.inf}, {"alpha": 10**400}, {"alpha": "1"},
    ):  # fmt: skip
        assert not module._is_whole(entry(first, 1.0) | wrong if wrong else {}, first), wrong


def test_what_the_journal_has_is_not_measured_again(tied, tmp_path):
    """Of another recipe it knows nothing; losses fall with every bit, and float loses none."""
    data, layers = zoo.lm_feeds(zoo.token_ids(2)), mixed_layers(tied, BASE)
    said = []
    plan = make_plan(tied, BASE)
    with open_resources(plan, data, executor=Serial(), progress=lambda *what: said.append(what[0])) as resources:
        run = Run(tied, tmp_path, "model", "data", 0.0, None, resources)
        with SharedStatistics(tied, [BASE], data, resources) as shared:
            first = measured(run, BASE, layers, shared, data)
            assert {"calibrate", "losses", "sensitivities"} == set(said)
            said.clear()
            assert measured(run, BASE, layers, shared, []) == first
            assert said == []
            measured(run, replace(BASE, options={"percdamp": 0.2}), layers[:1], shared, data)
            assert said
    for layer in first:
        assert layer.alpha > 0
        loss = dict(zip(layer.specs, layer.losses, strict=True))
        assert loss[None] == 0 < loss[Spec(8, 32)] < loss[Spec(4, 32)] < loss[Spec(2, 32)]


@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_a_sample_is_cut_to_its_first_tokens(tokens):
    feed = {
        "input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6)), "hidden": np.ones((2, 6, 3)),
        "past": np.ones((2, 1, 0, 4)), "flag": np.array([True]),
    }  # fmt: skip
    found = shortened(feed, tokens)
    np.testing.assert_array_equal(found["input_ids"], feed["input_ids"][:, :tokens])
    assert found["hidden"].shape == (2, min(6, tokens), 3)
    assert found["past"] is feed["past"]
    assert found["flag"] is feed["flag"]
    assert shortened({"x": np.ones((1, 9, 4))}, 2)["x"].shape == (1, 9, 4)
