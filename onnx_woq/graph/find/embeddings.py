"""The embeddings that can be quantized: tables whose rows a Gather picks, for tokens or for positions.

A table `[V, D]` is the transpose of a weight `[K = D, N = V]`. The head of a model often is that weight ("tied"
weights). So a table is quantized along D, as the weight is along K, and the codes of one can serve both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.find.constants import FLOATS, Constant, readers, resolve
from onnx_woq.graph.find.linears import SMALLEST_K, Linear, LinearGroup, Skipped, WeightSource
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe

SMALLEST_TABLE = 1 << 16
"""The bytes below which a table stays float: tables of token types or relative positions would save next to nothing."""

FLOAT_BY_DEFAULT = "an embedding, left float without --embedding-bits"

# What may stand between a table and a product it is a factor of: operators that move numbers and compute none.
_MOVES = {
    "Cast", "Concat", "Expand", "Identity", "Neg", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Embedding:
    """A table `[n, k]` whose rows are gathered: the transpose of a weight `[k, n]`.

    Attributes:
        name: the name of the output value of the first Gather, which is unique.
        nodes: every Gather that reads the table. A target rewrites them in place.
        weight_name: the name of the initializer, before any Transpose or Cast.
        root: the constant called `weight_name`.
        k: the number of columns; groups of the number format run along them.
        n: the number of rows.
        dtype: the type of the gathered rows.
        spec: the number format.
        weight_bytes: the size of the table as the model stores it.
        head: a quantized linear whose weight is this table, None if there is none.
        shared: whether `head` has the same spec, so that the table can use its codes.
        counted: whether a linear group has this table among its weights, and in its bytes.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    weight_name: str
    root: ir.Value
    k: int
    n: int
    dtype: ir.DataType
    spec: Spec
    weight_bytes: int
    head: Linear | None
    shared: bool
    counted: bool

    def weight_sources(self) -> list[WeightSource]:
        """Returns the table as the only weight source `[k, n]`."""
        table = resolve(self.nodes[0].inputs[0])
        computed = table is not None and isinstance(table.tensor, ir.LazyTensor)
        return [WeightSource(self.weight_name, self.k, self.n, self._weight, computed)]

    def _weight(self) -> np.ndarray:
        table = resolve(self.nodes[0].inputs[0])
        if table is None:
            raise ValueError(f"the table of {self.name!r} has been put in already")
        return table.view().T


def find_embeddings(
    model: Model, recipe: Recipe, groups: Iterable[LinearGroup]
) -> tuple[list[Embedding], list[Skipped]]:
    """Returns the tables that a recipe quantizes, in graph order, and every other large table with the reason.

    A table stays float if a node reads it that is not quantized: the float table would stay in the model anyway. It
    also stays float if its rows multiply activations, as the cosines of rotary positions do.

    Args:
        model: the float model.
        recipe: says which tables to quantize, and how.
        groups: the linear groups that the recipe quantizes.
    """
    linears = {linear.node: (linear, group.spec) for group in groups for linear in group.linears}
    gathers: dict[tuple[object, ...], list[ir.Node]] = {}
    tables: dict[ir.Node, tuple[Constant, Spec]] = {}
    skipped: list[Skipped] = []
    for node in model.ir.graph.all_nodes():
        table = _table(node)
        if table is None:
            continue
        reason = _unfit(node, table)
        if recipe.embedding is None:
            skipped.append(_skip(node, table, reason or FLOAT_BY_DEFAULT))
            continue
        names = (node.name or "", node.outputs[0].name or "", table.root.name or "")
        spec, left_out = recipe.spec_for(*names, default=recipe.embedding)
        if reason or spec is None:
            skipped.append(_skip(node, table, reason or left_out))
        else:
            tables[node] = table, spec
            gathers.setdefault((*table.key, spec), []).append(node)
    found: list[Embedding] = []
    for nodes in gathers.values():
        table, spec = tables[nodes[0]]
        if reason := _read_otherwise(table.root, tables, linears):
            skipped += [_skip(node, table, reason) for node in nodes]
        else:
            found.append(_embedding(nodes, table, spec, linears))
    return found, skipped


def _table(node: ir.Node) -> Constant | None:
    """Returns the large float table that a Gather reads, None for any other node."""
    if node.op_type != "Gather" or node.domain:
        return None
    table = resolve(node.inputs[0])
    if table is None or len(table.shape) != 2 or table.dtype not in FLOATS or table.tensor.dtype not in FLOATS:
        return None
    return table if table.tensor.nbytes >= SMALLEST_TABLE else None


def _unfit(node: ir.Node, table: Constant) -> str:
    """Returns the reason why a table cannot be quantized, "" if it can."""
    if table.overridable:
        return "the table is also a graph input, which a caller may override: --convert makes it a constant"
    axis = node.attributes.get("axis")
    if axis is not None and axis.as_int() not in (0, -2):
        return "Gather picks columns of the table, not rows"
    if table.shape[1] < SMALLEST_K:
        return f"only {table.shape[1]} columns, fewer than the smallest block ({SMALLEST_K})"
    if _is_factor(node):
        return "a factor of activations, as rotary positions are: rounding it would turn them"
    return ""


def _is_factor(gather: ir.Node) -> bool:
    """Tells whether gathered rows are multiplied by an activation, other than by a norm of themselves."""
    pending = [gather.outputs[0]]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if node.op_type == "RotaryEmbedding" and index > 0:
                return True
            if node.op_type in _MOVES:
                pending += node.outputs
            elif node.op_type == "Mul":
                other = node.inputs[1 - index]
                if resolve(other) is not None:
                    pending += node.outputs
                elif not _follows_from(other, gather):
                    return True
    return False


def _follows_from(value: ir.Value | None, source: ir.Node) -> bool:
    """Tells whether `value` is computed from an output of `source`."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        node = one.producer() if one is not None else None
        if node is source:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            pending += node.inputs
    return False


def _read_otherwise(
    root: ir.Value, tables: Mapping[ir.Node, object], linears: Mapping[ir.Node, tuple[Linear, Spec]]
) -> str:
    """Returns the reason why the float table stays in the model, "" if all its readers are quantized."""
    if root.is_graph_output():
        return "the table is also an output of the model"
    for node, index in readers(root):
        if (node, index) not in [(node, 0)] * (node in tables) + [(node, 1)] * (node in linears):
            return f"{node.op_type} {node.name or node.outputs[0].name!r}, which stays float, reads the table as well"
    return ""


def _embedding(
    nodes: Sequence[ir.Node],
    table: Constant,
    spec: Spec,
    linears: Mapping[ir.Node, tuple[Linear, Spec]],
) -> Embedding:
    tied = [(linear, grid) for linear, grid in linears.values() if _is_transpose_of(linear, table)]
    tied.sort(key=lambda pair: pair[1] != spec)  # one of the same spec first
    head = tied[0][0] if tied else None
    return Embedding(
        name=nodes[0].outputs[0].name or "",
        nodes=tuple(nodes),
        weight_name=table.root.name or "",
        root=table.root,
        k=table.shape[1],
        n=table.shape[0],
        dtype=table.dtype,
        spec=spec,
        weight_bytes=table.tensor.nbytes,
        head=head,
        shared=bool(tied) and tied[0][1] == spec,
        counted=any(linear.root is table.root for linear, _ in linears.values()),
    )


def _is_transpose_of(linear: Linear, table: Constant) -> bool:
    """Tells whether the weight `[K, N]` of a linear is exactly the transpose of a table."""
    if linear.root is not table.root or linear.scale != 1.0:
        return False
    weight = linear.constant()
    if len(weight.shape) != 2 or not (_exact(weight) and _exact(table)):
        return False
    return (_turns(weight) + linear.transposed()) % 2 != _turns(table) % 2


def _turns(constant: Constant) -> int:
    """Returns the number of Transposes between a constant and its reader."""
    return sum(op == "Transpose" for op, _ in constant.steps)


def _exact(constant: Constant) -> bool:
    """Tells whether no Cast rounds the numbers of a constant."""
    stored = constant.tensor.dtype
    return all(op != "Cast" or to in (stored, ir.DataType.FLOAT) for op, to in constant.steps)


def _skip(node: ir.Node, table: Constant, reason: str) -> Skipped:
    return Skipped(node.outputs[0].name or "", node.name or "", node.op_type, reason, table.tensor.nbytes)
