"""The picture of a frontier: refused before the work where it cannot be drawn, and drawn from the numbers."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from math import inf, nan

import pytest

from onnx_woq.errors import OutputError, RecipeError
from onnx_woq.report.frontier_plot import check_picture, draw_frontier
from tests.unit.report.results import POINTS, mixed


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """A function that draws a result and returns matplotlib's axes."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: kept.append(self) or save(self, path))

    def drawn(result):
        draw_frontier(result, tmp_path / "f.png")
        return kept[-1].axes[0]

    return drawn


def points_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("f.docx", RecipeError, "no picture has this ending, choose one of .*png"),
        ("f", RecipeError, "no picture has this ending"),
        ("nowhere/f.png", OutputError, "nowhere does not exist: create it first"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name, error, message, tmp_path):
    with pytest.raises(error, match=message):
        check_picture(tmp_path / name)
    assert check_picture(tmp_path / "F.SVG") == tmp_path / "F.SVG"


def test_without_matplotlib_the_way_to_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(RecipeError, match=r"onnx-woq\[plot\]"):
        check_picture(tmp_path / "f.png")


def test_the_picture_holds_what_was_predicted_and_what_was_measured(axes):
    drawn = axes(mixed())
    lines = points_of(drawn)
    assert lines["mixes, predicted"] == [(0.4, 0.4), (0.6, 0.004)]
    chosen = [label for label in lines if label.startswith("chosen: 0.5 MB, 4.25 bits per weight")]
    assert [lines[label] for label in chosen] == [[(0.5, 0.01)]]
    bars = {container.get_label(): container.lines[0].get_data() for container in drawn.containers}
    assert {label: [tuple(v) for v in data] for label, data in bars.items()} == {
        "mixes, measured ± standard error": [(0.5,), (0.01,)], "bad": [(0.5,), (0.5,)]
    }  # fmt: skip
    assert drawn.get_yscale() == "log"
    assert "accepted" in lines
    low, high = drawn.get_ylim()
    assert low < 0.01 < 0.5 < high


@pytest.mark.parametrize("limit", [inf, -inf, nan])
def test_without_a_limit_there_is_no_line_for_it(limit, axes):
    assert "accepted" not in points_of(axes(mixed(limit=limit)))


def test_without_losses_above_zero_predictions_are_drawn_alone(axes):
    """A logarithmic axis has no place for zero."""
    for points in (POINTS[:2], (*POINTS[:2], *(replace(point, measured=0.0) for point in POINTS[2:]))):
        drawn = axes(replace(mixed(), frontier=points))
        assert not drawn.containers
        assert list(points_of(drawn)) == ["mixes, predicted"]


def test_where_nothing_was_measured_the_picture_says_so(axes):
    drawn = axes(replace(mixed(limit=inf), frontier=()))
    assert [text.get_text() for text in drawn.texts] == ["nothing was measured"]


def test_the_ending_says_the_kind_of_file(tmp_path):
    draw_frontier(mixed(), tmp_path / "f.svg")
    assert ET.parse(tmp_path / "f.svg").getroot().tag.endswith("svg")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "f.png").mkdir()
    with pytest.raises(OutputError, match=r"f\.png cannot be written"):
        draw_frontier(mixed(), tmp_path / "f.png")
