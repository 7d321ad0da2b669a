"""Configurations race on the same samples: the clearly worse drop out, the close see more, and nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, tune
from onnx_woq.runtime.evaluation import metrics as evaluate
from tests.zoo import small as zoo

WORSE, GOOD, BETTER = (Recipe("rtn", Spec(bits, 32)) for bits in (3, 6, 8))


@pytest.fixture(scope="module")
def data() -> list[dict[str, np.ndarray]]:
    return zoo.lm_feeds(zoo.token_ids(40))


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """The model judged, once for each sample it was seen on."""
    seen: list[str] = []
    real = evaluate.distances

    def counted(model, reference, feeds):
        for pair in real(model, reference, feeds):
            seen.append(Path(model).parent.name.split("-")[0])
            yield pair

    monkeypatch.setattr(evaluate, "distances", counted)
    return seen


def raced(lm, data, folder, configs, limit=0.05, **options):
    return tune(
        lm, None, data, configs=configs, objective="best", judge_limit=limit, workdir=folder, samples=4, **options
    )


def test_the_clearly_worse_drop_out_early(lm, data, looked, tmp_path):
    result = raced(lm, data, tmp_path, {"better": BETTER, "worse": WORSE})
    better, worse = result.trials
    assert worse.dropped
    assert not better.dropped
    assert looked.count("worse") == 8, "the first stage was enough"
    assert len(worse.pairs) == 8
    assert worse.metric > 10 * better.metric
    assert result.best.name == "better"


def test_what_is_close_sees_more(lm, data, looked, tmp_path):
    """A twin of the leader cannot be told from it: both see every sample there is."""
    twin = Recipe("rtn", Spec(8, 32), exclude=("nothing is called so",))
    result = raced(lm, data, tmp_path, {"better": BETTER, "twin": twin})
    assert [len(trial.pairs) for trial in result.trials] == [36, 36]
    assert not any(trial.dropped for trial in result.trials)
    assert looked.count("twin") == 36
    assert looked.count("better") == 36, "the leader's first samples were not looked at again"
    assert result.trials[0].metric == result.trials[1].metric


def test_a_limit_on_the_metric_itself_is_undecided(lm, data, tmp_path):
    metric = raced(lm, data, tmp_path / "a", {"good": GOOD}, limit=1.0).best.metric  # decided on eight samples
    close = tune(lm, None, data, configs={"good": GOOD}, judge_limit=metric, samples=4, workdir=tmp_path / "b")
    (trial,) = close.trials
    assert trial.verdict == "undecided"
    assert not trial.met
    assert not close.met
    assert len(trial.pairs) == 36, "every sample was asked"
    assert close.best.name == "good", "the best so far is returned all the same"


def test_the_same_run_gives_the_same_answer(lm, data, tmp_path):
    configs = {"good": GOOD, "worse": WORSE, "better": BETTER}
    outline = lambda result: [(t.name, t.metric, t.verdict, t.dropped, t.pairs) for t in result.trials]  # noqa: E731
    assert outline(raced(lm, data, tmp_path / "a", configs)) == outline(raced(lm, data, tmp_path / "b", configs))


def test_a_resumed_race_remembers_what_was_seen(lm, data, looked, tmp_path):
    configs = {"better": BETTER, "worse": WORSE}
    first = raced(lm, data, tmp_path, configs, max_trials=1)
    looked.clear()
    again = raced(lm, data, tmp_path, configs)
    assert looked.count("better") == 0
    assert again.trials[0].resumed
    assert again.trials[0].pairs == first.trials[0].pairs
    assert again.trials[1].dropped


def test_other_models_race_by_noise_per_signal(enc, tmp_path):
    data = zoo.float_feeds(30)
    result = raced(enc, data, tmp_path, {"better": BETTER, "worse": WORSE}, limit=15.0)
    assert result.metric_name == "sqnr_db"
    better, worse = result.trials
    assert (better.verdict, worse.verdict) == ("within", "outside")
    assert worse.dropped
    metrics = evaluate.compare(result.path, enc, data[-26:][: len(better.pairs)])
    assert better.metric == pytest.approx(metrics.sqnr_db, rel=1e-6)
