"""All that a run can tell of itself, as plain data: what a report shows as a page, and what it saves as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.folder import find_model
from onnx_woq.graph.model import load
from onnx_woq.graph.taps import Site, find_taps
from onnx_woq.recipe import Recipe
from onnx_woq.results import QuantizeReport, TuneResult
from onnx_woq.version import version

LAYERS = "onnx_woq.layers"
"""Key of a written model's metadata that says what became of each tap."""

WORST = 6
"""Weights whose histograms are shown."""

BINS = 80


def summary(result: QuantizeReport | TuneResult, model: str | Path, command: str = "") -> dict[str, Any]:
    """What a report holds; JSON-ready, numbers that are not finite being None.

    Args:
        result: of `quantize` or `tune`.
        model: the float model, or its folder: its weights are read for the histograms.
        command: how the run was started.
    """
    written = result.output if isinstance(result, QuantizeReport) else result.path
    layers = layers_of(written) if written else []
    recipe = result.recipe if isinstance(result, QuantizeReport) else result.best and result.best.recipe
    tuned = result if isinstance(result, TuneResult) else None
    found = {
        "kind": "tuning" if tuned else "quantization",
        "version": version(),
        "command": command,
        "model": str(model),
        "output": written and str(written),
        "bytes_before": tuned.float_bytes if tuned else result.bytes_before,  # type: ignore[union-attr]
        "bytes_after": _bytes_after(result),
        "seconds": result.seconds,
        "recipe": recipe and recipe.to_dict(),
        "calibration": _property(written, "onnx_woq.calibration"),
        "needs_onnxruntime": _property(written, "onnx_woq.minimum_onnxruntime"),
        "tuning": tuned and _tuning(tuned),
        "layers": layers,
        "skipped": [] if tuned else [asdict(node) for node in result.skipped],  # type: ignore[union-attr]
        "worst": histograms(model, written, layers) if written else [],
    }
    plain: dict[str, Any] = json.loads(json.dumps(_finite(found)))
    return plain


def layers_of(path: Path) -> list[dict[str, Any]]:
    """What became of each tap of a written model, and where it belongs in a picture of the network."""
    text = _property(path, LAYERS)
    rows: list[dict[str, Any]] = json.loads(text) if text else []
    for row, (layer, kind) in zip(rows, places([row["name"] for row in rows]), strict=True):
        row |= {"layer": layer, "kind": kind}
    return rows


def places(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Layer and kind of each name: the number that tells the repetitions of a pattern apart, and the pattern.

    `/layers.3/mlp/down_proj/MatMul` is layer 3 of `/layers.#/mlp/down_proj/MatMul`. A name that repeats nowhere has no
    layer.
    """
    patterns = defaultdict(list)
    for name in names:
        patterns[re.sub(r"\d+", "#", name)].append([int(number) for number in re.findall(r"\d+", name)])
    slots = {
        pattern: max(range(len(rows[0])), key=lambda slot: len({row[slot] for row in rows}), default=None)
        for pattern, rows in patterns.items()
        for rows in [[row for row in rows if len(row) == len(rows[0])]]
        if len(rows) > 1 and rows[0]
    }
    found: list[tuple[int | None, str]] = []
    for name in names:
        pattern = re.sub(r"\d+", "#", name)
        slot = slots.get(pattern)
        numbers = re.findall(r"\d+", name)
        found.append((None, name) if slot is None else (int(numbers[slot]), _kind(name, slot)))
    return found


def _kind(name: str, slot: int) -> str:
    """The name with its layer's number left open."""
    count = iter(range(len(name)))
    return re.sub(r"\d+", lambda match: "#" if next(count) == slot else match[0], name)


def histograms(model: str | Path, written: Path, layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The weights with the largest output errors: how the float ones and their rounding errors are spread.

    What a written weight is, its own node says: it is run on an identity matrix, whatever it is stored as.
    """
    from onnx_woq.runtime.weights import acting_weight

    ranked = sorted((row for row in layers if row["error"] is not None), key=lambda row: -row["error"])
    ranked += [row for row in layers if row["error"] is None]
    sites = {site.name: site for tap in find_taps(load(find_model(model)), Recipe("rtn"))[0] for site in tap.sites}
    quantized = load(written)
    found = []
    for row in ranked[:WORST]:
        name = row["sites"][0]
        if name not in sites:
            continue
        weight = np.array(sites[name].finite_view(), np.float32)
        scaled = bool(row["scaling"])  # its input is divided elsewhere: the error cannot be told from here
        error = None if scaled else acting_weight(quantized, name, sites[name].k)
        entry = {"name": name, "layer": row["layer"], "kind": row["kind"], "bits": row["bits"], "error": row["error"]}
        found.append(entry | {"weight": _counted(weight)} | _error_of(error, weight, sites[name]))
    return found


def _error_of(acting: np.ndarray | None, weight: np.ndarray, site: Site) -> dict[str, Any]:
    if acting is None or acting.shape != (site.k, site.n):
        return {"rounding": None}
    return {"rounding": _counted(acting - weight)}


def _counted(array: np.ndarray) -> dict[str, Any]:
    """A histogram over all but the outermost numbers, which are counted beside it."""
    flat = array.ravel()
    low, high = (float(q) for q in np.quantile(flat[:: max(1, len(flat) // 1_000_000)], (0.0005, 0.9995)))
    if not low < high:
        low, high = low - 1e-9, high + 1e-9
    counts, edges = np.histogram(flat, BINS, (low, high))
    return {
        "edges": [float(edge) for edge in edges],
        "counts": [int(count) for count in counts],
        "outside": int(len(flat) - counts.sum()),
        "largest": float(np.abs(flat).max(initial=0)),
        "rms": float(np.sqrt(np.square(flat, dtype=np.float64).mean())),
    }


def _tuning(result: TuneResult) -> dict[str, Any]:
    """Trials and frontier, with the unit of the metric."""
    found = result.to_dict()
    unit = {"kl": "nats per token", "sqnr_db": "dB", "eval_fn": "your metric"}[result.metric_name]
    return found | {"unit": unit}


def _bytes_after(result: QuantizeReport | TuneResult) -> int | None:
    if isinstance(result, QuantizeReport):
        return result.bytes_after
    return result.best.bytes if result.best else None


def _property(path: Path | None, name: str) -> str:
    return "" if path is None else load(path).ir.metadata_props.get(name, "")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
