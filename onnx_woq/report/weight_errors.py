"""How the weights of a written model differ from the float ones: read back from both files, some rows at a time."""

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
"""Taps whose histograms are shown."""

BINS = 80
TILE = 1 << 19  # numbers compared at a time
SAMPLED = 128  # rows of each weight, evenly spread, where an estimate is enough

_KEPT = 1 << 16  # numbers of a tile that the range of a histogram is taken from
_TAIL = 0.0005  # share of the numbers on either side that a histogram need not show


def histograms(model: str | Path, written: str | Path, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Weights and rounding errors of the worst taps: those of the largest error on outputs, else on the weights.

    Both are counted in bins of one width over all but the outermost numbers, which are counted beside them. The error
    is None where an input scale went into an operation: the weight is then that of another input.

    Args:
        model: the float model.
        written: what was made of it.
        layers: its taps as `summary.layers_of` gives them, with a `weight_error` where `error` is unknown.
    """
    both = _Both.of(model, written)
    hidden = both.hidden(layers)
    ranked = sorted(layers, key=lambda row: -(row["error"] or row["weight_error"] or 0.0))
    found = []
    for row in ranked[:WORST]:
        compared = [both.pair(name) for name in row["sites"] if name in both.linears]
        known = bool(compared) and row["name"] not in hidden and all(rows is not None for _, rows in compared)
        weights = _counted([(linear, None) for linear, _ in compared])
        errors = _counted(compared) if known else None
        kept = {key: row[key] for key in ("name", "sites", "layer", "kind", "bits", "error", "weight_error")}
        found.append(kept | {"weight": weights, "rounding": errors})
    return found


def weight_errors(model: str | Path, written: str | Path, layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`‖ΔW‖² / ‖W‖²` of each tap by its name, over at most `SAMPLED` rows of each weight; what is unknown left out."""
    both = _Both.of(model, written)
    hidden = both.hidden(layers)
    found = {}
    for row in layers:
        compared = [both.pair(name) for name in row["sites"] if name in both.linears]
        if row["name"] in hidden or not compared or any(rows is None for _, rows in compared):
            continue
        error = energy = 0.0
        for linear, rows in compared:
            for weight, acting in _tiles(linear, rows, sampled=True):
                error += float(np.square(acting - weight, dtype=np.float64).sum())
                energy += float(np.square(weight, dtype=np.float64).sum())
        found[row["name"]] = error / energy if energy else 0.0
    return found


@dataclass(frozen=True)
class _Both:
    """A float model, changed as its recipe changes it before calibration, and what was made of it.

    Attributes:
        sites: of the float model, by name.
        written: the quantized model.
        structure: of it.
    """

    linears: Mapping[str, Linear]
    written: Model
    structure: Structure

    @classmethod
    def of(cls, model: str | Path, written: str | Path) -> _Both:
        source, quantized = load(find_model(model)), load(find_model(written))
        recipe = Recipe.from_dict(json.loads(quantized.ir.metadata_props["onnx_woq.recipe"]))
        plan = make_plan(source, recipe)
        plan.prepare()
        linears = {linear.name: linear for group in plan.linear_groups for linear in group.linears}
        return cls(linears, quantized, Structure(quantized))

    def pair(self, name: str) -> tuple[Linear, Rows | None]:
        """A site, and the rows of what takes its place in the written model."""
        linear = self.linears[name]
        return linear, acting_rows(self.written, self.structure, _entry(linear), name, linear.k)

    def hidden(self, layers: Sequence[Mapping[str, Any]]) -> set[str]:
        """Taps that carry an input scale: their own, in what comes before, or that of a later tap, in their weights."""
        homes = {linear: row["name"] for row in layers for linear in row["sites"]}
        found = set()
        for row in layers:
            entries = {_entry(self.linears[name]) for name in row["sites"] if name in self.linears}
            if row["scaling"] in ("norm", "linear") or (row["scaling"] and len(entries) > 1):
                found.add(row["name"])
                found.update(homes[name] for entry in entries for name in self._before(entry, homes))
        return found

    def _before(self, entry: str, known: Mapping[str, str]) -> Iterator[str]:
        """The quantized products that a value is computed from with none in between."""
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
    value = linear.node.inputs[0]
    return "" if value is None else value.name or ""


def _counted(compared: Sequence[tuple[Linear, Rows | None]]) -> dict[str, Any]:
    """The histogram of weights, or of what acts less the weights where rows of it are given.

    A sample says where its bins lie, then everything is counted.
    """
    step = lambda part: part.size // _KEPT | 1  # noqa: E731  # odd, so that all columns have their turn
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
    for linear, rows in compared:
        for weight, acting in _tiles(linear, rows, sampled):
            yield weight if acting is None else acting - weight


def _tiles(linear: Linear, rows: Rows | None, sampled: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Rows of the float weight in float32, and of what acts in its place where that is asked for."""
    view = linear.view()
    step = max(1, TILE // max(linear.k, linear.n))
    wanted = range(0, linear.k, -(-linear.k // SAMPLED)) if sampled else range(linear.k)
    for start in range(0, len(wanted), step):
        numbers = wanted[start : start + step]
        weight = np.asarray(view[numbers.start : numbers.stop : numbers.step], np.float32)
        yield weight, None if rows is None else rows(numbers)
