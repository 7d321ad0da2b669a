"""The layers that a mix shares bytes out to, their choices, and the bytes of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import PlannedWeight, make_plan
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import Linear, LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class MixedLayer:
    """A layer of a mix, on one grid: a linear group, an embedding, or a group with the table that it is tied to.

    Attributes:
        group: in the float model; None for a table by itself.
        table: in the float model, or None.
        specs: its choices; None leaves it float. A single one where the recipe has settled it.
        stored: bytes of each; of a weight that stays float those it is stored in.
        written: likewise, but without float weights that stay in the file whatever becomes of this layer, because
            something else reads them (the table of a tied head, if tables stay float): they cost nothing.
        losses: predicted for the whole model, of each; empty while nothing has been measured.
        alpha: what local loss of the linear group (of the table, if there is none) does to the outputs.
    """

    group: PlannedWeight | None
    table: PlannedWeight | None
    specs: tuple[Spec | None, ...]
    stored: tuple[int, ...]
    written: tuple[int, ...]
    losses: tuple[float, ...] = ()
    alpha: float = math.nan

    @property
    def main(self) -> PlannedWeight:
        """Returns the linear group, or else the table."""
        main = self.group or self.table
        if main is None:
            raise ValueError("a layer without a weight")
        return main

    @property
    def name(self) -> str:
        """Returns the unique name of the group, or else of the table."""
        return self.main.name

    @property
    def weights(self) -> int:
        """Returns the number of weights."""
        return self.main.k * self.main.n

    @property
    def settled(self) -> bool:
        """Tells whether there is nothing to choose."""
        return len(self.specs) == 1

    @property
    def names(self) -> list[list[str]]:
        """Returns the names that a recipe may call each node by: output, node and weight."""
        return _node_names(self.group, self.table)


def mixed_layers(source: Model, base: Recipe) -> list[MixedLayer]:
    """Returns the layers of a mix that `base` is the base of, groups in graph order and then tables; nothing measured.

    Args:
        source: the float model.
        base: tells what is quantized at all, and how.
    """
    plan = make_plan(source, base)
    tied = {head: table for table in plan.embeddings if (head := _embedding(table).head) is not None}
    layers = []
    for group in plan.groups:
        table = next((tied[linear] for linear in linears_of(group) if linear in tied), None)
        layers.append(_layer(source, base, group, table))
    loose = [table for table in plan.embeddings if table not in {layer.table for layer in layers}]
    # A table that a group reads as well, other than as its transpose, is left to the recipe: neither can move alone.
    return layers + [_layer(source, base, None, table) for table in loose if not _embedding(table).counted]


def freed(source: Model, layer: MixedLayer) -> int:
    """Returns the bytes of float weights that leave the file when a layer is quantized."""
    if layer.group is None or not isinstance(layer.group.source, LinearGroup):
        return layer.main.weight_bytes
    kept = float_copy_bytes(source, [layer.group.source], [_embedding(layer.table)] if layer.table else [])
    return layer.group.weight_bytes - sum(kept.values())


def bytes_on(group: PlannedWeight | None, table: PlannedWeight | None, spec: Spec | None) -> int:
    """Returns the bytes of a group and its table, or of a table, in one number format; None is float.

    Codes that are shared count once.
    """
    main = group or table
    if main is None:
        raise ValueError("a layer without a weight")
    if spec is None:
        return main.weight_bytes
    return main.on(spec).bytes if group else main.on(spec).own_bytes


def made_bytes(layer: MixedLayer, groups: Sequence[PlannedWeight], table: PlannedWeight | None) -> int:
    """Returns the bytes that a plan makes of a layer.

    The plan may join linears that the layer separates, or the other way round. Of each group the layer then has the
    share of its own output channels, so that bytes of layers add up to those of the plan.

    Args:
        layer: the layer.
        groups: the groups of the plan that have linears of the layer; its other linears stay float.
        table: the table of the layer as the plan makes it; None if it stays float.
    """
    if layer.group is None:
        return table.own_bytes if table else layer.main.weight_bytes
    size, left = 0.0, {linear.name: linear for linear in linears_of(layer.group)}
    for group in groups:
        if isinstance(group.source, LinearGroup):
            mine = {columns.start: columns for one, columns in group.source.slices() if left.pop(one.name, None)}
            size += group.bytes * sum(columns.stop - columns.start for columns in mine.values()) / group.n
    floats = sum({linear.root: linear.constant().tensor.nbytes for linear in left.values()}.values())
    return round(size) + floats + (table.code_bytes if table else 0)


def linears_of(group: PlannedWeight | None) -> tuple[Linear, ...]:
    """Returns the linears of a linear group; none for a table or None."""
    return group.source.linears if group and isinstance(group.source, LinearGroup) else ()


def _embedding(table: PlannedWeight) -> Embedding:
    if not isinstance(table.source, Embedding):
        raise TypeError(f"{table.name!r} is no embedding")
    return table.source


def _layer(source: Model, base: Recipe, group: PlannedWeight | None, table: PlannedWeight | None) -> MixedLayer:
    size = lambda spec: bytes_on(group, table, spec)  # noqa: E731
    main = group or table
    if main is None:
        raise ValueError("a layer without a weight")
    if any(_named(names, base) for names in _node_names(group, table)):
        settled = MixedLayer(group, table, (main.spec,), (), ())
        taken = made_bytes(settled, [group] if group else [], table)
        return replace(settled, stored=(taken,), written=(taken,))
    specs = _worthwhile(size)
    layer = MixedLayer(group, table, (*specs, None), (), ())
    sizes = tuple(size(spec) for spec in specs)
    return MixedLayer(group, table, layer.specs, (*sizes, main.weight_bytes), (*sizes, freed(source, layer)))


def _worthwhile(size: Callable[[Spec], int]) -> tuple[Spec, ...]:
    """Returns the grids that no other is better than in no more bytes.

    Better are more bits for the same groups (than 3 bits that are stored as 4, the opset being too old for less), and
    smaller groups for the same bits (than 128 where the last group is padded).
    """
    every = [Spec(bits, group, symmetric) for group in GROUPS for bits in BITS for symmetric in (False, True)]
    sizes = {spec: size(spec) for spec in every}

    def needless(spec: Spec) -> bool:
        return any(
            other != spec
            and other.symmetric == spec.symmetric
            and other.bits >= spec.bits
            and other.group_size <= spec.group_size
            and sizes[other] <= sizes[spec]
            for other in every
        )

    return tuple(spec for spec in every if not needless(spec))


def _node_names(group: PlannedWeight | None, table: PlannedWeight | None) -> list[list[str]]:
    names = [(linear.name, linear.node_name, linear.weight_name) for linear in linears_of(group)]
    if table:
        one = _embedding(table)
        names += [(node.outputs[0].name or "", node.name or "", one.weight_name) for node in one.nodes]
    return [[name for name in found if name] for found in names]


def _named(names: Sequence[str], recipe: Recipe) -> bool:
    """Tells whether an override of the recipe finds one of the names."""
    return any(re.search(expression, name) for expression in recipe.overrides for name in names)
