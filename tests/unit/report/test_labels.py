"""Words and units for people."""

from __future__ import annotations

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.report.labels import METRICS, error_measure, outcome, size, spec_name


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12.3 kB"), (999_949, "999.9 kB"),
        (1_000_000, "1.0 MB"), (135_600_000, "135.6 MB"), (4_000_000_000, "4.00 GB"), (7e12, "7000.00 GB"),
        (-1500, "-1.5 kB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Spec(4, 32), "4 bit g32 asym"),
        (Spec(8, -1, True), "8 bit per channel sym"),
        (Spec(3, 64, True, 0), "3 bit g64 of outputs sym"),
    ],
)
def test_number_formats_are_told_apart(spec, text):
    assert spec_name(spec) == text


@pytest.mark.parametrize(
    ("trial", "text"),
    [
        (("ok", False, "within"), "within"), (("ok", True, "outside"), "dropped out"), (("ok", False, ""), ""),
        (("failed", False, ""), "failed"), (("failed", True, "within"), "failed"), (("nan", False, ""), "no number"),
    ],
)  # fmt: skip
def test_the_outcome_of_a_trial(trial, text):
    assert outcome(*trial) == text


def test_the_error_that_is_known_is_shown_that_of_outputs_first():
    row = {"error": None, "weight_error": None}
    assert error_measure([row, row]) == ("bits per weight", "")
    assert error_measure([row, row | {"weight_error": 0.0}]) == ("weight error", "weight_error")
    assert error_measure([row | {"weight_error": 0.1}, row | {"error": 0.0}]) == ("output error", "error")
    assert error_measure([]) == ("bits per weight", "")


def test_every_metric_of_a_result_has_its_labels():
    assert set(METRICS) == {"kl", "sqnr_db", "eval_fn"}
    assert all(all(vars(labels).values()) for labels in METRICS.values())
