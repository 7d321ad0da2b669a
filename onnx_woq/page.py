"""The report of a run: one HTML page that needs nothing else, or the same content as JSON.

Charts are plotly's, whose script is part of the page. Everything that comes from a model or a command line is escaped:
names in a model file are not to be trusted.
"""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.errors import OutputError
from onnx_woq.recipe import Spec
from onnx_woq.report import size, spec_name

if TYPE_CHECKING:
    from onnx_woq.results import QuantizeReport, TuneResult

SUFFIXES = (".html", ".json")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --ground: #ffffff; --card: #f6f8fb;
  --good: #1a7f4b; --bad: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ecf3; --soft: #9aa7b8; --line: #303a47; --ground: #12171e;
  --card: #1a212b; --good: #5fd49a; --bad: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.fact b { display: block; font-size: 1.25rem; } .fact span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.chosen td { font-weight: 600; } .within { color: var(--good); } .outside, .failed { color: var(--bad); }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } pre { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.pair > figure { min-width: 0; }
@media print { h2 { break-after: avoid; } .chart { break-inside: avoid; } }
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


def write_report(
    result: QuantizeReport | TuneResult, path: str | Path, *, model: str | Path, command: str = ""
) -> Path:
    """Writes what a run did to `path`: a self-contained page (.html), or the same content as JSON (.json).

    Args:
        result: of `quantize` or `tune`; of the latter, its model must still be on the disk.
        path: is replaced if it is there.
        model: the float model, whose weights the histograms are of.
        command: how the run was started, for people to read.

    Raises:
        OutputError: it cannot be written; nothing is left of it then.
    """
    from onnx_woq.summary import summary

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
    """The page of what `summary` gives."""
    from plotly.offline import get_plotlyjs

    from onnx_woq import charts

    tuning = found["tuning"]
    parts = [f"<h1>{_text(Path(found['model']).name)}</h1>", _lead(found), _facts(found)]
    if tuning:
        parts += ["<h2>Configurations</h2>", _trials(tuning, found["bytes_before"])]
        parts += ["<h2>Accuracy against size</h2>", _chart(charts.frontier(found), "frontier")]
        parts += ["<h2>Tuning history</h2>", _chart(charts.history(found), "history")]
    if found["layers"]:
        parts += ["<h2>The network, weight by weight</h2>", _chart(charts.network(found["layers"]), "network")]
        parts += [_worst_table(found["layers"])]
    if found["worst"]:
        parts.append("<h2>Weights with the largest errors</h2>")
        parts.append('<p class="soft">Grey: the float weights. Orange: what rounding adds to them. Logarithmic.</p>')
        drawn = (_chart(charts.histogram(entry), f"worst{i}") for i, entry in enumerate(found["worst"]))
        parts.append(f'<div class="pair">{"".join(drawn)}</div>')
    if found["skipped"]:
        parts += ["<h2>Left float</h2>", _skipped(found["skipped"])]
    parts += ["<h2>How it was made</h2>", _making(found)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(Path(found["model"]).name)}, quantized</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>"
        + "\n".join(parts)
        + "</main><script>"
        + charts.RECOLOUR
        + "</script></body></html>"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _chart(figure: Any, name: str) -> str:
    title = figure.layout.meta or name
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False, "responsive": True}
    )
    return f'<figure class="chart wide" style="margin:0" role="img" aria-label="{_text(title)}">{drawn}</figure>'


def _lead(found: dict[str, Any]) -> str:
    tuning = found["tuning"]
    if not tuning:
        return f'<p class="soft">Quantized to {_text(found["output"])}.</p>'
    if not tuning["best"]:
        return "<p>No configuration gave a model.</p>"
    verdict = "within the tolerance" if tuning["met"] else "the best so far; nothing is surely within the tolerance"
    return f"<p><b>{_text(tuning['best'])}</b> was chosen: {verdict}.</p>"


def _facts(found: dict[str, Any]) -> str:
    before, after, tuning = found["bytes_before"], found["bytes_after"], found["tuning"]
    facts = [(size(before), "float model")]
    if after:
        facts += [(size(after), "quantized"), (f"{100 * after / before:.1f} %", "of the float size")]
    best = next((t for t in tuning["trials"] if t["name"] == tuning["best"]), None) if tuning else None
    if best and best["metric"] is not None:
        facts.append((f"{best['metric']:.4g}", f"{tuning['metric']}, {tuning['unit']}"))
    weights = sum(row["k"] * row["n"] for row in found["layers"])
    if weights:
        bits = 8 * sum(row["bytes"] for row in found["layers"]) / weights
        facts.append((f"{bits:.2f}", "bits per weight, scales included"))
    facts.append((f"{found['seconds']:.1f} s", "in all"))
    cards = (f'<div class="fact"><b>{_text(b)}</b><span>{_text(s)}</span></div>' for b, s in facts)
    return f'<div class="facts">{"".join(cards)}</div>'


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Columns beginning with ">" are right-aligned; rows are (class, cells that are escaped already)."""
    kinds = [' class="number"' if column.startswith(">") else "" for column in columns]
    head = "".join(f'<th scope="col"{k}>{_text(c.removeprefix(">"))}</th>' for c, k in zip(columns, kinds, strict=True))
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td{k}>{cell}</td>" for cell, k in zip(cells, kinds, strict=True)) + "</tr>"
        for kind, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _trials(tuning: dict[str, Any], float_bytes: int) -> str:
    rows = []
    for trial in tuning["trials"]:
        outcome = "dropped out" if trial["dropped"] else trial["verdict"] or trial["status"]
        error = trial["standard_error"]
        metric = "" if trial["metric"] is None else f"{trial['metric']:.4g}"
        spread = f" ± {error:.2g}" if error is not None and tuning["metric"] == "kl" else ""
        cells = [
            _text(trial["name"]),
            _text(metric + spread),
            f'<span class="{_text(outcome.split()[0])}">{_text(outcome)}</span>',
            _text("" if trial["bytes"] is None else size(trial["bytes"])),
            _text("" if trial["bytes"] is None else f"{100 * trial['bytes'] / float_bytes:.1f} %"),
            _text(f"{trial['seconds']:.1f}"),
            _text(trial["error"]),
        ]
        rows.append(("chosen" if trial["name"] == tuning["best"] else "", cells))
    columns = (
        "configuration",
        f">{tuning['metric']}, {tuning['unit']}",
        "verdict",
        ">size",
        ">of float",
        ">seconds",
        "",
    )
    limit, why = tuning["limit"], _text(tuning["stopped"])
    relation = "at least" if tuning["higher_is_better"] else "at most"
    accepted = "" if limit is None else f'<p class="soft">Accepted: {relation} {limit:.4g}; {why}.</p>'
    return _table(columns, rows) + accepted


def _worst_table(layers: Sequence[dict[str, Any]]) -> str:
    known = sorted((row for row in layers if row["error"] is not None), key=lambda row: -row["error"])[:10]
    if not known:
        return ""
    rows = [
        (
            "",
            [
                f"<code>{_text(row['name'])}</code>",
                _text(spec_name(Spec(row["bits"], row["group_size"], row["symmetric"]))),
                _text(f"{row['k']} × {row['n']}"),
                _text(size(row["bytes"])),
                _text(f"{100 * row['error'] ** 0.5:.2f} %"),
            ],
        )
        for row in known
    ]
    return _table(("largest output errors", "grid", ">shape", ">size", ">error"), rows)


def _skipped(skipped: Sequence[dict[str, Any]]) -> str:
    rows = [
        ("", [f"<code>{_text(n['node_name'] or n['name'])}</code>", _text(n["op_type"]), _text(n["reason"])])
        for n in skipped
    ]
    return _table(("node", "operator", "why"), rows)


def _making(found: dict[str, Any]) -> str:
    lines = [("onnx-woq", found["version"]), ("model", found["model"]), ("written", found["output"] or "nothing")]
    lines += [("command", found["command"])] if found["command"] else []
    lines += [("calibration data", found["calibration"] or "none"), ("needs onnxruntime", found["needs_onnxruntime"])]
    rows = [("", [_text(name), f"<code>{_text(value)}</code>"]) for name, value in lines]
    recipe = json.dumps(found["recipe"], indent=2) if found["recipe"] else "none"
    return _table(("", ""), rows) + f"<details><summary>Recipe</summary><pre>{_text(recipe)}</pre></details>"
