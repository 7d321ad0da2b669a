"""The report of a run: one HTML page that needs nothing else, or the same content as JSON.

Charts are plotly's, whose script is part of the page. Everything that comes from a model or a command line is escaped:
names in a model file are not to be trusted.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.core.spec import Spec
from onnx_woq.errors import OutputError
from onnx_woq.report.terminal import size, spec_name

if TYPE_CHECKING:
    from onnx_woq.engine.results import QuantizeReport
    from onnx_woq.tuning.results import TuneResult

SUFFIXES = (".html", ".json")
SPEC_FIELDS = ("bits", "group_size", "symmetric", "group_dim")

WORST = 10
"""Weights with the largest errors that are listed before all others."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #566273; --line: #d9dee6; --ground: #ffffff; --card: #f6f8fb;
  --good: #1a7f4b; --bad: #a84c05; --mark: #fdf3e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ecf3; --soft: #9aa7b8; --line: #303a47; --ground: #12171e;
  --card: #1a212b; --good: #5fd49a; --bad: #f0a35e; --mark: #2b2417; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
p { margin: .3rem 0; max-width: 46rem; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.fact b { display: block; font-size: 1.25rem; } .fact span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.wide:focus-visible { outline: 2px solid var(--good); }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 9rem; } td.short { white-space: nowrap; }
tr.chosen td { font-weight: 600; background: var(--mark); } .within { color: var(--good); }
.outside, .failed, .no { color: var(--bad); }
code, pre { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  white-space: pre-wrap; }
summary { cursor: pointer; padding: .4rem 0; } figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; color: var(--soft); overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.4rem 1rem; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --card: #fff; --good: #1a7f4b;
  --bad: #a84c05; --mark: #eee; } main { padding: 0; max-width: none; } .wide { overflow: visible; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

# Charts are data until the page is there, so that each knows the room it has. On paper it is always light.
_DRAW = """
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const plots = [];
  function coloured(layout, night) {
    const line = night ? '#303a47' : '#d9dee6';
    layout.font.color = night ? '#e7ecf3' : '#1c2430';
    for (const name of Object.keys(layout).filter(name => /^[xy]axis/.test(name)))
      Object.assign(layout[name], {gridcolor: line, zerolinecolor: line, linecolor: line});
    return layout;
  }
  function draw(night) {
    for (const [plot, figure] of plots)
      Plotly.react(plot, figure.data, coloured(structuredClone(figure.layout), night),
        {displayModeBar: false, responsive: true});
  }
  for (const plot of document.querySelectorAll('.plot'))
    plots.push([plot, JSON.parse(document.getElementById(plot.id + '-data').textContent)]);
  draw(dark.matches);
  dark.addEventListener('change', () => draw(dark.matches));
  addEventListener('beforeprint', () => draw(false));
  addEventListener('afterprint', () => draw(dark.matches));
})();
"""


def check_report(path: Path) -> None:
    """Refuses a report that could not be written, before the work begins.

    Raises:
        OutputError: its name has another ending, or what draws the charts is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"--report {path}: name it .html for a page or .json for its content")
    if path.suffix.lower() == ".html" and find_spec("plotly") is None:
        raise OutputError("a report in HTML needs plotly: pip install 'onnx-woq[report]', or name it .json")
    if path.is_dir():
        raise OutputError(f"--report {path} is a folder: name a file in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"--report {path}: nothing can be written in {above}, name a file elsewhere")


def write_report(
    result: QuantizeReport | TuneResult, path: str | Path, *, model: str | Path | None = None, command: str = ""
) -> Path:
    """Writes what a run did to `path`: a self-contained page (.html), or the same content as JSON (.json).

    Args:
        result: of `quantize` or `tune`; the models it speaks of must still be on the disk.
        path: is replaced if it is there.
        model: the float model, where it is no longer where it was.
        command: how the run was started, for people to read.

    Raises:
        OutputError: it cannot be written; nothing is left of it then.
    """
    from onnx_woq.report.summary import summary

    path = Path(path)
    check_report(path)
    found = summary(result, model, command)
    text = json.dumps(found, indent=1) if path.suffix.lower() == ".json" else page(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from error
    return path


def page(found: dict[str, Any]) -> str:
    """The page of what `summary` gives; nothing but its own two scripts may run in it, and nothing is fetched."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")  # as the browser reads it before it is hashed
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (library, _DRAW))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    title = _text(f"{Path(found['model']).name}, quantized")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head><body><main>'
        + "\n".join(_parts(found))
        + f"</main><script>{library}</script><script>{_DRAW}</script></body></html>"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _parts(found: dict[str, Any]) -> Iterator[str]:
    from onnx_woq.report import charts

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
        name, _ = charts.measure_of(layers)
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
    return html.escape(str(value), quote=True)


def _chart(figure: Any, name: str, caption: str, width: int = 0) -> str:
    """A chart as data, which the page's script draws; `width` in pixels is what it takes at least."""
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
    from onnx_woq.report.charts import METRICS

    return METRICS[tuning["metric"]]


def _table(caption: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Columns beginning with ">" are right-aligned, with "*" may break; rows are (class, cells already escaped)."""
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
    from onnx_woq.report.charts import verdict

    baseline = "" if tuning["baseline"] is None else f"{tuning['baseline']:.4g}"
    rows = [("", ["", "float", _text(baseline), "", _text(size(float_bytes)), "100.0 %", "", ""])]
    for number, trial in enumerate(tuning["trials"], 1):
        outcome, error, chosen = verdict(trial), trial["standard_error"], trial["name"] == tuning["best"]
        metric = "" if trial["metric"] is None else f"{trial['metric']:.4g}"
        spread = f" ± {error:.2g}" if error is not None and tuning["metric"] == "kl" else ""
        notes = ["chosen" if chosen else "", "resumed" if trial["resumed"] else "", trial["error"]]
        cells = [
            str(number),
            _text(trial["name"]),
            _text(metric + spread),
            f'<span class="{_text((outcome.split() or [""])[0])}">{_text(outcome)}</span>',
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
    """The worst weights, and behind a click all of them."""
    from onnx_woq.report.charts import measure_of

    name, key = measure_of(layers)
    known = sorted((row for row in layers if key and row[key] is not None), key=lambda row: -row[key])
    worst = _layer_table(f"largest {name}s", name, key, known[:WORST]) if known else ""
    every = _layer_table("all weights", name, key, layers)
    return worst + f"<details><summary>All {len(layers)}, in the order of the graph</summary>{every}</details>"


def _layer_table(caption: str, name: str, key: str, layers: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in layers:
        more = f" +{len(row['sites']) - 1}" if len(row["sites"]) > 1 else ""
        spec = None if row["bits"] is None else Spec(*(row.get(name, 1) for name in SPEC_FIELDS))
        grid = spec_name(spec) if spec else "float"
        error = f"{100 * row[key] ** 0.5:.2f} %" if key and row[key] is not None else ""
        cells = [f"{row['k']} × {row['n']}", size(row["bytes"]), error]
        rows.append(("", [f"<code>{_text(row['name'] + more)}</code>", _text(grid), *map(_text, cells)]))
    return _table(caption, (f"*{caption}", "grid", ">shape", ">size", f">{name}" if key else ">"), rows)


def _worst(entry: dict[str, Any]) -> str:
    error = "" if entry["error"] is None else f", output error {100 * entry['error'] ** 0.5:.1f} %"
    hidden = "" if entry["rounding"] else "; an input scale is part of it, so rounding cannot be told apart"
    more = f" +{len(entry['sites']) - 1}" if len(entry["sites"]) > 1 else ""
    return f"{entry['name']}{more}: {entry['bits']} bits{error}{hidden}"


def _embeddings(tables: Sequence[dict[str, Any]]) -> str:
    rows = []
    for table in tables:
        codes = f"those of {table['shared_with']}" if table["shared_with"] else "its own"
        bytes_of = (size(table[key]) if table[key] else "" for key in ("bytes_before", "bytes_after"))
        cells = [spec_name(Spec(**table["spec"])), f"{table['rows']} × {table['columns']}", *bytes_of]
        name = f"<code>{_text(table['weight_name'])}</code>"
        rows.append(("", [name, *map(_text, cells), f"<code>{_text(codes)}</code>"]))
    return _table("embeddings", ("*table", "grid", ">shape", ">before", ">after", "*codes"), rows)


def _skipped(skipped: Sequence[dict[str, Any]]) -> str:
    """Counts by reason, and behind a click the nodes."""
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
