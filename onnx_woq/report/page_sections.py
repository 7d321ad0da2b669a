"""Sections of the report's page, as HTML."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from onnx_woq.core.spec import Spec
from onnx_woq.report import charts
from onnx_woq.report.labels import METRICS, error_measure, outcome, size, spec_name

WORST = 10
"""Weights with the largest errors that are listed before all others."""


_SPEC_FIELDS = ("bits", "group_size", "symmetric", "group_dim")  # the last one came after version 0.1


def sections(found: dict[str, Any]) -> Iterator[str]:
    """Yields the sections of the page as HTML.

    Args:
        found: what `summary.summary` returns.
    """
    tuning, layers = found["tuning"], found["layers"]
    yield f"<h1>{_text(Path(found['model']).name)}</h1>"
    yield _lead(found)
    yield _facts(found)
    if tuning:
        yield "<h2>Configurations</h2>"
        yield _trials(tuning, found["bytes_before"])
        yield "<h2>Accuracy against size</h2>"
        outside = f"The float model, {size(found['bytes_before'])}, may lie outside: double-click to see all."
        note = f"Numbers are those of the table. {outside}"
        yield _chart(charts.frontier(found), "frontier", note)
        yield "<h2>Tuning history</h2>"
        yield _chart(charts.history(found), "history", "Orange: the configuration that was chosen.")
    if layers:
        name, _ = error_measure(layers)
        yield "<h2>The network, weight by weight</h2>"
        note = f"The number in a cell is bits, its colour the {name}. What reads one input is one cell."
        yield _chart(charts.network(layers), "network", note, charts.network_width(layers))
        yield _layers(layers)
    if found["worst"]:
        yield "<h2>Weights with the largest errors</h2>"
        yield '<p class="soft">Grey: the float weights. Orange: what rounding adds to them. Counts are logarithmic.</p>'
        drawn = (_chart(charts.histogram(e), f"worst{i}", _worst(e)) for i, e in enumerate(found["worst"]))
        yield f'<div class="pair">{"".join(drawn)}</div>'
    if found["embeddings"]:
        yield "<h2>Embeddings</h2>"
        yield _embeddings(found["embeddings"])
    if found["skipped"]:
        yield "<h2>Left float</h2>"
        yield _skipped(found["skipped"])
    yield "<h2>How it was made</h2>"
    yield _making(found)


def _text(value: object) -> str:
    """Escapes a value for HTML: names in a model file or a command line are not to be trusted."""
    return html.escape(str(value), quote=True)


def _chart(figure: Any, name: str, caption: str, width: int = 0) -> str:
    """Returns a chart as data that the script of the page draws.

    Args:
        figure: the plotly figure.
        name: id of its element.
        caption: text below it.
        width: pixels that it needs at least.
    """
    data = figure.to_json().replace("<", "\\u003c")
    box = f"height: {figure.layout.height}px" + (f"; min-width: {width}px" if width else "")
    label = _text(figure.layout.meta)
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f'<div class="plot" id="{name}" role="img" aria-label="{label}" style="{box}"></div></div>'
        f"<figcaption>{_text(caption)}</figcaption>"
        f'<script type="application/json" id="{name}-data">{data}</script></figure>'
    )


def _lead(found: dict[str, Any]) -> str:
    """Returns the paragraph that says what was written or chosen."""
    tuning = found["tuning"]
    if not tuning:
        return f'<p class="soft">Quantized to <code>{_text(found["output"])}</code>.</p>'
    if not tuning["best"]:
        return "<p>No configuration gave a model.</p>"
    target = tuning.get("target")
    if target:
        verdict = f"for {target}" + ("" if tuning["met"] else "; nothing is surely within it")
    else:
        verdict = "within the tolerance" if tuning["met"] else "the best so far; nothing is surely within the tolerance"
    return f"<p><b>{_text(tuning['best'])}</b> was chosen: {_text(verdict)}.</p>"


def _facts(found: dict[str, Any]) -> str:
    """Returns the cards with the most important numbers."""
    before, after, tuning = found["bytes_before"], found["bytes_after"], found["tuning"]
    facts = [(size(before), "float model")]
    if after:
        facts += [(size(after), "quantized"), (f"{100 * after / before:.1f} %", "of the float size")]
    best = next((t for t in tuning["trials"] if t["name"] == tuning["best"]), None) if tuning else None
    if best and best["metric"] is not None:
        facts.append((f"{best['metric']:.4g}", f"{_metric(tuning)}, {tuning['unit']}"))
    quantized = [row for row in found["layers"] if row["bits"] is not None]
    weights = sum(row["k"] * row["n"] for row in quantized)
    if weights:
        bits = 8 * sum(row["bytes"] for row in quantized) / weights
        facts.append((f"{bits:.2f}", "bits per quantized weight, scales included"))
    facts.append((f"{found['seconds']:.1f} s", "in all"))
    cards = (f'<div class="fact"><b>{_text(b)}</b><span>{_text(s)}</span></div>' for b, s in facts)
    return f'<div class="facts">{"".join(cards)}</div>'


def _metric(tuning: dict[str, Any]) -> str:
    """Returns the name of the metric of a tuning run."""
    return METRICS[tuning["metric"]].name


def _table(caption: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Returns a table.

    Args:
        caption: its title, for people who cannot see it.
        columns: names of the columns; one that begins with ">" is right-aligned, one with "*" may break lines.
        rows: the class and the cells of each row, as HTML.
    """
    kinds = [f' class="{ {">": "number", "*": "name"}.get(column[:1], "short") }"' for column in columns]
    names = [column.lstrip(">*") for column in columns]
    head = "".join(f'<th scope="col"{k}>{_text(name)}</th>' for name, k in zip(names, kinds, strict=True))
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td{k}>{cell}</td>" for cell, k in zip(cells, kinds, strict=True)) + "</tr>"
        for kind, cells in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(caption)}"><table><caption>{_text(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _trials(tuning: dict[str, Any], float_bytes: int) -> str:
    """Returns the table of the configurations that were tried."""
    baseline = "" if tuning["baseline"] is None else f"{tuning['baseline']:.4g}"
    rows = [("", ["", "float", _text(baseline), "", _text(size(float_bytes)), "100.0 %", "", ""])]
    for number, trial in enumerate(tuning["trials"], 1):
        result = outcome(trial["status"], trial["dropped"], str(trial["verdict"]))
        error, chosen = trial["standard_error"], trial["name"] == tuning["best"]
        metric = "" if trial["metric"] is None else f"{trial['metric']:.4g}"
        spread = f" ± {error:.2g}" if error is not None and tuning["metric"] == "kl" else ""
        notes = ["chosen" if chosen else "", "resumed" if trial["resumed"] else "", trial["error"]]
        cells = [
            str(number),
            _text(trial["name"]),
            _text(metric + spread),
            f'<span class="{_text((result.split() or [""])[0])}">{_text(result)}</span>',
            _text("" if trial["bytes"] is None else size(trial["bytes"])),
            _text("" if trial["bytes"] is None else f"{100 * trial['bytes'] / float_bytes:.1f} %"),
            _text(f"{trial['seconds']:.1f}"),
            _text("; ".join(filter(None, notes))),
        ]
        rows.append(("chosen" if chosen else "", cells))
    columns = (">#", "*configuration", f">{_metric(tuning)}", "verdict", ">size", ">of float", ">seconds", "*note")
    limit, why = tuning["limit"], _text(tuning["stopped"])
    relation = "at least" if tuning["higher_is_better"] else "at most"
    accepted = f"Accepted: {relation} {limit:.4g}; {why}." if limit is not None else f"{why.capitalize()}."
    return (
        _table("configurations that were tried", columns, rows)
        + f'<p class="soft">In {_text(tuning["unit"])}. {accepted}</p>'
    )


def _layers(layers: Sequence[dict[str, Any]]) -> str:
    """Returns the table of the worst weights and, behind a click, that of all weights."""
    name, key = error_measure(layers)
    known = sorted((row for row in layers if key and row[key] is not None), key=lambda row: -row[key])
    worst = _layer_table(f"largest {name}s", name, key, known[:WORST]) if known else ""
    every = _layer_table("all weights", name, key, layers)
    return worst + f"<details><summary>All {len(layers)}, in the order of the graph</summary>{every}</details>"


def _layer_table(caption: str, name: str, key: str, layers: Sequence[dict[str, Any]]) -> str:
    """Returns a table of some weights with the error `key`, labelled `name`."""
    rows = []
    for row in layers:
        more = f" +{len(row['sites']) - 1}" if len(row["sites"]) > 1 else ""
        spec = None if row["bits"] is None else Spec(*(row.get(name, 1) for name in _SPEC_FIELDS))
        grid = spec_name(spec) if spec else "float"
        error = f"{100 * row[key] ** 0.5:.2f} %" if key and row[key] is not None else ""
        cells = [f"{row['k']} × {row['n']}", size(row["bytes"]), error]
        rows.append(("", [f"<code>{_text(row['name'] + more)}</code>", _text(grid), *map(_text, cells)]))
    return _table(caption, (f"*{caption}", "grid", ">shape", ">size", f">{name}" if key else ">"), rows)


def _worst(entry: dict[str, Any]) -> str:
    """Returns the caption of a histogram."""
    error = "" if entry["error"] is None else f", output error {100 * entry['error'] ** 0.5:.1f} %"
    hidden = "" if entry["rounding"] else "; an input scale is part of it, so rounding cannot be told apart"
    more = f" +{len(entry['sites']) - 1}" if len(entry["sites"]) > 1 else ""
    return f"{entry['name']}{more}: {entry['bits']} bits{error}{hidden}"


def _embeddings(tables: Sequence[dict[str, Any]]) -> str:
    """Returns the table of embeddings."""
    rows = []
    for table in tables:
        codes = f"those of {table['shared_with']}" if table["shared_with"] else "its own"
        bytes_of = (size(table[key]) if table[key] else "" for key in ("bytes_before", "bytes_after"))
        cells = [spec_name(Spec(**table["spec"])), f"{table['rows']} × {table['columns']}", *bytes_of]
        name = f"<code>{_text(table['weight_name'])}</code>"
        rows.append(("", [name, *map(_text, cells), f"<code>{_text(codes)}</code>"]))
    return _table("embeddings", ("*table", "grid", ">shape", ">before", ">after", "*codes"), rows)


def _skipped(skipped: Sequence[dict[str, Any]]) -> str:
    """Returns the numbers of nodes left float by reason and, behind a click, the table of these nodes."""
    counts = Counter(node["reason"] for node in skipped).most_common()
    lines = "".join(f"<p>{count} × {_text(reason)}</p>" for reason, count in counts)
    rows = [
        (
            "",
            [
                f"<code>{_text(node['node_name'] or node['name'])}</code>",
                _text(node["op_type"]),
                _text(size(node["weight_bytes"]) if node["weight_bytes"] else ""),
                _text(node["reason"]),
            ],
        )
        for node in skipped
    ]
    table = _table("nodes left float", ("*node", "operator", ">weight", "*why"), rows)
    return f"{lines}<details><summary>Which</summary>{table}</details>"


def _making(found: dict[str, Any]) -> str:
    """Returns the table of versions, hashes and the command, and the recipe."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        ("model", found["model"]),
        ("hash of the model", found["source"]),
        ("written", found["output"] or "nothing"),
    ]
    lines += [("command", found["command"])] if found["command"] else []
    lines += [("hash of the calibration data", found["calibration"] or "none")]
    lines += [("made with", versions), ("needs onnxruntime", found["needs_onnxruntime"])]
    rows = [("", [_text(name), f"<code>{_text(value)}</code>"]) for name, value in lines if value]
    recipe = json.dumps(found["recipe"], indent=2) if found["recipe"] else "none"
    table = _table("how it was made", ("", "*"), rows)
    return f"{table}<details><summary>Recipe</summary><pre>{_text(recipe)}</pre></details>"
