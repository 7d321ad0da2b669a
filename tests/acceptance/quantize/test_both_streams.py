"""Both streams: every weight is solved for the outputs of the float model, given the inputs of the quantized one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.errors import DataError, RecipeError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.collect import collect_statistics
from onnx_woq.runtime.calibration.windows import CalibrationMemory
from tests.acceptance.quantize.test_executors import Serial
from tests.support import hooks, measure
from tests.zoo import small as zoo

SPEC = Spec(3, 32)


def recipe(method: str = "gptq", **fields: Any) -> Recipe:
    return Recipe(method, SPEC, accuracy_level=0, both_streams=True, **fields)


class Spy:
    """Keeps what a solver is given, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, Any]] = []

    def __call__(self, real: hooks.Solve) -> hooks.Solve:
        def solve(weight: Any, stats: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((np.array(weight), stats))
            return real(weight, stats, *args, **kwargs)

        return solve


@pytest.fixture(scope="module")
def chained(tmp_path_factory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Linear layers one after another: what a layer reads is what the one before gives, an output of the model."""
    path = zoo.chain(tmp_path_factory.mktemp("chain") / "m.onnx", (96, 80, 64, 48))
    return path, [{"x": feed["x"][0]} for feed in zoo.float_feeds(6, length=40, width=96)]


def naive_target(w: np.ndarray, x: np.ndarray, other: np.ndarray, share: float = 1.0, damp: float = 0.01) -> np.ndarray:
    lam = damp * np.square(other).sum(axis=0).mean()
    best = np.linalg.solve(other.T @ other + lam * np.eye(len(w)), other.T @ (x @ w) + lam * w)
    return w + share * (best - w)


@pytest.mark.parametrize("unit", ["tap", "block"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_each_weight_aims_at_the_outputs_of_the_float_model(unit, share, chained, tmp_path):
    model, data = chained
    spy = Spy()
    with hooks.solver("gptq", spy):
        quantize(model, tmp_path / "q.onnx", recipe(sequential_unit=unit, stream_share=share), data)
    exact, quantized = measure.run(model, data), measure.run(tmp_path / "q.onnx", data)
    weights = measure.float_weights(model)
    inputs = np.concatenate([feed["x"] for feed in data]).astype(np.float64)
    for number, (given, stats) in enumerate(spy.calls):
        x, other = (inputs, inputs) if not number else (exact[f"h{number - 1}"], quantized[f"h{number - 1}"])
        np.testing.assert_allclose(stats.cross, other.T @ x, rtol=1e-3, atol=1e-3 * np.abs(stats.cross).max())
        wanted = naive_target(weights[f"h{number}"], x, other, share)
        np.testing.assert_allclose(given, wanted, atol=2e-3 * np.abs(wanted).max())
    assert len(spy.calls) == 3
    assert (
        np.abs(spy.calls[2][0] - weights["h2"]).max() > 0.02 * share * np.abs(weights["h2"]).max()
    )  # or nothing is shown


def test_it_is_plain_gptq_where_nothing_has_been_quantized_before(lm, lm_data, tmp_path):
    only = {"include": ("^layer0.q$",)}
    quantize(lm, tmp_path / "a.onnx", recipe(**only), lm_data)
    quantize(lm, tmp_path / "b.onnx", replace(recipe(**only), both_streams=False, true_sequential=False), lm_data)
    a, b = (measure.decoded(tmp_path / f"{name}.onnx")["layer0.q"] for name in "ab")
    assert measure.agreement(a, b) > 0.999


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_errors_do_not_add_up_as_they_do_without(method, chained, tmp_path):
    """The outputs of the last layer come closer to those of the float model."""
    model, data = chained
    exact = measure.run(model, data)["h2"]
    lost = []
    for both in (False, True):
        what = replace(recipe(method), both_streams=both, true_sequential=True)
        quantize(model, tmp_path / "q.onnx", what, data)
        lost.append(np.square(measure.run(tmp_path / "q.onnx", data)["h2"] - exact).sum())
    assert lost[1] < 0.9 * lost[0]


def test_a_language_model_in_every_way(lm, lm_data, tmp_path):
    """The budget and the executor leave no trace; attention weights, rotation and what is added go along."""
    first = None
    for limit, executor in ((None, None), (900_000_000, None), (None, Serial())):
        quantize(lm, tmp_path / "q.onnx", recipe(), lm_data, max_memory=limit, executor=executor)
        codes = measure.decoded(tmp_path / "q.onnx")
        first = first or codes
        for name, w in first.items():
            np.testing.assert_array_equal(codes[name], w)
    everything = recipe(attention_weighted=True, rotation=True, bias_correction=True, lowrank=16)
    report = quantize(lm, tmp_path / "q.onnx", everything, lm_data)
    assert all(group.error is not None and group.error < 0.2 for group in report.groups)
    assert quantize(lm, tmp_path / "q.onnx", recipe("awq"), lm_data).groups


def test_with_bias_correction_the_mean_output_is_that_of_the_float_model(chained, tmp_path):
    model, data = chained
    quantize(model, tmp_path / "q.onnx", recipe(bias_correction=True), data)
    exact, found = measure.run(model, data), measure.run(tmp_path / "q.onnx", data)
    for name in exact:
        error = found[name] - exact[name]
        assert np.abs(error.mean(axis=0)).max() < 1e-3 * np.abs(exact[name]).mean(), name


def test_so_it_is_behind_what_is_not_linear(enc, enc_data, tmp_path):
    """Where the means of both models' inputs differ, too."""
    quantize(enc, tmp_path / "q.onnx", recipe(bias_correction=True), enc_data)
    exact, found = (measure.run(path, enc_data)["y"] for path in (enc, tmp_path / "q.onnx"))
    assert np.abs((found - exact).mean(axis=0)).max() < 1e-3 * np.abs(exact).mean()


@pytest.mark.parametrize("unit", ["tap", "block"])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(unit, lm, lm_data, tmp_path):
    what = recipe(sequential_unit=unit)
    (tmp_path / "whole").mkdir()
    quantize(lm, tmp_path / "whole" / "q.onnx", what, lm_data)
    solves = [0]

    def stopping(real: hooks.Solve) -> hooks.Solve:
        def solve(*args: Any, **kwargs: Any) -> Any:
            solves[0] += 1
            if solves[0] == 6:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return solve

    out = tmp_path / "q.onnx"
    with hooks.solver("gptq", stopping), pytest.raises(KeyboardInterrupt):
        quantize(lm, out, what, lm_data, executor=Serial())
    assert not out.exists()
    quantize(lm, out, what, lm_data, resume=True)
    for name in ("q.onnx", "q.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_plan_counts_the_second_model(lm, lm_data):
    plans = []
    for what in (replace(recipe(), both_streams=False, true_sequential=True), recipe()):
        plan = make_plan(load(lm), what)
        with open_resources(plan, lm_data, executor=Serial()) as found:
            plans.append(found.memory)
    assert plans[1].solving > 1.3 * plans[0].solving
    assert plans[1].peak > plans[0].peak
    one, two = (CalibrationMemory.of(plan.model, plan.linear_groups, lm_data, models=models) for models in (1, 2))
    assert two.least() >= 1.95 * one.least()
    assert (two.hidden, two.between) == (2 * one.hidden, 2 * one.between)


def test_statistics_are_the_same_whatever_the_budget(lm, lm_data):
    """Nothing is edited here, so both streams are one: cross products are the Gram matrix."""
    for budget in (1, 1 << 30):
        model = load(lm)
        groups = find_linear_groups(model, recipe())[0]
        for _, stats in collect_statistics(
            model, groups, lm_data, memory_budget=budget, sequential="tap", asymmetric_calibration=True
        ):
            np.testing.assert_allclose(stats.cross, stats.gram, rtol=1e-3, atol=1e-4 * np.abs(stats.gram).max())


def test_it_is_refused_without_data_and_out_of_range(lm, tmp_path):
    assert recipe().true_sequential
    with pytest.raises(RecipeError, match="asymmetric_strength"):
        recipe(stream_share=1.5)
    with pytest.raises(DataError, match="asymmetric_calibration"):
        quantize(lm, tmp_path / "q.onnx", recipe("rtn"))
