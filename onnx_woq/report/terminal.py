"""Tables on standard output: the results of a quantization, a tuning run, an inspection, an evaluation."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_woq.errors import visible
from onnx_woq.report.labels import METRICS, outcome, size, spec_name

if TYPE_CHECKING:
    from onnx_woq.engine.results import Inspection, QuantizeReport, WeightReport
    from onnx_woq.graph.find.linears import Skipped
    from onnx_woq.runtime.evaluation.metrics import Metrics
    from onnx_woq.tuning.results import Trial, TuneResult

PLAIN_WIDTH = 10_000
"""Columns at most when standard output is not a terminal, so that rows stay whole for grep."""

Cell = str | tuple[str, str]
"""A cell of a table: a text, or a text and its style."""

WORST = 10
"""Linear groups with the largest errors that a quantization report lists."""


def _grid(group: WeightReport) -> str:
    """Formats the number format of a weight, and the rank of its low-rank factors if it has any."""
    return spec_name(group.spec) + (f" + rank {group.rank}" if group.rank else "")


def tuning(result: TuneResult) -> None:
    """Prints the table of a tuning run: the accuracy and the size of each configuration."""
    if result.target:
        mixing(result)
        return
    metric = f">{METRICS[result.metric_name].column}"
    table = _table("config", metric, "verdict", ">size", ">of float", ">seconds", "note")
    table.add_row("float", _number(result.baseline), "", size(result.float_bytes), "100.0 %", "", "")
    for trial in result.trials:
        best = result.best is not None and trial.name == result.best.name
        table.add_row(
            (trial.name, "bold" if best else ""),
            "" if trial.metric is None else _number(trial.metric),
            _verdict(trial),
            "" if trial.bytes is None else size(trial.bytes),
            "" if trial.bytes is None else f"{100 * trial.bytes / result.float_bytes:.1f} %",
            f"{trial.seconds:.1f}",
            "; ".join(filter(None, ["chosen" if best else "", "resumed" if trial.resumed else "", trial.error])),
        )
    relation = "at least" if result.higher_is_better else "at most"
    stopped = {"met": "the first within the tolerance was taken"}.get(result.stopped, result.stopped)
    _show(table, f"accepted: {relation} {_number(result.limit)}; {stopped}; {result.seconds:.1f} s in all")
    _show_faults(result)
    if result.best is None:
        _show("no configuration gave a model: nothing was written")
    elif result.met:
        _show(f"{result.best.name} is within the tolerance: {result.path}")
    else:
        _show(f"no configuration is within the tolerance; the best so far, {result.best.name}: {result.path}")


def mixing(result: TuneResult) -> None:
    """Prints the tables of a mixed-precision run: the grid of each layer, and the configurations that were measured."""
    if result.layers:
        total = sum(layer.predicted or 0.0 for layer in result.layers)
        table = _table("MatMuls of one input", "grid", ">bits", ">size", ">of the loss")
        for layer in result.layers:
            share = "" if layer.predicted is None or not total else f"{100 * layer.predicted / total:.1f} %"
            more = f" +{len(layer.nodes) - 1}" if len(layer.nodes) > 1 else ""
            grid = "float" if layer.spec is None else spec_name(layer.spec)
            table.add_row(layer.name + more, grid, f"{layer.bits:.2f}", size(layer.bytes), share)
        _show(table)
    loss = f">{METRICS[result.metric_name].loss_column}"
    table = _table("config", ">size", ">of float", ">bits", loss, ">predicted", "note")
    for point in [point for point in result.frontier if point.name]:
        error = "" if point.standard_error is None else f" ± {point.standard_error:.2g}"
        trial = next(trial for trial in result.trials if trial.name == point.name)
        table.add_row(
            (point.name, "bold" if point.chosen else ""),
            "" if trial.bytes is None else size(trial.bytes),
            "" if trial.bytes is None else f"{100 * trial.bytes / result.float_bytes:.1f} %",
            f"{point.bpw:.2f}",
            "" if point.measured is None else f"{_number(point.measured)}{error}",
            "" if point.predicted is None else _number(point.predicted),
            "; ".join(filter(None, ["chosen" * point.chosen, "resumed" * trial.resumed, trial.error])),
        )
    _show(table, f"asked for: {result.target}; {result.stopped}; {result.seconds:.1f} s in all")
    _show_faults(result)
    if result.best is None:
        _show("no mix could be made within it: nothing was written")
    elif not result.met:
        _show(f"no mix is within it for sure; the best so far, {result.best.name}: {result.path}")
    else:
        _show(f"{result.best.name}: {result.path}")


def _show_faults(result: TuneResult) -> None:
    """Prints which configurations are missing because of faults of this program."""
    for trial in result.faults:
        _show(f"{trial.name} could not be tried: {trial.error}")


def quantization(report: QuantizeReport) -> None:
    """Prints the table of one quantization: the linear groups with the largest errors, nodes left float, bytes."""
    known = [group for group in report.groups if group.error is not None]
    rows = sorted(known, key=lambda group: -(group.error or 0.0))[:WORST] if known else report.groups[:WORST]
    table = _table("MatMuls", "grid", ">K", ">N", ">before", ">after", ">output error", "input scale")
    for group in rows:
        error = "" if group.error is None else f"{100 * group.error**0.5:.2f} %"
        before, after = size(group.bytes_before), size(group.bytes_after)
        more = f" +{len(group.nodes) - 1}" if len(group.nodes) > 1 else ""
        name, k, n = group.nodes[0] + more, str(group.k), str(group.n)
        table.add_row(name, _grid(group), k, n, before, after, error, group.scaling)
    _show(table)
    if len(report.groups) > len(rows):
        which = "with the largest error" if known else "first"
        _show(f"the {len(rows)} {which} of {len(report.groups)} are shown")
    _show_embeddings(report.embeddings)
    _show_skipped(report.skipped)
    _show_bytes(report)
    _show(f"{report.output} in {report.seconds:.1f} s")
    names = shlex.join([str(report.output), "--reference", str(report.model)])
    _show(f"what it cost: onnx-woq evaluate {names} --data …")


def inspection(found: Inspection) -> None:
    """Prints what would be quantized, and what would be left float for which reason."""
    table = _table("MatMuls of one input", "grid", ">K", ">N", ">before", ">after")
    for group in found.groups:
        before, after = size(group.bytes_before), size(group.bytes_after)
        table.add_row(", ".join(group.nodes), _grid(group), str(group.k), str(group.n), before, after)
    _show(table)
    _show_embeddings(found.embeddings)
    _show_skipped(found.skipped, every=True)
    for cut in found.cuts:
        _show(f"calibration{f', {cut.graph}' if cut.graph else ''}: {cut.reason}")
    _show_bytes(found)


def evaluation(metrics: Metrics) -> None:
    """Prints the metrics of a quantized model against its float original."""
    table = _table("measure", ">value")
    for name, value in _measures(metrics):
        table.add_row(name, value)
    _show(table)


def _measures(metrics: Metrics) -> Iterable[tuple[str, str]]:
    """Yields name and value of each metric."""
    if metrics.kind == "lm":
        error = "" if metrics.kl_se is None else f" ± {metrics.kl_se:.4f}"
        yield f"{METRICS['kl'].name}, nats/token", f"{metrics.kl:.4f}{error}"
        yield "same top-1 token", f"{100 * _or_nan(metrics.top1):.2f} %"
        yield "perplexity, float", f"{_or_nan(metrics.ppl_ref):.3f}"
        yield "perplexity, quantized", f"{_or_nan(metrics.ppl):.3f}"
    else:
        yield METRICS["sqnr_db"].name, f"{_or_nan(metrics.sqnr_db):.2f} dB"
        yield "cosine to the float output", f"{_or_nan(metrics.cosine):.5f}"
    yield "tokens" if metrics.kind == "lm" else "rows", str(metrics.tokens)


def _or_nan(value: float | None) -> float:
    """Returns the number, NaN for None."""
    return float("nan") if value is None else value


def _verdict(trial: Trial) -> Cell:
    """Formats the outcome of a trial in colour."""
    text = outcome(trial.status, trial.dropped, trial.verdict)
    if trial.status == "ok" and trial.dropped:
        return text
    colour = "red" if trial.status != "ok" else "green" if trial.met else "yellow"
    return text, colour


def _show_embeddings(embeddings: Sequence[WeightReport]) -> None:
    """Prints the table of embeddings, if there are any."""
    if not embeddings:
        return
    table = _table("embeddings", "grid", ">rows", ">columns", ">before", ">after", "codes")
    for row in embeddings:
        shared = f"those of {row.shared_with}" if row.shared_with else "its own"
        before, after = (size(count) if count else "" for count in (row.bytes_before, row.bytes_after))
        name, grid = row.weight_name, spec_name(row.spec)
        table.add_row(name, grid, str(row.n), str(row.k), before, after, shared)
    _show(table)


def _show_skipped(skipped: Sequence[Skipped], every: bool = False) -> None:
    """Prints the nodes left float: each with its reason if `every`, otherwise how many for which reason."""
    if not skipped:
        return
    if every:
        table = _table("left float", "op", ">weight", "why")
        for node in skipped:
            weight = size(node.weight_bytes) if node.weight_bytes else ""
            table.add_row(node.node_name or node.name, node.op_type, weight, node.reason)
        _show(table)
        return
    for reason, count in Counter(node.reason for node in skipped).most_common():
        _show(f"{count} left float: {reason}")


def _show_bytes(report: Inspection | QuantizeReport) -> None:
    """Prints the bytes of a model before and after, and of what stays float: copies beside codes, or most of it."""
    for name, count in report.copies.items():
        _show(f"{size(count)} of {name} stay float as well: something else in the model reads them")
    before, after = report.bytes_before, report.bytes_after
    _show(f"{size(before)} → {size(after)} ({100 * after / before:.1f} %)")
    left = report.float_bytes
    if 2 * sum(left.values()) > before:
        parts = ", ".join(f"{op} {100 * count / before:.0f} %" for op, count in list(left.items())[:WORST])
        _show(f"{100 * sum(left.values()) / before:.0f} % of the bytes stay float: {parts}")


def _number(value: float) -> str:
    """Formats a metric with four significant digits."""
    return f"{value:.4g}"


class _Table(Table):
    """A table whose cells are shown as they are: neither markup nor control characters in them have any effect."""

    def add_row(self, *cells: Cell) -> None:  # type: ignore[override]
        """Adds a row."""
        styled = [(cell, "") if isinstance(cell, str) else cell for cell in cells]
        super().add_row(*(Text(visible(text), style) for text, style in styled))


def _table(*columns: str) -> _Table:
    """Returns an empty table; columns whose names begin with ">" are right-aligned."""
    table = _Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _show(*things: Table | str) -> None:
    """Prints tables, and texts as they are, each on one line."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, soft_wrap=False)
    for thing in things:
        if isinstance(thing, str):
            console.print(Text(visible(thing)), soft_wrap=True)
        else:
            console.print(thing)
