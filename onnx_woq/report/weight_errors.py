"""Errors of the weights in a written model: both files are read back and compared, some rows at a time.

Arguments named `layers` are rows of `summary.layers_of`, one for each linear group (the MatMul and Gemm nodes that read
one activation). A weight is compared by the matrix that the written nodes multiply by, whatever they store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.find.linears import Linear
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import Model, load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.evaluation.effective_weight import Rows, acting_rows

WORST = 6
"""Linear groups whose histograms are shown."""

BINS = 80  # of a histogram
TILE = 1 << 19  # weights compared at a time
SAMPLED = 128  # rows of each weight, evenly spread, that an estimate is made of

_KEPT = 1 << 16  # numbers of a tile, about, that decide the range of a histogram
_TAIL = 0.0005  # share of the numbers on either side that may lie outside of it


def histograms(model: str | Path, written: str | Path, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns histograms of the weights and rounding errors of the linear groups with the largest errors.

    Groups are ranked by the error of their outputs, or of their weights where that is unknown. Both histograms
    cover all but the outermost numbers, which are counted beside them. There is none of the rounding errors where an
    input scale was folded into another operation, because the written weight is then that of another input.

    Args:
        model: the float model.
        written: the quantized model made of it.
        layers: rows with a `weight_error` where `error` is unknown.
    """
    models = _ModelPair.of(model, written)
    rescaled = models.rescaled(layers)
    ranked = sorted(layers, key=lambda row: -(row["error"] or row["weight_error"] or 0.0))
    found = []
    for row in ranked[:WORST]:
        compared = [models.pair(name) for name in row["sites"] if name in models.linears]
        known = bool(compared) and row["name"] not in rescaled and all(rows is not None for _, rows in compared)
        weights = _counted([(linear, None) for linear, _ in compared])
        errors = _counted(compared) if known else None
        kept = {key: row[key] for key in ("name", "sites", "layer", "kind", "bits", "error", "weight_error")}
        found.append(kept | {"weight": weights, "rounding": errors})
    return found


def weight_errors(model: str | Path, written: str | Path, layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Estimates the relative error `‖ΔW‖² / ‖W‖²` of linear groups from at most `SAMPLED` rows of each weight.

    Args:
        model: the float model.
        written: the quantized model made of it.
        layers: rows of the linear groups.

    Returns:
        Errors by the name of the group; groups whose weights cannot be compared are left out.
    """
    models = _ModelPair.of(model, written)
    rescaled = models.rescaled(layers)
    found = {}
    for row in layers:
        compared = [models.pair(name) for name in row["sites"] if name in models.linears]
        if row["name"] in rescaled or not compared or any(rows is None for _, rows in compared):
            continue
        error = energy = 0.0
        for linear, rows in compared:
            for weight, acting in _tiles(linear, rows, sampled=True):
                error += float(np.square(acting - weight, dtype=np.float64).sum())
                energy += float(np.square(weight, dtype=np.float64).sum())
        found[row["name"]] = error / energy if energy else 0.0
    return found


@dataclass(frozen=True)
class _ModelPair:
    """A float model, prepared for calibration as its recipe says, and the quantized model made of it.

    Attributes:
        linears: the MatMul and Gemm nodes of the float model with a constant weight, by name.
        written: the quantized model.
        structure: its structure.
    """

    linears: Mapping[str, Linear]
    written: Model
    structure: Structure

    @classmethod
    def of(cls, model: str | Path, written: str | Path) -> _ModelPair:
        """Loads both models; the recipe is that in the metadata of the written one."""
        source, quantized = load(find_model(model)), load(find_model(written))
        recipe = Recipe.from_dict(json.loads(quantized.ir.metadata_props["onnx_woq.recipe"]))
        plan = make_plan(source, recipe)
        plan.prepare()
        linears = {linear.name: linear for group in plan.linear_groups for linear in group.linears}
        return cls(linears, quantized, Structure(quantized))

    def pair(self, name: str) -> tuple[Linear, Rows | None]:
        """Returns a linear of the float model, and the rows of the matrix in its place in the written model."""
        linear = self.linears[name]
        return linear, acting_rows(self.written, self.structure, _entry(linear), name, linear.k)

    def rescaled(self, layers: Sequence[Mapping[str, Any]]) -> set[str]:
        """Returns the names of linear groups whose weights cannot be compared because of an input scale.

        It is their own, folded into an operation before them, or that of a later group, folded into their weights.
        """
        homes = {linear: row["name"] for row in layers for linear in row["sites"]}
        found = set()
        for row in layers:
            entries = {_entry(self.linears[name]) for name in row["sites"] if name in self.linears}
            if row["scaling"] in ("norm", "linear") or (row["scaling"] and len(entries) > 1):
                found.add(row["name"])
                found.update(homes[name] for entry in entries for name in self._before(entry, homes))
        return found

    def _before(self, entry: str, known: Mapping[str, str]) -> Iterator[str]:
        """Yields the linears in `known` that a value is computed from without another one in between."""
        pending, seen = [entry], {entry}
        while pending:
            name = pending.pop()
            if name in known:
                yield name
                continue
            node = self.structure.named[name].producer() if name in self.structure.named else None
            if node is not None:
                reads = {value.name or "" for value in self.structure.reads[node]} - seen
                seen |= reads
                pending += reads


def _entry(linear: Linear) -> str:
    """Returns the name of the activation that a linear reads."""
    value = linear.node.inputs[0]
    return "" if value is None else value.name or ""


def _counted(compared: Sequence[tuple[Linear, Rows | None]]) -> dict[str, Any]:
    """Returns the histogram of weights or, where written rows are given, of their differences from these.

    A sample decides the range of the bins, then all numbers are counted.
    """
    step = lambda part: part.size // _KEPT | 1  # noqa: E731  # odd, so that all columns are sampled
    sample = [part.ravel()[:: step(part)].copy() for part in _numbers(compared, sampled=True)]
    low, high = np.quantile(np.concatenate(sample), (_TAIL, 1 - _TAIL)) if sample else (0.0, 0.0)
    room = 0.02 * (high - low) or 1e-9
    edges, counts = np.linspace(low - room, high + room, BINS + 1), np.zeros(BINS, np.int64)
    total, energy, largest = 0, 0.0, 0.0
    for part in _numbers(compared, sampled=False):
        counts += np.histogram(part, BINS, (edges[0], edges[-1]))[0]
        total += part.size
        energy += float(np.square(part, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(part).max(initial=0)))
    return {
        "edges": [float(edge) for edge in edges],
        "counts": [int(count) for count in counts],
        "outside": int(total - counts.sum()),
        "largest": largest,
        "rms": (energy / total) ** 0.5 if total else 0.0,
    }


def _numbers(compared: Sequence[tuple[Linear, Rows | None]], sampled: bool) -> Iterator[np.ndarray]:
    """Yields tiles of the weights or, where written rows are given, of the differences."""
    for linear, rows in compared:
        for weight, acting in _tiles(linear, rows, sampled):
            yield weight if acting is None else acting - weight


def _tiles(linear: Linear, rows: Rows | None, sampled: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields tiles of rows of the float weight in float32, and of the written one if its rows are given."""
    view = linear.view()
    step = max(1, TILE // max(linear.k, linear.n))
    wanted = range(0, linear.k, -(-linear.k // SAMPLED)) if sampled else range(linear.k)
    for start in range(0, len(wanted), step):
        numbers = wanted[start : start + step]
        weight = np.asarray(view[numbers.start : numbers.stop : numbers.step], np.float32)
        yield weight, None if rows is None else rows(numbers)
