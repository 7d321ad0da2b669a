"""Tuning: every way an evaluation can misbehave, and that no finished work is ever lost or repeated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, TuneResult, tune
from tests.support import measure
from tests.support.commands import CONFIGS, ROOT
from tests.zoo import small as zoo

RTNS = {f"b{bits}": Recipe("rtn", Spec(bits, 32)) for bits in (2, 3, 4, 8)}


def by_recipe(table: Callable[[dict], float], float_metric: float = 1.0) -> Callable[[Path], float]:
    """An evaluation that reads the recipe in the file's metadata; the float model, which has none, gets its own."""

    def evaluate(path: Path) -> float:
        recipe = measure.recipe_of(Path(path))
        return table(recipe) if recipe else float_metric

    return evaluate


def by_bits(metrics: dict[int, float], float_metric: float = 1.0) -> Callable[[Path], float]:
    return by_recipe(lambda recipe: metrics[recipe["spec"]["bits"]], float_metric)


def names(result: TuneResult) -> list[str]:
    return [trial.name for trial in result.trials]


def test_the_first_within_tolerance_ends_the_run(enc, tmp_path):
    result = tune(enc, by_bits({2: 0.5, 3: 0.98, 4: 0.995, 8: 1.0}), configs=RTNS, workdir=tmp_path)
    assert (result.met, result.best.name, names(result)) == (True, "b4", ["b2", "b3", "b4"])
    assert result.baseline == 1.0
    assert result.limit == pytest.approx(0.99)
    assert result.path.exists()
    assert measure.recipe_of(result.path)["spec"]["bits"] == 4
    assert [trial.met for trial in result.trials] == [False, False, True]


@pytest.mark.parametrize(
    ("criterion", "tolerance", "met"),
    [
        ("relative", 0.01, ["b8"]),
        ("relative", 0.06, ["b4"]),
        ("absolute", 0.06, ["b8"]),
        ("absolute", 0.6, ["b4"]),
        ("absolute", 3, ["b3"]),
    ],
)
def test_lower_is_better_with_both_criteria(criterion, tolerance, met, enc, tmp_path):
    evaluate = by_bits({2: 50.0, 3: 12.0, 4: 10.5, 8: 10.0}, 10.0)
    result = tune(
        enc, evaluate, configs=RTNS, criterion=criterion, tolerance=tolerance, higher_is_better=False, workdir=tmp_path
    )
    assert result.met
    assert [result.best.name] == met


def test_negative_baselines_keep_their_direction(enc, tmp_path):
    """A log-likelihood of −2: one percent worse is −2.02, not −1.98."""
    evaluate = by_bits({2: -9.0, 3: -2.03, 4: -2.015, 8: -1.5}, -2.0)
    assert tune(enc, evaluate, configs=RTNS, workdir=tmp_path / "a").best.name == "b4"
    evaluate = by_bits({2: 9.0, 3: -1.9, 4: -1.985, 8: -2.5}, -2.0)
    assert tune(enc, evaluate, configs=RTNS, higher_is_better=False, workdir=tmp_path / "b").best.name == "b4"


def test_perplexity_that_explodes_does_not_pass(enc, tmp_path):
    """The direction must be the user's: five times the perplexity is not an improvement."""
    result = tune(
        enc, by_bits(dict.fromkeys((2, 3, 4, 8), 50.0), 10.0), configs=RTNS, higher_is_better=False, workdir=tmp_path
    )
    assert not result.met
    assert result.best.metric == 50.0


def test_nothing_meets_the_tolerance(enc, tmp_path):
    """The best so far is returned, not the last, and says that it failed; max_trials or not."""
    configs = {f"b{bits}": Recipe("rtn", Spec(bits, 32)) for bits in (3, 4, 5, 8)}
    evaluate = by_bits({3: 0.1, 4: 0.7, 5: 0.6, 8: 0.2})
    for trials, best in ((None, "b4"), (1, "b3"), (2, "b4"), (3, "b4")):
        result = tune(enc, evaluate, configs=configs, max_trials=trials, workdir=tmp_path / str(trials))
        assert result.met is False
        assert (result.best.name, result.best.met) == (best, False)
        assert len(result.trials) == (trials or 4)
        assert measure.recipe_of(result.path)["spec"] == configs[best].to_dict()["spec"]
        measure.session(result.path)


def test_nan_and_raising_trials_are_recorded_and_the_next_goes_on(enc, tmp_path):
    def table(recipe: dict) -> float:
        bits = recipe["spec"]["bits"]
        if bits == 3:
            raise ValueError("out of cheese")
        return {2: math.nan, 4: math.inf, 8: 0.8}[bits]

    result = tune(enc, by_recipe(table), configs=RTNS, workdir=tmp_path)
    nan, raised, infinite, fine = result.trials
    assert nan.status == "nan"
    assert raised.status == "failed"
    assert "out of cheese" in raised.error
    assert "ValueError" in raised.error
    assert infinite.status == "nan"
    assert fine.status == "ok"
    assert (result.met, result.best.name) == (False, "b8")
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["best"] == "b8"


@pytest.mark.parametrize("metric", [None, "good", [1.0, 2.0], {}], ids=str)
def test_a_metric_that_is_no_number_fails_its_trial(metric, enc, tmp_path):
    configs = {name: RTNS[name] for name in ("b3", "b8")}
    result = tune(
        enc, by_recipe(lambda r: metric if r["spec"]["bits"] == 3 else 1.0), configs=configs, workdir=tmp_path
    )
    assert result.trials[0].status in ("failed", "nan")
    assert (result.met, result.best.name) == (True, "b8")


@pytest.mark.parametrize("kind", [np.float32, np.float64, int, np.array], ids=lambda k: k.__name__)
def test_metrics_may_be_any_number(kind, enc, tmp_path):
    result = tune(enc, by_recipe(lambda _: kind(1)), configs=["RTN_G32ASYM"], workdir=tmp_path)
    assert result.met
    json.dumps(result.to_dict(), allow_nan=False)


def test_when_all_trials_raise_the_history_is_returned(enc, tmp_path):
    def table(_: dict) -> float:
        raise RuntimeError("no")

    result = tune(enc, by_recipe(table), configs=RTNS, workdir=tmp_path)
    assert (result.met, result.best, result.path) == (False, None, None)
    assert [trial.status for trial in result.trials] == ["failed"] * 4
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_float_model_that_cannot_be_evaluated_is_an_error_of_the_data(enc, tmp_path):
    from onnx_woq.errors import OnnxWoqError

    def raising(_: Path) -> float:
        raise KeyError("label")

    for evaluate in (raising, lambda _: math.nan):
        with pytest.raises(OnnxWoqError, match="float"):
            tune(enc, evaluate, configs=RTNS, workdir=tmp_path)


def test_the_float_model_is_evaluated_once(enc, tmp_path):
    seen = []

    def evaluate(path: Path) -> float:
        seen.append(bool(measure.recipe_of(Path(path))))
        return 1.0 - seen[-1]

    tune(enc, evaluate, configs=RTNS, workdir=tmp_path)
    assert seen == [False, True, True, True, True]


def test_the_evaluation_gets_the_path_of_a_file_that_runs(enc, enc_data, tmp_path):
    def evaluate(path: Path) -> float:
        return measure.sqnr(measure.run(enc, enc_data)["y"] + 1e-9, measure.run(Path(path), enc_data)["y"])

    result = tune(
        enc,
        evaluate,
        enc_data,
        configs=["RTN_G32ASYM", "GPTQ_G32ASYM"],
        objective="best",
        tolerance=1e9,
        workdir=tmp_path,
    )
    assert result.best.name == "GPTQ_G32ASYM"


def test_no_trial_starts_after_the_timeout(enc, tmp_path):
    def slow(_: dict) -> float:
        time.sleep(0.25)
        return 0.5

    configs = {f"c{i}": Recipe("rtn", Spec(4, 32), exclude=(f"nothing{i}",)) for i in range(40)}
    start = time.monotonic()
    result = tune(enc, by_recipe(slow), configs=configs, timeout=2, workdir=tmp_path)
    assert time.monotonic() - start < 8
    assert 1 <= len(result.trials) < 12
    assert result.stopped == "timeout"
    assert (result.met, result.best.metric) == (False, 0.5)
    assert result.path.exists()


def test_no_time_at_all_still_returns(enc, tmp_path):
    result = tune(enc, by_recipe(lambda _: 1.0), configs=RTNS, timeout=1e-6, workdir=tmp_path)
    assert (result.met, result.best, result.stopped) == (False, None, "timeout")


def test_objectives(lm, lm_data, tmp_path):
    """All presets are within tolerance: the objective alone decides."""

    def table(recipe: dict) -> float:
        return 1.0 + (recipe["method"] == "gptq") * 0.1 + (not recipe["lm_head"]) * 0.1

    chosen = {}
    for objective in ("first", "smallest", "best"):
        result = tune(lm, by_recipe(table), lm_data, objective=objective, workdir=tmp_path)
        assert result.met
        chosen[objective] = result.best.name
        assert result.path.exists(), "a trial model that was dropped is made again when it is needed"
        assert measure.recipe_of(result.path) == result.best.recipe.to_dict()
        if objective != "first":
            assert names(result) == list(CONFIGS)
            sizes = {trial.name: trial.bytes for trial in result.trials}
            assert min(sizes, key=sizes.get) == "GPTQ_G128ASYM"
            assert max(sizes, key=sizes.get) == "GPTQ_G32ASYM_DISABLE_LAST_MATMUL"
    assert chosen == {"first": "RTN_G32ASYM", "smallest": "GPTQ_G128ASYM", "best": "GPTQ_G32ASYM_DISABLE_LAST_MATMUL"}


def test_smallest_prefers_a_larger_model_that_meets_the_tolerance(enc, tmp_path):
    evaluate = by_bits({2: 0.2, 3: 0.5, 4: 0.995, 8: 1.0})
    result = tune(enc, evaluate, configs=dict(reversed(RTNS.items())), objective="smallest", workdir=tmp_path)
    assert (result.met, result.best.name) == (True, "b4")
    assert len(result.trials) == 4


def test_configs_may_be_names_recipes_or_a_mapping(enc, enc_data, tmp_path):
    evaluate = by_recipe(lambda _: 0.0)
    recipe = Recipe("gptq", Spec(3, 64))
    result = tune(enc, evaluate, enc_data, configs=["awq_g32asym", recipe, "RTN_G32ASYM"], workdir=tmp_path / "a")
    assert names(result)[::2] == ["AWQ_G32ASYM", "RTN_G32ASYM"]
    assert result.trials[1].recipe == recipe
    result = tune(enc, evaluate, enc_data, configs={"mine": recipe}, workdir=tmp_path / "b")
    assert names(result) == ["mine"]
    result = tune(enc, evaluate, enc_data, configs=(c for c in ("RTN_G32ASYM",)), workdir=tmp_path / "c")
    assert names(result) == ["RTN_G32ASYM"]
    result = tune(enc, evaluate, enc_data, workdir=tmp_path / "d")
    assert names(result) == list(CONFIGS)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"configs": ["GPTQ_32ASYM"]}, "GPTQ_G32ASYM"),
        ({"configs": []}, "configs"),
        ({"criterion": "relativ"}, "relative"),
        ({"objective": "fastest"}, "smallest"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"max_trials": 0}, "max_trials"),
        ({"timeout": 0}, "timeout"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused_before_any_work(options, hint, enc, tmp_path):
    from onnx_woq.errors import RecipeError

    calls = []
    with pytest.raises(RecipeError, match=hint):
        tune(enc, lambda path: calls.append(path) or 1.0, workdir=tmp_path / "w", **options)
    assert not calls
    assert not (tmp_path / "w").exists()


def test_calibration_runs_once_for_all_configurations(lm, lm_data, forwards, tmp_path):
    evaluate = by_recipe(lambda _: 0.0)
    tune(lm, evaluate, lm_data, configs=["GPTQ_G32ASYM"], workdir=tmp_path / "one")
    one = len(forwards)
    assert one >= len(lm_data)
    tune(lm, evaluate, lm_data, workdir=tmp_path / "all")
    assert len(forwards) == 2 * one
    more = [Recipe(m, Spec(b, g)) for m in ("gptq", "awq") for b in (2, 8) for g in (16, -1)]
    tune(lm, evaluate, lm_data, configs=more, workdir=tmp_path / "more")
    assert len(forwards) == 3 * one


def test_configurations_of_different_sites_share_the_calibration(lm, lm_data, forwards, tmp_path):
    """The first configuration leaves out what a later one needs."""
    configs = [Recipe("gptq", include=("layer0",)), Recipe("gptq", include=("layer1.up",)), Recipe("awq")]
    result = tune(lm, by_recipe(lambda _: 0.0), lm_data, configs=configs, workdir=tmp_path / "w")
    assert [trial.status for trial in result.trials] == ["ok"] * 3
    assert len(forwards) <= len(lm_data) + 2


def test_tuned_models_equal_quantized_ones(lm, lm_data, tmp_path):
    """One calibration for all gives what a calibration of one's own gives, and trials do not leak into each other."""
    from onnx_woq import PRESETS, quantize

    for name in ("AWQ_G32ASYM", "GPTQ_G128ASYM", "RTN_G32ASYM"):
        wanted = PRESETS[name].to_dict()
        order = [config for config in CONFIGS if config != name] + [name]
        evaluate = by_recipe(lambda recipe, wanted=wanted: float(recipe == wanted))
        result = tune(lm, evaluate, lm_data, configs=order, objective="best", workdir=tmp_path / name)
        assert (names(result)[-1], result.best.name) == (name, name)
        quantize(lm, tmp_path / "q.onnx", name, lm_data)
        tuned, alone = measure.decoded(result.path), measure.decoded(tmp_path / "q.onnx")
        assert all(measure.agreement(tuned[key], w) > 0.999 for key, w in alone.items())


def test_groups_that_share_a_first_linear_are_told_apart(lm_data, tmp_path):
    """With k before q, one recipe solves [k, v, q] together and another one [k, v]: both are called after k."""
    from onnx_woq import PRESETS, quantize

    model = zoo.language_model(tmp_path / "kvq.onnx", projections="kvq")
    configs = ["GPTQ_G32ASYM", "FAST_4BIT", "AWQ_G32ASYM"]
    for name in configs:
        wanted = PRESETS[name].to_dict()
        evaluate = by_recipe(lambda recipe, wanted=wanted: float(recipe == wanted))
        result = tune(model, evaluate, lm_data, configs=configs, objective="best", workdir=tmp_path / name)
        assert [(trial.name, trial.error) for trial in result.trials] == [(one, "") for one in configs]
        quantize(model, tmp_path / "alone.onnx", name, lm_data)
        assert_same_weights(result.path, tmp_path / "alone.onnx")


def test_a_head_that_is_rotated_otherwise_is_solved_again(tied_lm, lm_data, tmp_path):
    """A head that lends its codes to the embedding stays as it is, one that does not is rotated: two weights."""
    from onnx_woq import quantize

    shares = Recipe("gptq", rotation=True, embedding=Spec())
    alone = dataclasses.replace(shares, overrides={"^tokens$": Spec(8, 32)})
    evaluate = by_recipe(lambda recipe: float(bool(recipe["overrides"])))
    result = tune(tied_lm, evaluate, lm_data[:4], configs={"a": shares, "b": alone}, objective="best", workdir=tmp_path)
    assert result.best.name == "b"
    quantize(tied_lm, tmp_path / "q.onnx", alone, lm_data[:4])
    assert_same_weights(result.path, tmp_path / "q.onnx")


def test_later_trials_do_not_see_earlier_ones(lm, lm_data, tmp_path):
    """The file of a configuration is the same byte for byte whether it was tried alone or after others.

    AWQ folds into norms and every trial makes new tensors: neither values nor names may leak.
    """
    evaluate = by_recipe(lambda recipe: float(recipe["method"] == "rtn"))
    for name, configs in (("after", ["AWQ_G32ASYM", "GPTQ_G32ASYM", "RTN_G32ASYM"]), ("alone", ["RTN_G32ASYM"])):
        result = tune(lm, evaluate, lm_data, configs=configs, workdir=tmp_path / f"{name}.work")
        result.path.parent.rename(tmp_path / name)
    assert_same_weights(tmp_path / "after" / "lm.onnx", tmp_path / "alone" / "lm.onnx")
    assert measure.listing(tmp_path / "after") == measure.listing(tmp_path / "alone")


@pytest.mark.parametrize("kind", ["generator", "generator of tuples", "iterator"])
def test_a_dataloader_may_be_used_up_once(kind, lm, lm_data, tmp_path):
    loaders = {
        "generator": (feed for feed in lm_data),
        "generator of tuples": ((feed, 0) for feed in lm_data),
        "iterator": iter(lm_data),
    }
    result = tune(lm, by_recipe(lambda _: 0.0), loaders[kind], workdir=tmp_path)
    assert [trial.status for trial in result.trials] == ["ok"] * len(CONFIGS)


def test_the_built_in_judge_of_a_language_model(lm, lm_data, tmp_path, monkeypatch):
    """Mean KL on data that calibration has not seen, exactly."""
    import onnx_woq.runtime.calibration.collect as calibrate
    import onnx_woq.runtime.evaluation.metrics as evaluate

    calibrated: list[bytes] = []
    judged: list[bytes] = []
    walk, distances = calibrate.collect_statistics, evaluate.distances

    def watched_walk(model: object, groups: object, batches: list, **options: object) -> object:
        calibrated.extend(feed["input_ids"].tobytes() for feed in batches)
        return walk(model, groups, batches, **options)

    def watched_distances(model: object, reference: object, feeds: list) -> object:
        judged.extend(feed["input_ids"].tobytes() for feed in feeds)
        return distances(model, reference, feeds)

    monkeypatch.setattr(calibrate, "collect_statistics", watched_walk)
    monkeypatch.setattr(evaluate, "distances", watched_distances)
    result = tune(
        lm, None, (feed for feed in lm_data), configs=["RTN_G32ASYM", "GPTQ_G32ASYM"], judge_limit=0.0, workdir=tmp_path
    )
    assert result.metric_name == "kl"
    assert (result.baseline, result.higher_is_better, result.met) == (0.0, False, False)
    assert calibrated
    assert judged
    assert not set(calibrated) & set(judged)
    rtn, gptq = (trial.metric for trial in result.trials)
    assert 0 < gptq < rtn
    assert result.best.name == "GPTQ_G32ASYM"
    held_out = [feed for feed in lm_data if feed["input_ids"].tobytes() in set(judged)]
    p, q = (measure.log_softmax(measure.run(m, held_out)["logits"]) for m in (lm, result.path))
    assert gptq == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-2)


def test_the_built_in_judge_of_another_model(enc, enc_data, tmp_path):
    configs = {"b3": RTNS["b3"], "b8": RTNS["b8"]}
    result = tune(enc, None, enc_data, configs=configs, workdir=tmp_path)
    assert result.metric_name == "sqnr_db"
    assert result.higher_is_better
    assert math.isfinite(result.limit), "a stated default threshold"
    assert result.trials[0].metric < result.limit < result.trials[1].metric
    assert (result.met, result.best.name) == (True, "b8")
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_built_in_judge_needs_data_to_hold_out(lm, lm_data, tmp_path):
    from onnx_woq.errors import DataError

    with pytest.raises(DataError):
        tune(lm, None, lm_data[:1], workdir=tmp_path)
    with pytest.raises(DataError):
        tune(lm, None, None, configs=["RTN_G32ASYM"], workdir=tmp_path)


def test_no_data_is_needed_when_no_configuration_needs_any(enc, tmp_path):
    assert tune(enc, by_recipe(lambda _: 1.0), configs=["RTN_G32ASYM"], workdir=tmp_path).met


def test_output_gets_the_best_and_the_input_stays(lm_folder, lm_data, tmp_path):
    before = measure.listing(lm_folder)
    result = tune(lm_folder / "model.onnx", by_recipe(lambda r: r["spec"]["group_size"]), lm_data, objective="best",
                  tolerance=1e9, workdir=tmp_path / "w", output=tmp_path / "out")  # fmt: skip
    assert result.path == tmp_path / "out" / "model.onnx"
    assert measure.recipe_of(result.path)["spec"]["group_size"] == 128
    assert (tmp_path / "out" / "tokenizer.json").exists()
    measure.session(result.path)
    assert measure.listing(lm_folder) == before


RUN = """
import json, os, signal, sys
from pathlib import Path
from onnx_woq import tune
from tests.support import measure
from tests.zoo import small as zoo

model, work, log, output, die_at = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
data = zoo.lm_feeds(zoo.token_ids(6, seed=int(sys.argv[6])))

def evaluate(path):
    with log.open("a") as file:
        file.write(("trial" if measure.recipe_of(Path(path)) else "float") + "\\n")
    if log.read_text().count("trial") == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    reference = measure.run(model, data)["logits"]
    return measure.sqnr(reference, measure.run(Path(path), data)["logits"] + 1e-6)

result = tune(model, evaluate, data, objective="best", tolerance=1.0, workdir=work, output=output)
print(json.dumps(result.to_dict(), allow_nan=False))
"""


def tuning_process(
    model: Path, work: Path, output: Path, die_at: int = 99, seed: int = 0
) -> tuple[int, dict, list[str]]:
    """Runs RUN in a process of its own: exit code, result, and what was evaluated."""
    log = work.parent / f"{work.name}.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", RUN, *map(str, (model, work, log, output, die_at, seed))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return (
        done.returncode,
        json.loads(done.stdout) if done.stdout else {},
        log.read_text().split() if log.exists() else [],
    )


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = measure.decoded(one), measure.decoded(other)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], w) for name, w in b.items())


@pytest.mark.slow
def test_a_killed_run_resumes(lm, tmp_path):
    code, _, seen = tuning_process(lm, tmp_path / "w", tmp_path / "o" / "q.onnx", die_at=3)
    assert code == -signal.SIGKILL
    assert seen == ["float", "trial", "trial", "trial"]
    assert not (tmp_path / "o").exists()
    code, resumed, seen = tuning_process(lm, tmp_path / "w", tmp_path / "o" / "q.onnx")
    assert code == 0
    assert seen == ["trial"] * (len(CONFIGS) - 2), "neither the float model nor the two finished trials again"
    assert [trial["resumed"] for trial in resumed["trials"]] == [True, True] + [False] * (len(CONFIGS) - 2)
    _, whole, seen = tuning_process(lm, tmp_path / "x", tmp_path / "p" / "q.onnx")
    assert seen == ["float"] + ["trial"] * len(CONFIGS), whole["trials"]
    for key in ("met", "best", "baseline", "limit", "stopped"):
        assert resumed[key] == whole[key]
    assert [t["metric"] for t in resumed["trials"]] == pytest.approx([t["metric"] for t in whole["trials"]], rel=1e-6)
    assert_same_weights(tmp_path / "o" / "q.onnx", tmp_path / "p" / "q.onnx")
    _, again, seen = tuning_process(lm, tmp_path / "w", tmp_path / "r" / "q.onnx")
    assert seen == []
    assert again["best"] == whole["best"]
    assert_same_weights(tmp_path / "r" / "q.onnx", tmp_path / "p" / "q.onnx")
    _, _, seen = tuning_process(lm, tmp_path / "w", tmp_path / "s" / "q.onnx", seed=5)
    assert seen == ["float"] + ["trial"] * len(CONFIGS), "other calibration data: nothing of the old run counts"


class Counting:
    """An evaluation that counts; a fixed metric per number of bits."""

    def __init__(self, metrics: dict[int, float]) -> None:
        self.seen: list[int] = []
        self.metrics = metrics

    def __call__(self, path: Path) -> float:
        recipe = measure.recipe_of(Path(path))
        self.seen.append(recipe["spec"]["bits"] if recipe else 0)
        return self.metrics[self.seen[-1]]


METRICS = {0: 1.0, 2: 0.2, 3: 0.5, 4: 0.9, 8: 0.99}


def journal_of(work: Path) -> Path:
    files = list(work.glob("*.jsonl"))
    assert len(files) == 1
    return files[0]


@pytest.mark.parametrize("damage", ["cut", "garbage", "binary", "no newline", "empty lines"])
def test_a_damaged_journal_costs_at_most_the_damaged_line(damage, enc, tmp_path):
    tune(enc, Counting(METRICS), configs=RTNS, tolerance=0, workdir=tmp_path)
    journal = journal_of(tmp_path)
    content = journal.read_bytes()
    lost = damage in ("cut", "garbage", "binary")
    head = content[: content.rstrip(b"\n").rfind(b"\n") + 1]
    changed = {
        "cut": content[:-40],
        "garbage": head + b"{not json\n",
        "binary": head + bytes(range(256)),
        "no newline": content.rstrip(b"\n"),
        "empty lines": content + b"\n\n",
    }
    journal.write_bytes(changed[damage])
    counting = Counting(METRICS)
    result = tune(enc, counting, configs=RTNS, tolerance=0, workdir=tmp_path)
    assert counting.seen == ([8] if lost else [])
    assert names(result) == list(RTNS)
    assert (result.met, result.best.name) == (False, "b8")
    assert result.path.exists()
    counting = Counting(METRICS)
    tune(enc, counting, configs=RTNS, tolerance=0, workdir=tmp_path)
    assert counting.seen == [], "the line after the damaged one was written whole"


def test_the_journal_is_append_only_json_lines(enc, tmp_path):
    tune(enc, Counting(METRICS), configs=["RTN_G32ASYM"], tolerance=0, workdir=tmp_path)
    first = journal_of(tmp_path).read_bytes()
    tune(enc, Counting(METRICS), configs=RTNS, tolerance=0, workdir=tmp_path)
    second = journal_of(tmp_path).read_bytes()
    assert second.startswith(first)
    assert all(isinstance(json.loads(line), dict) for line in second.splitlines())


def test_what_changed_is_tried_again(enc, tmp_path):
    """Another model, recipe or evaluation under the same names in the same folder."""
    tune(enc, Counting(METRICS), configs=RTNS, tolerance=0, workdir=tmp_path / "w")
    counting = Counting(METRICS)
    changed = RTNS | {"b3": Recipe("rtn", Spec(3, 64))}
    tune(enc, counting, configs=changed, tolerance=0, workdir=tmp_path / "w")
    assert counting.seen == [3]
    other = zoo.encoder(tmp_path / "enc.onnx", seed=50)
    counting = Counting(METRICS)
    result = tune(other, counting, configs=RTNS, tolerance=0, workdir=tmp_path / "w")
    assert counting.seen == [0, 2, 3, 4, 8]
    measure.session(result.path)


def test_a_resumed_verdict_follows_the_present_tolerance(enc, tmp_path):
    assert not tune(enc, Counting(METRICS), configs=RTNS, tolerance=0, workdir=tmp_path).met
    counting = Counting(METRICS)
    result = tune(enc, counting, configs=RTNS, tolerance=0.2, workdir=tmp_path)
    assert counting.seen == []
    assert (result.met, result.best.name) == (True, "b4")
    assert measure.recipe_of(result.path)["spec"]["bits"] == 4, "its model was dropped as hopeless: made again"


def test_failed_trials_of_an_earlier_run(enc, tmp_path):
    """A failure is remembered as such or tried again, but never taken for a result."""
    evaluate = by_recipe(lambda r: math.nan if r["spec"]["bits"] < 4 else 0.5)
    first = tune(enc, evaluate, configs=RTNS, workdir=tmp_path)
    second = tune(enc, evaluate, configs=RTNS, workdir=tmp_path)
    assert [t.status for t in first.trials] == [t.status for t in second.trials] == ["nan", "nan", "ok", "ok"]
    assert second.best.name == first.best.name


def test_max_trials_counts_resumed_ones_and_then_goes_on(enc, tmp_path):
    assert names(tune(enc, Counting(METRICS), configs=RTNS, tolerance=0, max_trials=2, workdir=tmp_path)) == [
        "b2",
        "b3",
    ]
    counting = Counting(METRICS)
    assert names(tune(enc, counting, configs=RTNS, tolerance=0, max_trials=3, workdir=tmp_path)) == ["b2", "b3", "b4"]
    assert counting.seen == [4]


def test_interrupting_is_not_a_failed_trial(enc, tmp_path):
    def interrupted(_: dict) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(enc, by_recipe(interrupted), configs=RTNS, workdir=tmp_path)
    counting = Counting(METRICS)
    tune(enc, counting, configs=RTNS, workdir=tmp_path)
    assert counting.seen[-4:] == [2, 3, 4, 8]


def test_disk_use_stays_bounded(enc, tmp_path):
    configs = {f"c{i}": Recipe("rtn", Spec(8, 32), exclude=(f"nothing{i}",)) for i in range(12)}
    sizes = []

    def evaluate(path: Path) -> float:
        sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))
        return 0.0 if measure.recipe_of(Path(path)) else 1.0

    result = tune(enc, evaluate, configs=configs, workdir=tmp_path)
    assert max(sizes) < 3 * result.best.bytes
