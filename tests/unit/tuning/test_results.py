"""What a run gives back is JSON without NaN, with the keys of version 0.1."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.results import FrontierPoint, LayerChoice, Trial, TuneResult

TRIAL = Trial(
    "GPTQ", "ok", 0.02, True, 1000, 1.5, "", Recipe("gptq"), path=Path("w/m.onnx"), verdict="within",
    standard_error=0.001, pairs=((1.0, 50.0), (2.0, 50.0)),
)  # fmt: skip
LAYER = LayerChoice("q", ("q", "k"), 64, 32, Spec(3, 32), 900, 0.5, 0.01)
POINT = FrontierPoint("mix 4.00 bpw", "mix", 1000, 4.0, 0.01, 0.02, 0.001, Recipe("gptq"), chosen=True)
RESULT = TuneResult(
    True, TRIAL, Path("q.onnx"), (TRIAL,), "kl", 0.0, 0.05, False, 9000, "met", 3.0, "at most 4 bits per weight",
    (POINT,), (LAYER,), Path("m.onnx"),
)  # fmt: skip


def said(thing):
    return json.loads(json.dumps(thing.to_dict(), allow_nan=False))


def test_a_trial_says_how_many_samples_it_was_seen_on_and_not_what_they_gave():
    found = said(TRIAL)
    assert found["samples"] == 2
    assert "pairs" not in found
    assert (found["path"], found["status"], found["verdict"]) == (str(Path("w/m.onnx")), "ok", "within")
    assert Recipe.from_dict(found["recipe"]) == TRIAL.recipe
    failed = said(Trial("x", "failed", None, False, None, 0.1, "ValueError: no", Recipe()))
    assert (failed["samples"], failed["path"], failed["metric"], failed["bytes"]) == (None, None, None, None)


@pytest.mark.parametrize(("spec", "alpha"), [(Spec(3, 32), 0.5), (None, math.nan), (Spec(), math.inf)])
def test_a_layer_has_the_keys_of_version_0_1(spec, alpha):
    found = said(replace(LAYER, spec=spec, alpha=alpha))
    assert list(found) == ["name", "sites", "k", "n", "spec", "bytes", "alpha", "predicted", "bits"]
    assert found["sites"] == ["q", "k"]
    assert (found["spec"] and Spec.from_dict(found["spec"])) == spec
    assert found["alpha"] == (alpha if math.isfinite(alpha) else None)


def test_bits_of_a_layer_are_those_of_its_bytes():
    for size in (0, 1, 256, 64 * 32 * 4):
        assert replace(LAYER, bytes=size).bits * 64 * 32 == pytest.approx(8 * size)
    assert replace(LAYER, bytes=64 * 32 * 4).bits == 32


def test_a_point_of_the_frontier_says_all_it_knows():
    found = said(POINT)
    assert found == {**vars(POINT), "recipe": POINT.recipe.to_dict()}
    assert said(replace(POINT, predicted=None, measured=None))["measured"] is None


@pytest.mark.parametrize("limit", [0.05, math.inf, -math.inf])
def test_a_result_is_json_whatever_its_limit(limit):
    """A budget of bytes has no limit of loss, and an SQNR no baseline."""
    found = said(replace(RESULT, limit=limit, baseline=math.inf))
    assert found["limit"] == (limit if math.isfinite(limit) else None)
    assert found["baseline"] is None
    assert (found["best"], found["path"]) == ("GPTQ", "q.onnx")
    assert [len(found[name]) for name in ("trials", "frontier", "layers")] == [1, 1, 1]
    nothing = said(replace(RESULT, best=None, path=None, trials=()))
    assert (nothing["best"], nothing["path"], nothing["trials"]) == (None, None, [])
