"""Charts draw the numbers of a result, each weight once, and show names as they are."""

from __future__ import annotations

import html
import json

import pytest

from onnx_woq.report import charts
from onnx_woq.report.html_page import page
from onnx_woq.report.layer_names import layer_positions
from onnx_woq.report.summary import summary


@pytest.mark.parametrize(
    "names",
    [
        [f"l{i}.{kind}" for i in range(30) for kind in ("q", "k", "v", "o", "up", "down")] + ["head"],
        [f"encoder{'x' * i}" for i in range(400)],
        [f"{side}.{i}.o" for side in ("a.fc", "b.fc") for i in range(3)],
        ["a", "b", "c", "d"],
    ],
    ids=["layers", "all different", "same ends", "four"],
)
def test_every_weight_has_a_cell_of_its_own(names):
    rows = [
        {"name": n, "sites": [n], "k": 8, "n": 8, "bytes": 8, "bits": 4, "group_size": 32, "symmetric": False}
        | {"error": (i + 1) / 1000, "weight_error": None, "layer": layer, "kind": kind}
        for i, (n, (layer, kind)) in enumerate(zip(names, layer_positions(names), strict=True))
    ]
    (heat,) = charts.network(rows).data
    shown = [value for line in heat.z for value in line if value is not None]
    assert sorted(shown) == pytest.approx([100 * row["error"] ** 0.5 for row in rows])
    assert [text for line in heat.text for text in line if text] == ["4"] * len(rows)
    assert len(heat.y) <= 30


def test_the_frontier_shows_trials_predictions_the_choice_and_the_float_model(mixed, decoder):
    found = summary(mixed)
    assert found["tuning"]["frontier"] == json.loads(json.dumps([point.to_dict() for point in mixed.frontier]))
    drawn = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in charts.frontier(found).data}
    measured = {(t.bytes / 1e6, t.metric) for t in mixed.trials}
    assert {point for name in ("within", "outside", "undecided") for point in drawn.get(name, ())} == measured
    assert drawn[f"chosen: {mixed.best.name}"] == [(mixed.best.bytes / 1e6, mixed.best.metric)]
    assert drawn["float model"] == [(decoder.stat().st_size / 1e6, 0)]
    assert len(drawn["predicted mixes"]) > 5
    assert mixed.target in page(found)


def test_histories_show_what_each_trial_took(tuned):
    points, sizes, seconds = charts.history(summary(tuned)).data
    assert list(points.y) == [trial.metric for trial in tuned.trials]
    assert list(sizes.y) == [trial.bytes / 1e6 for trial in tuned.trials]
    assert list(seconds.y) == [trial.seconds for trial in tuned.trials]


def test_names_in_charts_are_shown_as_they_are():
    name = "<a href='https://x'>q</a>"
    row = {"name": name, "sites": [name], "k": 8, "n": 8, "bytes": 8, "bits": 4, "group_size": 32, "symmetric": True}
    figure = charts.network([row | {"error": 0.1, "weight_error": None, "layer": None, "kind": name}])
    assert not [text for text in (*figure.layout.yaxis.ticktext, *figure.data[0].customdata[0]) if "<a" in text]
    assert html.unescape(figure.data[0].customdata[0][0]).startswith(name)


def weight(name, layer, **more):
    row = {"name": name, "sites": [name], "k": 8, "n": 8, "bytes": 32, "bits": 4, "group_size": 32, "symmetric": True}
    return row | {"error": None, "weight_error": None, "layer": layer, "kind": name} | more


def test_weights_that_stay_float_are_cells_of_their_own_colour():
    left = weight("b", 0, bits=None, bytes=256)
    quantized, floats = charts.network([weight("a", 0), left, weight("a", 1)]).data
    assert [list(line) for line in quantized.z] == [[4.0, 4.0], [None, None]]
    assert [text for line in floats.text for text in line] == ["", "", "float", ""]
    assert len(charts.network([weight("a", 0)]).data) == 1


def test_a_picture_of_more_layers_is_wider():
    few, many = ([weight("a", i) for i in range(count)] for count in (2, 50))
    assert charts.network_width(many) - charts.network_width(few) == 48 * 24


@pytest.mark.parametrize("rounding", [None, {"edges": [-1, 0, 1], "counts": [1, 2], "rms": 0.25}])
def test_a_histogram_has_its_bars_in_the_middle_of_the_bins(rounding):
    part = {"edges": [0.0, 0.5, 1.0], "counts": [3, 0], "rms": 0.5}
    bars = charts.histogram({"name": "w", "weight": part, "rounding": rounding}).data
    assert [bar.name for bar in bars] == ["weight, rms 0.5", "rounding, rms 0.25"][: 1 + (rounding is not None)]
    assert (bars[0].x, bars[0].y, bars[0].width) == ((0.25, 0.75), (3, 0), 0.5)
