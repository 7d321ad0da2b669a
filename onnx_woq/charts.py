"""The charts of a report, as plotly figures without colours of their own for text and ground: the page sets these."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, GREY = "#3b76c4", "#e07b1a", "#2a9d68", "#8a96a6"

RECOLOUR = """
function recolour() {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const ink = dark ? '#e7ecf3' : '#1c2430', line = dark ? '#303a47' : '#d9dee6';
  document.querySelectorAll('.js-plotly-plot').forEach(plot => {
    const set = {'font.color': ink};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key))) {
      set[axis + '.gridcolor'] = line; set[axis + '.zerolinecolor'] = line; set[axis + '.linecolor'] = line;
    }
    Plotly.relayout(plot, set);
  });
}
addEventListener('load', recolour);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);
"""


def frontier(found: dict[str, Any]) -> go.Figure:
    """What was measured against bytes; the predicted frontier of a mix where there is one, and what was chosen."""
    tuning = found["tuning"]
    figure = _figure(f"{tuning['metric']} against size of every configuration", 430)
    points = (tuning.get("frontier") or []) if tuning["metric"] == "kl" else []  # predictions are losses
    if predicted := [point for point in points if point["predicted"] is not None and point["kind"] == "mix"]:
        figure.add_scatter(
            x=[point["bytes"] / 1e6 for point in predicted],
            y=[point["predicted"] for point in predicted],
            mode="lines",
            name="predicted mixes",
            line={"color": GREY, "dash": "dot"},
        )
    trials = [trial for trial in tuning["trials"] if trial["metric"] is not None and trial["bytes"]]
    figure.add_scatter(
        x=[trial["bytes"] / 1e6 for trial in trials],
        y=[trial["metric"] for trial in trials],
        error_y={
            "type": "data",
            "array": [trial["standard_error"] or 0 for trial in trials] if tuning["metric"] == "kl" else None,
            "color": GREY,
        },
        mode="markers+text",
        text=[_label(trial["name"]) for trial in trials],
        textposition="top center",
        cliponaxis=False,
        name="measured",
        marker={"size": 10, "color": BLUE},
    )
    if chosen := [trial for trial in trials if trial["name"] == tuning["best"]]:
        figure.add_scatter(
            x=[chosen[0]["bytes"] / 1e6],
            y=[chosen[0]["metric"]],
            mode="markers",
            name="chosen",
            marker={"size": 17, "color": "rgba(0,0,0,0)", "line": {"color": ORANGE, "width": 3}},
        )
    if tuning["limit"] is not None:
        figure.add_hline(tuning["limit"], line={"color": GREEN, "dash": "dash"}, annotation_text="limit")
    values = [trial["metric"] for trial in trials]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        figure.update_yaxes(type="log")
    sizes = [trial["bytes"] / 1e6 for trial in trials]
    if sizes:  # room for the names
        room = 0.12 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
        figure.update_xaxes(range=[min(sizes) - room, max(sizes) + room])
    figure.update_xaxes(title="MB on disk")
    figure.update_yaxes(title=f"{tuning['metric']}, {tuning['unit']}")
    return figure


def history(found: dict[str, Any]) -> go.Figure:
    """Trial by trial: the metric, and the seconds that went into it."""
    tuning = found["tuning"]
    trials = tuning["trials"]
    names = [f"{number}. {_label(trial['name'])}" for number, trial in enumerate(trials, 1)]
    figure = _figure("metric and seconds, trial by trial", 380)
    seconds = [trial["seconds"] for trial in trials]
    figure.add_bar(x=names, y=seconds, name="seconds", marker={"color": GREY}, opacity=0.35, yaxis="y2")
    colours = [GREEN if trial["met"] else ORANGE for trial in trials]
    figure.add_scatter(
        x=names,
        y=[trial["metric"] for trial in trials],
        mode="lines+markers",
        name=tuning["metric"],
        line={"color": BLUE},
        marker={"size": 11, "color": colours},
    )
    if tuning["limit"] is not None:
        figure.add_hline(tuning["limit"], line={"color": GREEN, "dash": "dash"}, annotation_text="limit")
    figure.update_layout(
        yaxis={"title": f"{tuning['metric']}, {tuning['unit']}"},
        yaxis2={
            "title": "seconds",
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "rangemode": "tozero",
            "nticks": 5,
            "tickformat": ".3~g",
        },
    )
    return figure


def network(layers: Sequence[dict[str, Any]]) -> go.Figure:
    """Layers from left to right, kinds of weights from top to bottom: colour is output error, the number bits."""
    kinds = list(dict.fromkeys(row["kind"] for row in layers))
    numbers = sorted({row["layer"] for row in layers if row["layer"] is not None})
    columns = [*numbers, None] if any(row["layer"] is None for row in layers) else numbers
    at = {(row["kind"], row["layer"]): row for row in layers}
    cells = [[at.get((kind, column)) for column in columns] for kind in kinds]
    share = lambda row: None if row is None or row["error"] is None else 100 * row["error"] ** 0.5  # noqa: E731
    errors = [[share(row) for row in line] for line in cells]
    known = any(value is not None for line in errors for value in line)
    bits = [[None if row is None else 8 * row["bytes"] / (row["k"] * row["n"]) for row in line] for line in cells]
    figure = _figure("bits and output error of every weight", 140 + 46 * len(kinds))
    figure.add_heatmap(
        z=errors if known else bits,
        x=["other" if column is None else str(column) for column in columns],
        y=[_short(kind) for kind in kinds],
        text=[["" if row is None else str(row["bits"]) for row in line] for line in cells],
        texttemplate="%{text}",
        customdata=[["" if row is None else _hover(row) for row in line] for line in cells],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale="YlOrRd",
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "output error, %" if known else "bits"}, "thickness": 12},
    )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_layout(width=max(640, 300 + 26 * len(columns)) if len(columns) > 30 else None)
    return figure


def histogram(entry: dict[str, Any]) -> go.Figure:
    """A weight, and what rounding adds to it."""
    figure = _figure(f"histogram of {entry['name']}", 260)
    for name, part, colour in (("weight", entry["weight"], GREY), ("rounding", entry["rounding"], ORANGE)):
        if part is None:
            continue
        middles = [(a + b) / 2 for a, b in zip(part["edges"], part["edges"][1:], strict=False)]
        figure.add_bar(
            x=middles, y=part["counts"], name=f"{name}, rms {part['rms']:.3g}", marker={"color": colour}, opacity=0.65,
            width=part["edges"][1] - part["edges"][0],
        )  # fmt: skip
    error = "" if entry["error"] is None else f", error {100 * entry['error'] ** 0.5:.1f} %"
    where = "" if entry["layer"] is None else f", layer {entry['layer']}"
    figure.update_layout(
        barmode="overlay",
        bargap=0,
        title={"text": f"{_short(entry['kind'])}{where}: {entry['bits']} bits{error}", "font": {"size": 13}},
        legend={"orientation": "h", "y": -0.25},
        margin={"t": 40},
    )
    figure.update_yaxes(type="log")
    return figure


def _figure(meaning: str, height: int) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        meta=meaning,
        height=height,
        margin={"l": 60, "r": 30, "t": 30, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="closest",
        legend={"orientation": "h", "y": 1.08},
    )
    figure.update_xaxes(automargin=True, gridcolor="#d9dee6", zerolinecolor="#d9dee6")
    figure.update_yaxes(automargin=True, gridcolor="#d9dee6", zerolinecolor="#d9dee6")
    return figure


def _label(name: str) -> str:
    """A name for a chart: plotly reads text as HTML of its own."""
    return html.escape(name if len(name) <= 40 else f"{name[:38]}…", quote=True)


def _short(kind: str) -> str:
    """What tells a kind of weight apart: the last part of its name that is not an operator's or an output's."""
    dull = {"MatMul", "Gemm", "output_0", "MatMul_output_0", "Gemm_output_0", "model", "#"}
    parts = [part for part in kind.replace(".", "/").split("/") if part and part not in dull]
    return _label("/".join(parts[-2:]) or kind)


def _hover(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f"<br>output error {100 * row['error'] ** 0.5:.2f} %"
    more = f" and {len(row['sites']) - 1} more" if len(row["sites"]) > 1 else ""
    grid = f"{row['bits']} bits, groups of {row['group_size']}, {'symmetric' if row['symmetric'] else 'asymmetric'}"
    return f"{_label(row['name'])}{more}<br>{row['k']} × {row['n']}, {grid}{error}"
