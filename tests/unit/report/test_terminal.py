"""Tables say what a result says, in whole rows where nobody looks, and no name is taken for markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.report import terminal
from onnx_woq.runtime.evaluation.metrics import Metrics
from tests.unit.report.results import TABLE, TRIALS, inspected, mixed, quantized, trial, tuned, weight


@pytest.fixture
def printed(capsys):
    """A function that prints a result and returns its rows, cells apart."""

    def rows(show, result):
        show(result)
        out, err = capsys.readouterr()
        assert err == ""
        return [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]

    return rows


def test_the_worst_weights_come_first_and_the_rest_is_counted(printed):
    weights = [weight(f"w{i}", error=i / 10_000) for i in range(12)]
    rows = printed(terminal.quantization, quantized(*weights))
    assert rows[0] == ["MatMuls", "grid", "K", "N", "before", "after", "output error", "input scale"]
    assert [row[0] for row in rows[1:11]] == [f"w{i}" for i in range(11, 1, -1)]
    assert rows[1][1:] == ["4 bit g32 asym", "64", "128", "32.8 kB", "5.1 kB", "3.32 %"]
    assert rows[11] == ["the 10 with the largest error of 12 are shown"]


def test_without_errors_the_first_are_shown(printed):
    rows = printed(terminal.quantization, quantized(*(weight(f"w{i}") for i in range(11))))
    assert [row[0] for row in rows[1:11]] == [f"w{i}" for i in range(10)]
    assert rows[11] == ["the 10 first of 11 are shown"]


def test_what_stays_float_and_what_it_cost(printed):
    weights = weight("[bold]q", 0.01, nodes=("[bold]q", "k", "v"), rank=16, scaling="norm")
    rows = printed(terminal.quantization, quantized(weights, TABLE, copies={"wte": 256_000}))
    assert rows[1][:2] == ["[bold]q +2", "4 bit g32 asym + rank 16"]
    assert rows[1][-2:] == ["10.00 %", "norm"]
    assert ["wte", "8 bit g64 asym", "1000", "64", "256.0 kB", "those of head"] in rows
    assert rows[-7:] == [
        ["2 left float: both inputs are computed"],
        ["1 left float: an embedding"],
        ["256.0 kB of wte stay float as well: something else in the model reads them"],
        ["4.0 MB → 1.0 MB (25.0 %)"],
        ["56 % of the bytes stay float: Gather 50 %, weights that are quantized as well 6 %"],
        ["q.onnx in 2.5 s"],
        ["what it cost: onnx-woq evaluate q.onnx --reference m.onnx --data …"],
    ]


def test_an_inspection_lists_every_node_with_its_reason(printed):
    rows = printed(terminal.inspection, inspected(weight("q", nodes=("q", "k"))))
    assert rows[1][0] == "q, k"
    assert ["s1", "MatMul", "both inputs are computed"] in rows
    assert ["gather", "Gather", "2.0 MB", "an embedding"] in rows


def test_a_row_for_every_configuration(printed):
    rows = {row[0]: row for row in printed(terminal.tuning, tuned())}
    assert rows["float"] == ["float", "0", "2.0 MB", "100.0 %"]
    assert rows["good"] == ["good", "0.01", "within", "500.0 kB", "25.0 %", "1.2", "chosen"]
    assert rows["bad"] == ["bad", "0.5", "outside", "500.0 kB", "25.0 %", "1.2", "resumed"]
    assert rows["lost"][2] == "dropped out"
    assert rows["broken"] == ["broken", "failed", "1.2", "RuntimeError: [no] memory"]
    assert rows["odd"][1] == "no number"
    assert ["accepted: at most 0.05; all tried; 9.0 s in all"] in rows.values()


@pytest.mark.parametrize(
    ("result", "end"),
    [
        (tuned(), "good is within the tolerance: out.onnx"),
        (tuned(met=False), "no configuration is within the tolerance; the best so far, good: out.onnx"),
        (tuned(best=None), "no configuration gave a model: nothing was written"),
        (mixed(), "good: out.onnx"),
        (mixed(met=False), "no mix is within it for sure; the best so far, good: out.onnx"),
        (mixed(best=None, met=False), "no mix could be made within it: nothing was written"),
    ],
)
def test_the_last_line_is_the_answer(result, end, printed):
    assert printed(terminal.tuning, result)[-1] == [end]


def test_a_mix_says_what_became_of_each_layer(printed):
    rows = printed(terminal.tuning, mixed())
    assert rows[1] == ["q +2", "3 bit g64 asym", "3.00", "4.6 kB", "90.0 %"]
    assert rows[2] == ["head", "float", "32.00", "25.6 kB", "10.0 %"]
    assert ["good", "500.0 kB", "25.0 %", "4.25", "0.01 ± 0.002", "0.012", "chosen"] in rows
    assert ["bad", "500.0 kB", "25.0 %", "4.50", "0.5", "resumed"] in rows
    assert ["asked for: at most 4.25 bits per weight; all tried; 9.0 s in all"] in rows


def test_names_are_no_markup(printed):
    name = "[red]x[/red] [link=https://a]"
    rows = printed(terminal.tuning, tuned(trials=(*TRIALS, trial(name, 1.0))))
    assert [name] == [row[0] for row in rows if row[0].startswith("[red]")]
    assert printed(terminal.inspection, inspected(replace(weight("q"), nodes=(name,), spec=Spec(2, -1))))[1][0] == name


def test_rows_stay_whole_where_nobody_looks(printed):
    name = "/".join(["layer"] * 60)
    assert printed(terminal.inspection, inspected(weight(name)))[1][0] == name


@pytest.mark.parametrize(
    ("metrics", "rows"),
    [
        (
            Metrics("lm", 100, kl=0.0123, kl_se=0.00045, top1=0.987, ppl=12.3456, ppl_ref=12.0),
            [["mean KL divergence, nats/token", "0.0123 ± 0.0004"], ["same top-1 token", "98.70 %"],
             ["perplexity, float", "12.000"], ["perplexity, quantized", "12.346"], ["tokens", "100"]],
        ),
        (
            Metrics("other", 7, sqnr_db=float("inf"), cosine=None),
            [["output SQNR", "inf dB"], ["cosine to the float output", "nan"], ["rows", "7"]],
        ),
    ],
)  # fmt: skip
def test_measures_of_both_kinds_of_models(metrics, rows, printed):
    assert printed(terminal.evaluation, metrics)[1:] == rows
