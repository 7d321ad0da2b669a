"""`evaluate`: the distance between two models, as tables and as JSON."""

from __future__ import annotations

import pytest

from onnx_woq import quantize
from onnx_woq.cli.evaluate import TOKENS
from onnx_woq.runtime.evaluation import compare
from tests.unit.cli.conftest import strict_json


def test_the_distance_to_the_original(run, model, tmp_path):
    quantize(model, tmp_path / "q.onnx")
    arguments = ("evaluate", tmp_path / "q.onnx", "--reference", model, "--data", "random", "--samples", 3)
    assert 5 < strict_json(run(*arguments, "--json").stdout)["sqnr_db"] < 60
    assert "SQNR" in run(*arguments).stdout


def test_equal_models_are_infinitely_close_which_json_cannot_say(run, model):
    arguments = ("evaluate", model, "--reference", model, "--data", "random", "--samples", 2, "--json")
    assert strict_json(run(*arguments).stdout)["sqnr_db"] is None


@pytest.mark.parametrize(("flags", "seqlen"), [((), TOKENS), (("--seqlen", 9), 9)])
def test_flags_reach_the_engine(flags, seqlen, run, model, monkeypatch):
    calls = []

    def evaluate(*paths, **keywords):
        calls.append((paths, keywords))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "evaluate", evaluate)
    run("evaluate", model, "--reference", "r", "--data", "d", "--samples", 3, "--tokenizer", "t", *flags, code=130)
    ((paths, keywords),) = calls
    assert paths == (str(model), "r", "d")
    assert keywords == {"samples": 3, "seqlen": seqlen, "tokenizer": "t", "custom_ops": (), "progress": None}


@pytest.mark.parametrize("missing", ["--reference", "--data"])
def test_what_is_missing_is_a_usage_error(missing, run, model):
    given = [part for name in {"--reference", "--data"} - {missing} for part in (name, "x")]
    assert f"Missing option '{missing}'" in run("evaluate", model, *given, code=2).stderr
