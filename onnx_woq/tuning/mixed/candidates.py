"""The mixes of a model: every layer with its choices, what they take and lose, and the recipe of a combination."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.spec import Spec
from onnx_woq.engine.apply import planned_file_bytes
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import ModelError
from onnx_woq.graph.io.model import Model, file_bytes, load
from onnx_woq.graph.io.save import planned_bytes
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed.knapsack import Allocation, Choice, frontier, within_bytes, within_loss
from onnx_woq.tuning.mixed.layers import MixedLayer, freed, linears_of, made_bytes
from onnx_woq.tuning.results import LayerChoice

Count = Literal["stored", "written"]
"""The bytes that are counted, see `MixedLayer`."""


@dataclass(frozen=True)
class MixCandidates:
    """The mixes of a model.

    Attributes:
        source: the float model.
        base: tells method, options and what is quantized at all.
        layers: in graph order.
        hashes: of source and calibration, which a written file carries.
        out: where the chosen model is written; None if it stays where it was made.
    """

    source: Model
    base: Recipe
    layers: tuple[MixedLayer, ...]
    hashes: tuple[str, str]
    out: Path | None

    @cached_property
    def points(self) -> list[Allocation]:
        """Returns the frontier in bytes written, without the mixes that leave everything float."""
        found = [point for point in frontier(self._choices("written")) if not self._all_float(point)]
        return found or [self.nearest_float()]

    def within_bytes(self, most: int, count: Count) -> Allocation | None:
        """Returns the best mix whose layers take at most so many bytes."""
        return self._some_quantized(within_bytes(self._choices(count), most))

    def within_loss(self, most: float) -> Allocation | None:
        """Returns the smallest mix with a predicted loss of at most `most`."""
        return self._some_quantized(within_loss(self._choices("written"), most))

    def smallest(self, count: Count) -> Allocation:
        """Returns the mix of the fewest bytes, which is known before anything is measured."""
        picks = [int(np.argmin([*getattr(layer, count)])) for layer in self.layers]
        return Allocation(
            sum(getattr(u, count)[p] for u, p in zip(self.layers, picks, strict=True)), math.nan, tuple(picks)
        )

    def loss(self, picks: Sequence[int]) -> float:
        """Returns the predicted loss of a mix."""
        return math.fsum(layer.losses[pick] for layer, pick in zip(self.layers, picks, strict=True))

    def bits_per_weight(self, picks: Sequence[int]) -> float:
        """Bits that a weight takes on average, scales and zero points included, float ones as they are stored."""
        stored = sum(layer.stored[pick] for layer, pick in zip(self.layers, picks, strict=True))
        return 8 * stored / self.weights

    @property
    def weights(self) -> int:
        """Returns the number of weights that the base recipe selects."""
        return sum(layer.weights for layer in self.layers)

    def written(self, picks: Sequence[int]) -> int:
        """Returns about the bytes of the files of a mix, by addition alone."""
        return self._rest + sum(layer.written[pick] for layer, pick in zip(self.layers, picks, strict=True))

    @cached_property
    def _rest(self) -> int:
        """Returns the bytes of the files beside those of the layers."""
        return file_bytes(self.source) - sum(freed(self.source, layer) for layer in self.layers)

    def planned(self, recipe: Recipe) -> int:
        """Returns the bytes of the files that a recipe will give, by writing them without their content."""
        return planned_file_bytes(self.source, recipe, self.out or self.source.path, *self.hashes)

    def final(self, made: Path) -> int:
        """Returns the bytes that a model takes once it is written to its final place."""
        model = load(made)
        return planned_bytes(model, self.out, metadata={}) if self.out else file_bytes(model)

    def recipe(self, picks: Sequence[int]) -> Recipe:
        """Returns the recipe of a mix: the base with an override for each spec, by the exact names of its nodes.

        Raises:
            ModelError: the linears of some layers cannot be told apart by name.
        """
        names: dict[Spec | None, list[str]] = {}
        for layer, pick in zip(self.layers, picks, strict=True):
            if not layer.settled:
                names.setdefault(layer.specs[pick], []).extend(self._names[layer.name])
        overrides = {f"^(?:{'|'.join(map(re.escape, found))})$": spec for spec, found in names.items()}
        options = {"enable_full_range": True} if "enable_full_range" in METHODS[self.base.method].options else {}
        return replace(
            self.base, options=options | dict(self.base.options), overrides={**self.base.overrides, **overrides}
        )

    def layer_choices(self, recipe: Recipe) -> tuple[LayerChoice, ...]:
        """Returns what a recipe makes of each layer."""
        plan = make_plan(self.source, recipe)
        group_of = {linear.name: group for group in plan.groups for linear in linears_of(group)}
        table_of = {table.name: table for table in plan.embeddings}
        found = []
        for layer in self.layers:
            mine = {linear.name for linear in linears_of(layer.group)}
            groups = dict.fromkeys(group_of[name] for name in mine if name in group_of)
            table = table_of.get(layer.table.name) if layer.table and (groups or not layer.group) else None
            first = group_of.get(layer.name)
            spec = first.spec if first else table.spec if table else None
            size = made_bytes(layer, [*groups], table)
            loss = layer.losses[layer.specs.index(spec)] if spec in layer.specs and layer.losses else None
            nodes, main = tuple(names[0] for names in layer.names), layer.main
            found.append(LayerChoice(layer.name, nodes, main.k, main.n, spec, size, layer.alpha, loss))
        return tuple(found)

    def _choices(self, count: Count) -> list[list[Choice]]:
        return [
            [Choice(size, loss) for size, loss in zip(getattr(layer, count), layer.losses, strict=True)]
            for layer in self.layers
        ]

    def _all_float(self, found: Allocation) -> bool:
        return all(layer.specs[pick] is None for layer, pick in zip(self.layers, found.picks, strict=True))

    def _some_quantized(self, found: Allocation | None) -> Allocation | None:
        return self.nearest_float() if found and self._all_float(found) else found

    def nearest_float(self) -> Allocation:
        """Returns the mix that quantizes one layer only, the one that loses least."""
        floats = [len(layer.specs) - 1 for layer in self.layers]
        changes = [
            (layer.losses[pick], index, pick)
            for index, layer in enumerate(self.layers)
            for pick in range(len(layer.specs))
            if layer.specs[pick] is not None
        ]
        loss, index, pick = min(changes)
        picks = (*floats[:index], pick, *floats[index + 1 :])
        return Allocation(sum(u.written[p] for u, p in zip(self.layers, picks, strict=True)), loss, picks)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Returns for each layer a name of each of its nodes that finds no node of another layer."""
        owners: dict[str, set[str]] = {}
        for layer in self.layers:
            for name in (name for names in layer.names for name in names):
                owners.setdefault(name, set()).add(layer.name)
        found = {}
        for layer in self.layers:
            own_names = [next((name for name in names if len(owners[name]) == 1), None) for names in layer.names]
            if None in own_names:
                raise ModelError(
                    f"the nodes and values around {layer.name!r} share their names with other products, so a recipe "
                    "cannot tell them apart: export the model again, or exclude them"
                )
            found[layer.name] = [name for name in dict.fromkeys(own_names) if name]
        return found
