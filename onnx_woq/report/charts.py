"""Charts of a report as plotly figures. The page sets the colours of text and background.

Arguments named `found` are what `summary.summary` returns, `layers` its rows of weights, `tuning` its tuning run.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from onnx_woq.report.labels import METRICS, error_measure, outcome
from onnx_woq.report.layer_names import short_names

BLUE, ORANGE, GREEN, GREY = "#3b76c4", "#e07b1a", "#2a9d68", "#8a96a6"
FLOAT = "#aab4c1"  # the colour of weights that stay float

_VERDICTS = {
    "within": ("circle", GREEN),
    "outside": ("x", ORANGE),
    "undecided": ("diamond", BLUE),
    "dropped out": ("circle-open", GREY),
    "": ("circle", BLUE),
}
_LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": ".2~g"}
_APART = 12  # weights outside any layer up to which each gets a row of its own; more of them share rows
_ABREAST = 16  # cells of such a shared row, at least


def _outcome(trial: dict[str, Any]) -> str:
    """Returns a word or two for the outcome of a trial."""
    return outcome(trial["status"], trial["dropped"], str(trial["verdict"]))


def frontier(found: dict[str, Any]) -> go.Figure:
    """Draws the metric of configurations against its bytes, the chosen one, and the predicted frontier of mixes"""
    tuning = found["tuning"]
    figure = _figure(f"{METRICS[tuning['metric']].name} against size of every configuration", 430)
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
        if some := [(number, trial) for number, trial in numbered if _outcome(trial) == kind]:
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
    figure.update_yaxes(title=f"{METRICS[tuning['metric']].name}, {tuning['unit']}")
    return figure


def _measured(numbered: Sequence[tuple[int, dict[str, Any]]], tuning: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a scatter plot of some numbered trials."""
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
    """Sets the axes around the measured trials, and draws the float model, which mostly lies far outside."""
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
    """Draws metric, bytes and seconds of each trial, one below the other."""
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
            "symbol": [_VERDICTS.get(_outcome(trial), _VERDICTS[""])[0] for trial in trials],
            "color": [_VERDICTS.get(_outcome(trial), _VERDICTS[""])[1] for trial in trials],
        },
        customdata=[f"{name}<br>{html.escape(_outcome(trial))}" for name, trial in zip(names, trials, strict=True)],
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
    """Draws layers from left to right and kinds of weights from top to bottom; colours are errors, numbers are bits."""
    kinds, columns, at = _grid(layers)
    cells = [[at.get((row, column)) for column in range(len(columns))] for row in range(len(kinds))]
    name, key = error_measure(layers)
    tall = 34 if len(kinds) <= 16 else 24 if len(kinds) <= 40 else 15
    figure = _figure(f"bits and {name} of every weight", 150 + tall * len(kinds))
    _quantized_cells(figure, cells, name, key)
    _float_cells(figure, cells)
    _network_axes(figure, kinds, columns)
    return figure


_Cells = list[list[dict[str, Any] | None]]
"""Rows of layers, by kind and column of the picture of a network; None for an empty cell."""


def _heat_map(figure: go.Figure, cells: _Cells, **style: Any) -> None:
    """Adds a heat map of some cells; `style` are the arguments that are its own."""
    figure.add_heatmap(
        customdata=[["" if cell is None else _hover(cell) for cell in line] for line in cells],
        x=list(range(len(cells[0]) if cells else 0)),
        y=list(range(len(cells))),
        xgap=2,
        ygap=2,
        texttemplate="%{text}",
        hoverongaps=False,
        hovertemplate="%{customdata}<extra></extra>",
        **style,
    )


def _quantized_cells(figure: go.Figure, cells: _Cells, name: str, key: str) -> None:
    """Adds the cells of quantized weights, coloured by their errors, or by their bits if no error is known."""
    quantized = [[None if cell is None or cell["bits"] is None else cell for cell in line] for line in cells]
    values = [[None if cell is None else _value(cell, key) for cell in line] for line in quantized]
    known = [value for line in values for value in line if value is not None]
    _heat_map(
        figure,
        quantized,
        z=values,
        text=[["" if cell is None else str(cell["bits"]) for cell in line] for line in quantized],
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
    )


def _float_cells(figure: go.Figure, cells: _Cells) -> None:
    """Adds the cells of weights that stay float, if there are any."""
    left = [[cell if cell is not None and cell["bits"] is None else None for cell in line] for line in cells]
    if any(cell for line in left for cell in line):
        _heat_map(
            figure,
            left,
            z=[[None if cell is None else 1 for cell in line] for line in left],
            text=[["" if cell is None else "float" for cell in line] for line in left],
            colorscale=[[0, FLOAT], [1, FLOAT]],
            showscale=False,
        )


def _network_axes(figure: go.Figure, kinds: Sequence[str], columns: Sequence[str]) -> None:
    """Labels the axes of the picture of a network, at most 40 columns of it."""
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


def network_width(layers: Sequence[dict[str, Any]]) -> int:
    """Returns the pixels that the picture of the network needs to be legible."""
    return 210 + 24 * len(_grid(layers)[1])


def _grid(
    layers: Sequence[dict[str, Any]],
) -> tuple[list[str], list[str], dict[tuple[int, int], dict[str, Any]]]:
    """Returns the labels of the rows, the labels of the columns, and the weight in each (row, column)."""
    alone = [row for row in layers if row["layer"] is None]
    numbers = sorted({row["layer"] for row in layers if row["layer"] is not None})
    kinds = list(dict.fromkeys(row["kind"] for row in layers if row["layer"] is not None))
    at = {(kinds.index(r["kind"]), numbers.index(r["layer"])): r for r in layers if r["layer"] is not None}
    columns = [str(number) for number in numbers]
    if len(alone) > _APART:
        abreast = max(len(columns), _ABREAST)
        columns += [""] * (abreast - len(columns))
        names = short_names(kinds)
        for start in range(0, len(alone), abreast):
            some = alone[start : start + abreast]
            at |= {(len(names), place): row for place, row in enumerate(some)}
            names.append(f"others, {start + 1} to {start + len(some)}")
        return names, columns, at
    if alone:
        at |= {(len(kinds) + place, len(columns)): row for place, row in enumerate(alone)}
        kinds += [row["kind"] for row in alone]
        columns.append("other" if columns else "")
    return short_names(kinds), columns, at


def _value(row: dict[str, Any], key: str) -> float | None:
    """Returns the error of a weight in percent, or its bits per weight if `key` is ""."""
    if not key:
        return float(8 * row["bytes"] / (row["k"] * row["n"]))
    return None if row[key] is None else 100 * float(row[key]) ** 0.5


def histogram(entry: dict[str, Any]) -> go.Figure:
    """Draws the histogram of a weight, and of its rounding errors.

    Args:
        entry: one of `weight_errors.histograms`.
    """
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
    """Draws the limit of the metric as a line, where there is one."""
    limit = tuning["limit"]
    if limit is None or (figure.layout.yaxis.type == "log" and limit <= 0):
        return
    across = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": limit, "y1": limit}
    figure.add_shape(type="line", line={"color": GREEN, "dash": "dash", "width": 1.5}, **across)
    at = math.log10(limit) if figure.layout.yaxis.type == "log" else limit  # annotations take exponents, shapes do not
    text = {"text": "limit", "showarrow": False, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(xref="paper", x=1, yref="y", y=at, **text)


def _is_wide(metrics: Sequence[float]) -> bool:
    """Tells whether numbers differ so much that only a logarithmic axis tells them apart."""
    return bool(metrics) and min(metrics) > 0 and max(metrics) > 8 * min(metrics)


def _marker(symbol: str, colour: str) -> dict[str, Any]:
    """Returns the style of a marker."""
    return {"size": 11, "symbol": symbol, "color": colour}


def _figure(meaning: str, height: int) -> go.Figure:
    """Returns an empty figure, see `_plain`."""
    figure = go.Figure()
    _plain(figure, meaning, height)
    return figure


def _plain(figure: go.Figure, meaning: str, height: int) -> None:
    """Sets the common layout of all charts.

    Args:
        figure: the figure.
        meaning: the content of the chart in words, for people who cannot see it.
        height: pixels.
    """
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
    """Shortens and escapes a name for a chart, because plotly reads text as HTML."""
    return html.escape(name if len(name) <= 40 else f"{name[:38]}…", quote=True)


def _hover(row: dict[str, Any]) -> str:
    """Returns the text that is shown when the mouse is over a weight."""
    more = f" and {len(row['sites']) - 1} more" if len(row["sites"]) > 1 else ""
    name = f"{_label(row['name'])}{more}<br>{row['k']} × {row['n']}"
    if row["bits"] is None:
        return f"{name}, float"
    grid = f"{row['bits']} bits, groups of {row['group_size']}, {'symmetric' if row['symmetric'] else 'asymmetric'}"
    known = [("output error", row["error"]), ("weight error", row["weight_error"])]
    return f"{name}, {grid}" + "".join(f"<br>{what} {100 * e**0.5:.2f} %" for what, e in known if e is not None)
