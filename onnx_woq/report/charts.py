"""The charts of a report, as plotly figures without colours of their own for text and ground: the page sets these."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from onnx_woq.report.layer_names import labels

BLUE, ORANGE, GREEN, GREY = "#3b76c4", "#e07b1a", "#2a9d68", "#8a96a6"
FLOAT = "#aab4c1"  # of weights that stay float

METRICS = {"kl": "mean KL divergence", "sqnr_db": "output SQNR", "eval_fn": "your metric"}

_VERDICTS = {
    "within": ("circle", GREEN),
    "outside": ("x", ORANGE),
    "undecided": ("diamond", BLUE),
    "dropped out": ("circle-open", GREY),
    "": ("circle", BLUE),
}
_LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": ".2~g"}
_APART = 12  # weights outside any repetition that get a row each; more are laid out in rows together
_ABREAST = 16


def verdict(trial: dict[str, Any]) -> str:
    """What became of a trial, in a word or two."""
    if trial["status"] != "ok":
        return "failed" if trial["status"] == "failed" else "no number"
    return "dropped out" if trial["dropped"] else str(trial["verdict"])


def frontier(found: dict[str, Any]) -> go.Figure:
    """What was measured against bytes; the predicted frontier of a mix where there is one, and what was chosen."""
    tuning = found["tuning"]
    figure = _figure(f"{METRICS[tuning['metric']]} against size of every configuration", 430)
    points = (tuning.get("frontier") or []) if tuning["metric"] == "kl" else []  # predictions are losses
    if predicted := [point for point in points if point["predicted"] is not None and point["kind"] == "mix"]:
        figure.add_scatter(
            x=[point["bytes"] / 1e6 for point in predicted],
            y=[point["predicted"] for point in predicted],
            mode="lines",
            name="predicted mixes",
            line={"color": GREY, "dash": "dot"},
        )
    numbered = [(number, trial) for number, trial in enumerate(tuning["trials"], 1) if trial["bytes"]]
    numbered = [(number, trial) for number, trial in numbered if trial["metric"] is not None]
    for kind, (symbol, colour) in _VERDICTS.items():
        if some := [(number, trial) for number, trial in numbered if verdict(trial) == kind]:
            figure.add_scatter(**_measured(some, tuning), name=kind or "measured", marker=_marker(symbol, colour))
    if chosen := [trial for _, trial in numbered if trial["name"] == tuning["best"]]:
        figure.add_scatter(
            x=[chosen[0]["bytes"] / 1e6],
            y=[chosen[0]["metric"]],
            mode="markers",
            name=f"chosen: {_label(chosen[0]['name'])}",
            hoverinfo="skip",
            marker={"size": 20, "color": "rgba(0,0,0,0)", "line": {"color": ORANGE, "width": 3}},
        )
    _view(figure, found, [trial for _, trial in numbered])
    _limit(figure, tuning)
    figure.update_xaxes(title="MB on disk")
    figure.update_yaxes(title=f"{METRICS[tuning['metric']]}, {tuning['unit']}")
    return figure


def _measured(numbered: Sequence[tuple[int, dict[str, Any]]], tuning: dict[str, Any]) -> dict[str, Any]:
    trials = [trial for _, trial in numbered]
    spread = [trial["standard_error"] or 0 for trial in trials] if tuning["metric"] == "kl" else None
    return {
        "x": [trial["bytes"] / 1e6 for trial in trials],
        "y": [trial["metric"] for trial in trials],
        "error_y": {"type": "data", "array": spread, "color": GREY, "thickness": 1.2, "width": 3},
        "mode": "markers+text",
        "text": [f"  {number}" for number, _ in numbered],  # clear of the ring
        "textposition": "middle right",
        "hovertext": [_label(trial["name"]) for trial in trials],
        "hovertemplate": "%{hovertext}<br>%{x:.4~g} MB, %{y:.4~g}<extra></extra>",
        "cliponaxis": False,
    }


def _view(figure: go.Figure, found: dict[str, Any], trials: Sequence[dict[str, Any]]) -> None:
    """Axes around what was measured; the float model is drawn too, mostly far outside."""
    tuning, size = found["tuning"], found["bytes_before"] / 1e6
    baseline = tuning["baseline"]
    if not trials:
        return
    sizes = [trial["bytes"] / 1e6 for trial in trials]
    spread = [(trial["standard_error"] or 0) if tuning["metric"] == "kl" else 0 for trial in trials]
    lows = [trial["metric"] - error for trial, error in zip(trials, spread, strict=True)]
    highs = [trial["metric"] + error for trial, error in zip(trials, spread, strict=True)]
    limit = tuning["limit"]
    if limit is not None and abs(limit - highs[0]) < 3 * max(max(highs) - min(lows), abs(highs[0])):
        lows, highs = [*lows, limit], [*highs, limit]
    metrics = [trial["metric"] for trial in trials]
    if _is_wide(metrics):
        low, high = math.log10(min(metrics) / 1.6), math.log10(max(highs) * 1.6)
        figure.update_yaxes(range=[low, high], **_LOGARITHMIC)
    else:
        room = 0.12 * (max(highs) - min(lows)) or 0.1 * abs(highs[0]) or 1
        figure.update_yaxes(range=[min(lows) - room, max(highs) + room])
    room = 0.12 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    figure.update_xaxes(range=[min(sizes) - room, max(sizes) + 1.5 * room])
    if baseline is not None:
        figure.add_scatter(
            x=[size],
            y=[baseline],
            mode="markers",
            name="float model",
            marker=_marker("star", GREY),
            hovertemplate="float model<br>%{x:.4~g} MB, %{y:.4~g}<extra></extra>",
        )


def history(found: dict[str, Any]) -> go.Figure:
    """Trial by trial: metric, bytes and seconds, one below the other."""
    tuning = found["tuning"]
    trials = tuning["trials"]
    numbers = list(range(1, len(trials) + 1))
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, row_heights=[0.5, 0.25, 0.25], vertical_spacing=0.06)
    _plain(figure, "metric, bytes and seconds, trial by trial", 460)
    names = [_label(trial["name"]) for trial in trials]
    figure.add_scatter(
        x=numbers,
        y=[trial["metric"] for trial in trials],
        mode="lines+markers",
        line={"color": GREY, "width": 1},
        marker={
            "size": 11,
            "symbol": [_VERDICTS.get(verdict(trial), _VERDICTS[""])[0] for trial in trials],
            "color": [_VERDICTS.get(verdict(trial), _VERDICTS[""])[1] for trial in trials],
        },
        customdata=[f"{name}<br>{html.escape(verdict(trial))}" for name, trial in zip(names, trials, strict=True)],
        hovertemplate="%{customdata}<br>%{y:.4~g}<extra></extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    if _is_wide([trial["metric"] for trial in trials if trial["metric"] is not None]):
        figure.update_yaxes(row=1, col=1, **_LOGARITHMIC)
    _limit(figure, tuning)
    colours = [ORANGE if trial["name"] == tuning["best"] else BLUE for trial in trials]
    for row, values in (
        (2, [trial["bytes"] and trial["bytes"] / 1e6 for trial in trials]),
        (3, [trial["seconds"] for trial in trials]),
    ):
        figure.add_bar(
            x=numbers,
            y=values,
            marker={"color": colours},
            width=0.5,
            customdata=names,
            hovertemplate="%{customdata}<br>%{y:.4~g}<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
    figure.update_xaxes(
        range=[0.4, len(trials) + 0.6], tickmode="array", tickvals=numbers if len(trials) <= 30 else None
    )
    figure.update_xaxes(title="trial, as numbered in the table", row=3, col=1)
    figure.update_yaxes(title=tuning["unit"], row=1, col=1)
    for row, unit in ((2, "MB"), (3, "seconds")):
        figure.update_yaxes(title=unit, nticks=4, tickformat=".3~g", rangemode="tozero", row=row, col=1)
    figure.update_layout(margin={"t": 10})
    return figure


def network(layers: Sequence[dict[str, Any]]) -> go.Figure:
    """Layers from left to right, kinds of weights from top to bottom: colour is error, the number bits."""
    kinds, columns, at = _grid(layers)
    cells = [[at.get((row, column)) for column in range(len(columns))] for row in range(len(kinds))]
    name, key = measure_of(layers)
    tall = 34 if len(kinds) <= 16 else 24 if len(kinds) <= 40 else 15
    figure = _figure(f"bits and {name} of every weight", 150 + tall * len(kinds))
    quantized = [[None if cell is None or cell["bits"] is None else cell for cell in line] for line in cells]
    values = [[None if cell is None else _value(cell, key) for cell in line] for line in quantized]
    known = [value for line in values for value in line if value is not None]
    common = {"x": list(range(len(columns))), "y": list(range(len(kinds))), "xgap": 2, "ygap": 2}
    common |= {"texttemplate": "%{text}", "hoverongaps": False, "hovertemplate": "%{customdata}<extra></extra>"}
    figure.add_heatmap(
        z=values,
        text=[["" if cell is None else str(cell["bits"]) for cell in line] for line in quantized],
        customdata=[["" if cell is None else _hover(cell) for cell in line] for line in quantized],
        colorscale="YlOrRd" if key else "Blues",
        zmin=min(known, default=0) / 2,
        zmax=max(known, default=1) or 1,
        colorbar={
            "title": {"text": f"{name}, %" if key else name, "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "len": 260,
            "lenmode": "pixels",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
        },
        **common,
    )
    left = [[cell if cell is not None and cell["bits"] is None else None for cell in line] for line in cells]
    if any(cell for line in left for cell in line):
        figure.add_heatmap(
            z=[[None if cell is None else 1 for cell in line] for line in left],
            text=[["" if cell is None else "float" for cell in line] for line in left],
            customdata=[["" if cell is None else _hover(cell) for cell in line] for line in left],
            colorscale=[[0, FLOAT], [1, FLOAT]],
            showscale=False,
            **common,
        )
    step = -(-len(columns) // 40)
    ticks = [place for place, column in enumerate(columns) if place % step == 0 or column == "other"]
    numbered = any(column not in ("", "other") for column in columns)
    figure.update_xaxes(
        title={"text": "layer" if numbered else "in the order of the graph", "standoff": 26},
        tickvals=ticks,
        ticktext=[columns[place] for place in ticks],
        tickangle=0,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(kinds))),
        ticktext=[_label(kind) for kind in kinds],
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(margin={"t": 70})
    return figure


def network_width(layers: Sequence[dict[str, Any]]) -> int:
    """Pixels that the picture of the network needs to be legible."""
    return 210 + 24 * len(_grid(layers)[1])


def measure_of(layers: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What is known of the weights' errors, for people and as a key; without either it is their bits, ""."""
    for key, name in (("error", "output error"), ("weight_error", "weight error")):
        if any(row[key] is not None for row in layers):
            return name, key
    return "bits per weight", ""


def _grid(
    layers: Sequence[dict[str, Any]],
) -> tuple[list[str], list[str], dict[tuple[int, int], dict[str, Any]]]:
    """Labels of rows and columns, and what is where."""
    alone = [row for row in layers if row["layer"] is None]
    numbers = sorted({row["layer"] for row in layers if row["layer"] is not None})
    kinds = list(dict.fromkeys(row["kind"] for row in layers if row["layer"] is not None))
    at = {(kinds.index(r["kind"]), numbers.index(r["layer"])): r for r in layers if r["layer"] is not None}
    columns = [str(number) for number in numbers]
    if len(alone) > _APART:
        abreast = max(len(columns), _ABREAST)
        columns += [""] * (abreast - len(columns))
        names = labels(kinds)
        for start in range(0, len(alone), abreast):
            some = alone[start : start + abreast]
            at |= {(len(names), place): row for place, row in enumerate(some)}
            names.append(f"others, {start + 1} to {start + len(some)}")
        return names, columns, at
    if alone:
        at |= {(len(kinds) + place, len(columns)): row for place, row in enumerate(alone)}
        kinds += [row["kind"] for row in alone]
        columns.append("other" if columns else "")
    return labels(kinds), columns, at


def _value(row: dict[str, Any], key: str) -> float | None:
    if not key:
        return float(8 * row["bytes"] / (row["k"] * row["n"]))
    return None if row[key] is None else 100 * float(row[key]) ** 0.5


def histogram(entry: dict[str, Any]) -> go.Figure:
    """A weight, and what rounding adds to it."""
    figure = _figure(f"histogram of {entry['name']}", 240)
    for name, part, colour in (("weight", entry["weight"], GREY), ("rounding", entry["rounding"], ORANGE)):
        if part is None:
            continue
        middles = [(a + b) / 2 for a, b in zip(part["edges"], part["edges"][1:], strict=False)]
        figure.add_bar(
            x=middles, y=part["counts"], name=f"{name}, rms {part['rms']:.3g}", marker={"color": colour}, opacity=0.65,
            width=part["edges"][1] - part["edges"][0], hovertemplate="%{x:.3~g}: %{y}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        barmode="overlay", bargap=0, legend={"y": 1.02, "yanchor": "bottom"}, margin={"t": 30, "b": 30}, showlegend=True
    )
    figure.update_yaxes(type="log", nticks=4, dtick=1, exponentformat="power")
    return figure


def _limit(figure: go.Figure, tuning: dict[str, Any]) -> None:
    limit = tuning["limit"]
    if limit is None or (figure.layout.yaxis.type == "log" and limit <= 0):
        return
    across = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": limit, "y1": limit}
    figure.add_shape(type="line", line={"color": GREEN, "dash": "dash", "width": 1.5}, **across)
    at = math.log10(limit) if figure.layout.yaxis.type == "log" else limit  # annotations take exponents, shapes do not
    text = {"text": "limit", "showarrow": False, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(xref="paper", x=1, yref="y", y=at, **text)


def _is_wide(metrics: Sequence[float]) -> bool:
    """Whether numbers are told apart by their logarithms only."""
    return bool(metrics) and min(metrics) > 0 and max(metrics) > 8 * min(metrics)


def _marker(symbol: str, colour: str) -> dict[str, Any]:
    return {"size": 11, "symbol": symbol, "color": colour}


def _figure(meaning: str, height: int) -> go.Figure:
    figure = go.Figure()
    _plain(figure, meaning, height)
    return figure


def _plain(figure: go.Figure, meaning: str, height: int) -> None:
    figure.update_layout(
        template="none",
        meta=meaning,
        height=height,
        margin={"l": 50, "r": 20, "t": 40, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="closest",
        dragmode=False,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)


def _label(name: str) -> str:
    """A name for a chart: plotly reads text as HTML of its own."""
    return html.escape(name if len(name) <= 40 else f"{name[:38]}…", quote=True)


def _hover(row: dict[str, Any]) -> str:
    more = f" and {len(row['sites']) - 1} more" if len(row["sites"]) > 1 else ""
    name = f"{_label(row['name'])}{more}<br>{row['k']} × {row['n']}"
    if row["bits"] is None:
        return f"{name}, float"
    grid = f"{row['bits']} bits, groups of {row['group_size']}, {'symmetric' if row['symmetric'] else 'asymmetric'}"
    known = [("output error", row["error"]), ("weight error", row["weight_error"])]
    return f"{name}, {grid}" + "".join(f"<br>{what} {100 * e**0.5:.2f} %" for what, e in known if e is not None)
