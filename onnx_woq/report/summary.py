"""Summaries: everything a run can tell about itself, as plain data for the page and the JSON of a report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.results import QuantizeReport
from onnx_woq.errors import OutputError
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import Model, load
from onnx_woq.recipe import Recipe
from onnx_woq.report.labels import METRICS
from onnx_woq.report.layer_names import layer_positions
from onnx_woq.report.plain_json import to_plain
from onnx_woq.report.weight_errors import histograms, weight_errors
from onnx_woq.tuning.results import TuneResult
from onnx_woq.version import version

LAYERS = "onnx_woq.layers"
"""Metadata key of a written model that holds a row for each linear group."""

_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "scipy")


def summary(result: QuantizeReport | TuneResult, model: str | Path | None = None, command: str = "") -> dict[str, Any]:
    """Returns the content of a report as plain JSON values; numbers that are not finite are None.

    Args:
        result: the result of `quantize` or `tune`; the models it names must still be on the disk.
        model: the float model, or its folder, if it is no longer where it was.
        command: the command that started the run.

    Raises:
        OutputError: neither the result nor `model` names the float model.
    """
    tuned = result if isinstance(result, TuneResult) else None
    named = result.model if model is None else model
    if named is None:
        raise OutputError("the result does not name the float model: give write_report(…, model=PATH)")
    source = load(find_model(named))
    written = result.output if isinstance(result, QuantizeReport) else result.path
    made = result if isinstance(result, QuantizeReport) else result.best
    recipe = made.recipe if made else None
    properties = load(written).ir.metadata_props if written else {}
    layers = layers_of(written) if written else []
    if written and all(row["error"] is None for row in layers):
        known = weight_errors(named, written, layers)
        layers = [row | {"weight_error": known.get(row["name"])} for row in layers]
    skipped, tables = _beside(source, recipe)
    found = {
        "kind": "tuning" if tuned else "quantization",
        "version": version(),
        "versions": _versions(),
        "command": command,
        "model": named,
        "output": written,
        "bytes_before": tuned.float_bytes if tuned else result.bytes_before,  # type: ignore[union-attr]
        "bytes_after": _bytes_after(result),
        "seconds": result.seconds,
        "recipe": recipe and recipe.to_dict(),
        "calibration": properties.get("onnx_woq.calibration", ""),
        "source": properties.get("onnx_woq.source", ""),
        "needs_onnxruntime": properties.get("onnx_woq.minimum_onnxruntime", ""),
        "tuning": tuned and _tuning(tuned),
        "layers": _with_float(source, layers),
        "embeddings": tables,
        "skipped": skipped,
        "worst": histograms(named, written, layers) if written else [],
    }
    plain: dict[str, Any] = json.loads(json.dumps(to_plain(found)))
    return plain


def layers_of(path: Path) -> list[dict[str, Any]]:
    """Returns a row for each linear group of a written model, with its place in a picture of the network."""
    text = load(path).ir.metadata_props.get(LAYERS, "")
    rows: list[dict[str, Any]] = json.loads(text) if text else []
    return _placed([row | {"weight_error": None} for row in rows])


def _placed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds layer and kind of its weight to each row."""
    found = layer_positions([row["name"] for row in rows], [(row["k"], row["n"]) for row in rows])
    return [row | {"layer": layer, "kind": kind} for row, (layer, kind) in zip(rows, found, strict=True)]


def _with_float(source: Model, layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of all linear groups in graph order, also of those that stay float in the written model."""
    everything = make_plan(source, Recipe("rtn")).linear_groups
    done = {linear for row in layers for linear in row["sites"]}
    order = {linear.name: number for number, group in enumerate(everything) for linear in group.linears}
    rows = [
        *layers,
        *(_float_row(group) for group in everything if not any(linear.name in done for linear in group.linears)),
    ]
    return _placed(sorted(rows, key=lambda row: order.get(row["name"], len(order))))


def _float_row(group: LinearGroup) -> dict[str, Any]:
    """Returns the row of a linear group that stays float."""
    unknown = dict.fromkeys(("bits", "group_size", "symmetric", "error", "weight_error"))
    linears = [linear.name for linear in group.linears]
    shape = {"k": group.k, "n": group.n, "bytes": group.weight_bytes}
    return {"name": group.name, "sites": linears, "scaling": "", **shape, **unknown}


def _beside(source: Model, recipe: Recipe | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the nodes that stay float, with reasons, and those of the quantized embeddings."""
    if recipe is None:
        return [], []
    plan = make_plan(source, recipe)
    return [node.to_dict() for node in plan.skipped], [table.report().to_dict() for table in plan.embeddings]


def _versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that did the work; one under another name is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True), "onnx-woq": version()}
    for name in _PACKAGES:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found


def _tuning(result: TuneResult) -> dict[str, Any]:
    """Returns trials and frontier, with the unit of the metric."""
    return result.to_dict() | {"unit": METRICS[result.metric_name].unit}


def _bytes_after(result: QuantizeReport | TuneResult) -> int | None:
    """Returns the bytes of the written model, None if there is none."""
    if isinstance(result, QuantizeReport):
        return result.bytes_after
    return result.best.bytes if result.best else None
