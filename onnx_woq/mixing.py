"""A mix: every unit with its choices, what they take and lose, and the recipe that a combination of them is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from onnx_woq.core.allocate import Allocation, Choice, frontier, within_bytes, within_loss
from onnx_woq.core.methods import METHODS
from onnx_woq.embedding import own
from onnx_woq.errors import ModelError
from onnx_woq.graph.edit import is_large
from onnx_woq.graph.embeddings import find_embeddings
from onnx_woq.graph.lower.gather import lower_embedding, share_codes
from onnx_woq.graph.lower.lowrank import tap_bytes
from onnx_woq.graph.lower.matmulnbits import Packed, lower_tap, packed_from, packed_shapes, required_runtime
from onnx_woq.graph.model import Model, clone, file_bytes
from onnx_woq.graph.save import planned_bytes
from onnx_woq.graph.taps import Site, Tap, find_taps, shared_copy_bytes
from onnx_woq.making import layers_json, report_of
from onnx_woq.pipeline import metadata, prepared
from onnx_woq.recipe import Recipe, Spec
from onnx_woq.results import LayerChoice
from onnx_woq.sensitivity import Sensitivity, specs_for

Count = Literal["stored", "written"]
"""Of a weight that stays float: its bytes, or those that would be saved in the file if it did not.

They differ where something else reads the weight (the embedding of a tied head): it stays in the file either way.
"""


@dataclass(frozen=True)
class Unit:
    """One tap of a mix.

    Attributes:
        tap: in the float model.
        specs: its choices; None leaves it float.
        stored: bytes of each, see `Count`.
        written: likewise.
        losses: predicted for the whole model, of each; empty while nothing has been measured.
        alpha: see `Sensitivity`.
        kept: bytes of its float weight that stay in the file for something else that reads it.
        also: names of the Gathers of an embedding that is quantized as this unit is, for they share a table.
    """

    tap: Tap
    specs: tuple[Spec | None, ...]
    stored: tuple[int, ...]
    written: tuple[int, ...]
    losses: tuple[float, ...] = ()
    alpha: float = math.nan
    kept: int = 0
    also: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        return self.tap.k * self.tap.n


def units_of(source: Model, base: Recipe) -> list[Unit]:
    """The units of a mix that `base` is the base of, in graph order, nothing measured yet."""
    units = []
    taps = find_taps(source, base)[0]
    tables = find_embeddings(source, base, taps)[0]
    for tap in taps:
        specs = specs_for(tap, base)
        tied = [table for table in tables if table.head in tap.sites]
        if tied:  # the embedding is quantized with it, by a kernel that knows no other widths
            specs = tuple(spec for spec in specs if spec.bits in (2, 4, 8)) or specs
        free = len(specs) > 1
        sizes = tuple(tap_bytes(replace(tap, spec=spec)) for spec in specs)
        kept = 0 if tied else sum(shared_copy_bytes(source, [tap]).values())
        stored = (*sizes, tap.weight_bytes) if free else sizes
        written = (*sizes, tap.weight_bytes - kept) if free else sizes
        also = tuple(node.outputs[0].name or "" for table in tied for node in table.nodes)
        units.append(Unit(tap, (*specs, None) if free else specs, stored, written, kept=kept, also=also))
    return units


def measured_units(units: Sequence[Unit], found: Sequence[Sensitivity]) -> list[Unit]:
    """The same units with their losses.

    A unit of which nothing is known (no sample reaches it, or no output that counts depends on it) keeps the spec of
    the recipe: rounding it as coarsely as possible would be a guess.
    """
    out = []
    for unit, one in zip(units, found, strict=True):
        if len(one.specs) == 1 or (one.alpha > 0 and any(one.losses)):
            known = {spec: one.alpha * loss for spec, loss in zip(one.specs, one.losses, strict=True)}
            losses = tuple(0.0 if spec is None else known[spec] for spec in unit.specs)
            out.append(replace(unit, losses=losses, alpha=one.alpha))
        else:
            tap = unit.tap
            size = tap_bytes(tap)
            out.append(Unit(tap, (tap.spec,), (size,), (size,), (0.0,), one.alpha, unit.kept, unit.also))
    return out


@dataclass(frozen=True)
class Mixer:
    """The mixes of a model.

    Attributes:
        source: the float model.
        base: tells method, options and what is quantized at all.
        units: in graph order.
        hashes: of source and calibration, which a written file carries.
        out: what the written file will be called; trials are called as the source is.
    """

    source: Model
    base: Recipe
    units: tuple[Unit, ...]
    hashes: tuple[str, str]
    out: Path

    @cached_property
    def points(self) -> list[Allocation]:
        """The frontier in bytes written, those that leave everything float left out."""
        found = [point for point in frontier(self._choices("written")) if not self._all_float(point)]
        return found or [self.nearest_float()]

    def within_bytes(self, most: int, count: Count) -> Allocation | None:
        """The best mix whose units take at most so many bytes."""
        return self._some_quantized(within_bytes(self._choices(count), most))

    def within_loss(self, most: float) -> Allocation | None:
        """The smallest mix with a predicted loss of at most `most`."""
        return self._some_quantized(within_loss(self._choices("written"), most))

    def smallest(self, count: Count) -> Allocation:
        """The mix of the fewest bytes, known before anything is measured."""
        picks = [int(np.argmin([*getattr(unit, count)])) for unit in self.units]
        return Allocation(
            sum(getattr(u, count)[p] for u, p in zip(self.units, picks, strict=True)), math.nan, tuple(picks)
        )

    def loss(self, picks: Sequence[int]) -> float:
        """What a mix is predicted to lose."""
        return math.fsum(unit.losses[pick] for unit, pick in zip(self.units, picks, strict=True))

    def bits_per_weight(self, picks: Sequence[int]) -> float:
        """Bits that a weight takes on average, scales and zero points included, float ones as they are stored."""
        stored = sum(unit.stored[pick] for unit, pick in zip(self.units, picks, strict=True))
        return 8 * stored / self.weights

    @property
    def weights(self) -> int:
        """How many weights the base recipe selects."""
        return sum(unit.weights for unit in self.units)

    def written(self, picks: Sequence[int]) -> int:
        """About the bytes of the files of a mix, by addition alone."""
        saved = sum(unit.tap.weight_bytes - unit.kept for unit in self.units)
        return file_bytes(self.source) - saved + sum(u.written[p] for u, p in zip(self.units, picks, strict=True))

    def planned(self, picks: Sequence[int]) -> int:
        """The bytes of the files of a mix, by writing them without their content."""
        return planned_file_bytes(self.source, self.recipe(picks), *self.hashes) + self.naming

    @cached_property
    def naming(self) -> int:
        """Bytes that a written file may take beyond its trial: every large tensor says what its data file is called."""
        longer = max(0, len(self.out.name.encode()) - len(self.source.path.name.encode()))
        large = sum(1 for v in self.source.ir.graph.initializers.values() if v.const_value and is_large(v.const_value))
        added = 2 * sum(len(unit.tap.sites) for unit in self.units)  # a weight becomes three tensors at most
        return (longer + 1) * (large + added) if longer else 0

    def recipe(self, picks: Sequence[int]) -> Recipe:
        """The recipe of a mix: the base with an override for each spec, by the exact names of its sites.

        Raises:
            ModelError: the sites of some units cannot be told apart by name.
        """
        names: dict[Spec | None, list[str]] = {}
        for unit, pick in zip(self.units, picks, strict=True):
            names.setdefault(unit.specs[pick], []).extend([*self._names[unit.tap.name], *unit.also])
        overrides = {
            f"^(?:{'|'.join(map(re.escape, found))})$": spec for spec, found in names.items() if spec != self.base.spec
        }
        options = {"enable_full_range": True} if "enable_full_range" in METHODS[self.base.method].options else {}
        return replace(
            self.base, options=options | dict(self.base.options), overrides={**self.base.overrides, **overrides}
        )

    def layers(self, recipe: Recipe) -> tuple[LayerChoice, ...]:
        """What each unit becomes by a recipe."""
        taps = find_taps(self.source, recipe)[0]
        specs = {site.name: tap.spec for tap in taps for site in tap.sites}
        found = []
        for unit in self.units:
            spec = specs.get(unit.tap.sites[0].name)
            at = unit.specs.index(spec) if spec in unit.specs else None
            tap = unit.tap
            size = tap.weight_bytes if spec is None else tap_bytes(replace(tap, spec=spec))
            loss = unit.losses[at] if at is not None and unit.losses else None
            sites = tuple(one.name for one in tap.sites)
            found.append(LayerChoice(tap.name, sites, tap.k, tap.n, spec, size, unit.alpha, loss))
        return tuple(found)

    def _choices(self, count: Count) -> list[list[Choice]]:
        return [
            [Choice(size, loss) for size, loss in zip(getattr(unit, count), unit.losses, strict=True)]
            for unit in self.units
        ]

    def _all_float(self, found: Allocation) -> bool:
        return all(unit.specs[pick] is None for unit, pick in zip(self.units, found.picks, strict=True))

    def _some_quantized(self, found: Allocation | None) -> Allocation | None:
        return self.nearest_float() if found and self._all_float(found) else found

    def nearest_float(self) -> Allocation:
        """Everything float but one unit, where that loses least."""
        floats = [len(unit.specs) - 1 for unit in self.units]
        changes = [
            (unit.losses[pick], index, pick)
            for index, unit in enumerate(self.units)
            for pick in range(len(unit.specs))
            if unit.specs[pick] is not None
        ]
        loss, index, pick = min(changes)
        picks = (*floats[:index], pick, *floats[index + 1 :])
        return Allocation(sum(u.written[p] for u, p in zip(self.units, picks, strict=True)), loss, picks)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """By tap, a name of each of its sites that finds no site of another tap."""
        owners: dict[str, set[str]] = {}
        for unit in self.units:
            for site in unit.tap.sites:
                for name in _names_of(site):
                    owners.setdefault(name, set()).add(unit.tap.name)
        found = {}
        for unit in self.units:
            own = [next((n for n in _names_of(site) if len(owners[n]) == 1), None) for site in unit.tap.sites]
            if None in own:
                raise ModelError(
                    f"the nodes and values around {unit.tap.name!r} share their names with other products, so a recipe "
                    "cannot tell them apart: export the model again, or exclude them"
                )
            found[unit.tap.name] = [name for name in dict.fromkeys(own) if name]
        return found


def _names_of(site: Site) -> list[str]:
    return [name for name in (site.name, site.node_name, site.weight_name) if name]


def _empty(k: int, n: int, spec: Spec, scale_dtype: type[np.floating], *, dense: bool = False) -> Packed:
    """A weight of zeros that takes no memory."""
    shapes = packed_shapes(k, n, spec, scale_dtype, dense=dense)
    arrays = [np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in shapes]
    return packed_from(arrays, k, n, spec, dense=dense)


def planned_file_bytes(source: Model, recipe: Recipe, source_hash: str, calibration: str) -> int:
    """About the bytes of the files that quantizing `source` by `recipe` writes, without solving anything.

    Nodes that solving may add (input scales of AWQ, factors, biases) are not counted.
    """
    model, taps = prepared(clone(source), recipe)
    tables = find_embeddings(model, recipe, taps)[0]
    reports = [report_of(tap, tap.weight_bytes, 0.123456789012345678) for tap in taps]
    for tap in taps:
        packed = [_empty(part.k, part.n, tap.spec, tap.scale_dtype, dense=tap.dense) for part in tap.parts()]
        lower_tap(model, tap, packed, accuracy_level=recipe.accuracy_level)
        for table in tables:
            if table.shared and table.head in tap.sites:
                share_codes(model, table, None)
    for table in own(tables):
        lower_embedding(model, table, _empty(table.k, table.n, table.spec, table.scale_dtype))
    properties = metadata(recipe, source_hash, calibration)
    properties |= {"onnx_woq.minimum_onnxruntime": required_runtime(model), "onnx_woq.layers": layers_json(reports)}
    return planned_bytes(model, source.path, metadata=properties)
