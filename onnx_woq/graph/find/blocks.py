"""The cut of a graph into blocks: pieces between which only the residual stream is alive.

A transformer's graph has two kinds of nodes. Those *downstream* of a weight compute hidden states; the others (shapes,
masks, rotary tables, embeddings) follow from the inputs alone at next to no cost. The downstream nodes run in order,
and behind each of them the *live set* holds what is computed and still to be read. Where it holds one value, the
residual stream (or two, in graphs whose norms add the residual themselves), the graph can be *cut*. What lies between
two cuts is a *segment*. Segments of equal structure that come back again and again are the layers, and a *block* is
one period of them.

Nodes that follow from the inputs alone join the block that reads them. Those that several blocks read are computed
once, beside the blocks. A node that owns graphs counts as one node; the branches of a merged decoder are cut as graphs
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnx_woq.graph.find.dependencies import (
    Dependencies,
    bodies,
    constant_matrices,
    find_dependencies,
    is_costly,
    owners,
    product_bytes,
    weight_shapes,
)
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model

Kind = Literal["repeated", "balanced", "whole"]

ALIVE = (1, 2)  # values that may cross a cut: the residual stream; and the norm of it, where norms add the residual
PIECES = 16  # the most blocks of a graph without repetition
_MOST = 0.75  # of the products in one piece: that graph is as good as whole
_WORTH = 2  # two values may cross where that makes the largest block smaller by this factor

_CUTS, _REACH = "onnx_woq cuts", "onnx_woq reach"  # keys in the `meta` of a graph; never saved


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one graph that run together, such as one layer.

    Attributes:
        values: names of the values its nodes compute.
        inputs: names of the values it reads from outside: inputs of the graph, side values, outputs of earlier blocks.
        outputs: names of its values that later blocks read or that are outputs of the graph.
        weight_bytes: size of the constants it reads, as stored.
    """

    values: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Cut:
    """The blocks of one graph.

    Attributes:
        graph: "" for the main graph, else the branch of an If.
        kind: "repeated" layers; "balanced" by bytes for want of repetition; "whole" where it cannot be cut.
        reason: one sentence for people.
        side: the nodes that follow from the inputs alone and that several blocks read; None if there are none.
        blocks: in the order they run.
    """

    graph: str
    kind: Kind
    reason: str
    side: Block | None
    blocks: tuple[Block, ...]


def cuts(model: Model) -> list[Cut]:
    """Returns the cut of the main graph, and after it that of each branch of an If that holds layers of its own.

    The cuts are found once and remembered for the model and its clones: quantizing does not change them.
    """
    meta = model.ir.graph.meta
    if _CUTS not in meta:
        meta[_CUTS] = _find_cuts(model.ir.graph)
    return list(meta[_CUTS])


def forget(model: Model) -> None:
    """Drops the remembered results of `cuts` and `reach`, after nodes were added to or removed from the graph."""
    for key in (_CUTS, _REACH):
        model.ir.graph.meta.pop(key, None)


def blocks_of(model: Model, groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """Splits linear groups into runs, one per block; their order is kept."""
    return [members for _, members in groups_by_block(model, groups)]


def groups_by_block(model: Model, groups: Sequence[LinearGroup]) -> list[tuple[Block | None, list[LinearGroup]]]:
    """Splits linear groups into runs, each with the block it lies in; None for a run that lies in no block."""
    numbers: dict[str, int] = {}
    blocks = [block for cut in cuts(model)[::-1] for block in cut.blocks]  # branches first: values in them are theirs
    for number, block in enumerate(blocks):
        for name in block.values:
            numbers.setdefault(name, number)
    owner_of: dict[ir.Node, ir.Node] = {}
    found: list[tuple[Block | None, list[LinearGroup]]] = []
    last: int | None = None
    for group in groups:
        node: ir.Node | None = group.linears[0].node
        while node is not None and (node.outputs[0].name or "") not in numbers:
            owner_of = owner_of or owners(model.ir.graph)
            node = owner_of.get(node)
        home = None if node is None else numbers[node.outputs[0].name or ""]
        if not found or home != last:
            found.append((None if home is None else blocks[home], []))
        found[-1][1].append(group)
        last = home
    return found


def reach(model: Model) -> dict[str, int]:
    """Returns how much of the model has run once a value is known: value name -> bytes of the weights multiplied by.

    The nodes run in graph order, and the bytes are those of float32, so quantizing does not change them. In a branch
    of an If only that branch counts. A value in any other body is known when the node that owns the body has run. The
    result is remembered, as that of `cuts` is.
    """
    meta = model.ir.graph.meta
    if _REACH in meta:
        return dict(meta[_REACH])
    found: dict[str, int] = {}
    _add_reach(model.ir.graph, 0, found)
    meta[_REACH] = found
    return dict(found)


def _add_reach(graph: ir.Graph, total: int, found: dict[str, int]) -> int:
    for node in graph:
        if node.op_type == "If":  # only one branch is run, and its layers one after another once it is written out
            total = max(_add_reach(body, total, found) for body in bodies(node))
        else:
            total += product_bytes(node)
            inner = (n for body in bodies(node) for n in body.all_nodes())
            found.update((value.name or "", total) for n in inner for value in n.outputs)
        found.update((value.name or "", total) for value in node.outputs)
    return total


def _find_cuts(main: ir.Graph) -> tuple[Cut, ...]:
    found = [_cut(main, "")]
    for node in main:
        if node.op_type == "If":
            for attribute in node.attributes.values():
                body = attribute.as_graph()
                if sum(map(is_costly, body)) > 1:
                    found.append(_cut(body, f"{attribute.name} of {node.name or node.outputs[0].name}"))
    return tuple(found)


def _cut(graph: ir.Graph, name: str) -> Cut:
    found = find_dependencies(graph)
    live = found.live_counts()
    best: tuple[Kind, list[list[ir.Node]]] = ("whole", [found.downstream])
    largest = _largest(best[1])
    for alive in ALIVE:
        kind, pieces = _pieces(_segments(found, live, alive))
        size = _largest(pieces)
        if len(pieces) > 1 and (best[0] == "whole" or size * _WORTH <= largest):
            best, largest = (kind, pieces), size
    kind, pieces = best
    if kind == "balanced" and max(map(found.count_costly, pieces)) > _MOST * len(found.costly):
        kind, pieces = "whole", [found.downstream]
    side, blocks = _assign(found, pieces)
    return Cut(name, kind, _reason(kind, blocks, graph), side, blocks)


def _reason(kind: Kind, blocks: Sequence[Block], graph: ir.Graph) -> str:
    largest = max((block.weight_bytes for block in blocks), default=0) / 1e6
    if kind == "repeated":
        return f"{len(blocks)} blocks, cut where the residual stream alone is alive; the largest reads {largest:.1f} MB"
    if kind == "balanced":
        return f"nothing repeats: {len(blocks)} blocks of about equal size; the largest reads {largest:.1f} MB"
    if any(sum(map(is_costly, body)) > 1 for node in graph for body in bodies(node)):
        return "runs whole: its layers lie inside the bodies of one node"
    if sum(map(is_costly, graph)) < 2:
        return "runs whole: there is nothing to cut"
    return "runs whole: more than two values are alive at every place between its products"


def _segments(found: Dependencies, live: Sequence[int], alive: int) -> list[list[ir.Node]]:
    """Cuts the downstream nodes wherever at most `alive` values are live, so that each segment has a costly node.

    Args:
        found: the dependencies.
        live: size of the live set behind each downstream node.
        alive: the most values that may cross a cut.
    """
    segments: list[list[ir.Node]] = [[]]
    for node, count in zip(found.downstream, live, strict=True):
        segments[-1].append(node)
        if count <= alive and not found.costly.isdisjoint(segments[-1]):
            segments.append([])
    if len(segments) > 1 and found.costly.isdisjoint(segments[-1]):
        rest = segments.pop()
        segments[-1] += rest
    return segments


def _pieces(segments: list[list[ir.Node]]) -> tuple[Kind, list[list[ir.Node]]]:
    """Joins segments to one piece per period of what repeats, or to pieces of about equal bytes if nothing does."""
    if len(segments) < 2:
        return "whole", segments
    kinds: dict[tuple[object, ...], int] = {}
    start, period, count = _repetition([kinds.setdefault(_signature(s), len(kinds)) for s in segments])
    if count < 2:
        return "balanced", _balanced(segments, sum(map(_size, segments)) / PIECES)
    end = start + period * count
    repeated = [segments[i : i + period] for i in range(start, end, period)]
    limit = max(_size(_joined(piece)) for piece in repeated)
    before, after = (_balanced(rest, limit) for rest in (segments[:start], segments[end:]))
    return "repeated", [*before, *map(_joined, repeated), *after]


def _signature(segment: Iterable[ir.Node]) -> tuple[object, ...]:
    """Returns the shapes of the weights of a segment, which two layers of one kind have in common.

    The nodes between the products do not count: those of the first layer partly follow from the inputs alone. The shape
    of a weight is the same once it is quantized.
    """
    return tuple(shapes for node in segment if (shapes := weight_shapes(node)))


def _repetition(marks: Sequence[int]) -> tuple[int, int, int]:
    """Returns `(start, period, count)` of the repetition that covers most of `marks`, of equals the shortest period."""
    best = (0, 1, 1)
    covered = 1
    for period in range(1, len(marks) // 2 + 1):
        run = 0
        for i in range(len(marks) - period):
            run = run + 1 if marks[i] == marks[i + period] else 0
            count = run // period + 1
            if count > 1 and count * period > covered:
                covered = count * period
                best = (i - run + 1, period, count)
    return best


def _balanced(segments: list[list[ir.Node]], limit: float) -> list[list[ir.Node]]:
    """Joins consecutive segments as long as their weights take at most `limit` bytes in float32."""
    pieces: list[list[ir.Node]] = []
    size = 0.0
    for segment in segments:
        more = _size(segment)
        if not pieces or size + more > limit:
            pieces.append([])
            size = 0.0
        pieces[-1] += segment
        size += more
    return pieces


def _joined(segments: Iterable[list[ir.Node]]) -> list[ir.Node]:
    return [node for segment in segments for node in segment]


def _largest(pieces: Iterable[list[ir.Node]]) -> int:
    return max(map(_size, pieces), default=0)


def _size(nodes: Iterable[ir.Node]) -> int:
    return sum(map(product_bytes, nodes))


def _stored_bytes(nodes: Iterable[ir.Node]) -> int:
    """Returns the bytes of the constants that `nodes` and their bodies read, each counted once."""
    found: dict[int, int] = {}
    for node in nodes:
        found |= {id(c.root): c.tensor.nbytes for c in constant_matrices(node)}
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.is_initializer():
                found[id(value)] = value.const_value.nbytes
        found[id(node)] = sum(_stored_bytes(body) for body in bodies(node))
    return sum(found.values())


def _assign(found: Dependencies, pieces: Sequence[Sequence[ir.Node]]) -> tuple[Block | None, tuple[Block, ...]]:
    """Makes a block of each piece of the downstream nodes, with the other nodes put where they are read.

    Returns:
        The side, for nodes that several blocks read, and the blocks.
    """
    place = {node: number for number, piece in enumerate(pieces) for node in piece}
    needed_by: dict[ir.Node, set[int]] = {}
    shared = -1
    for node in reversed(found.nodes):
        if node not in place:  # its readers have their places by now
            numbers = needed_by.get(node, set())
            place[node] = shared if len(numbers) > 1 else min(numbers, default=0)
        for value in found.reads[node]:
            producer = value.producer()
            if producer is not None:
                needed_by.setdefault(producer, set()).add(place[node])
    numbered: dict[int, list[ir.Node]] = {}
    for node in found.nodes:
        numbers = needed_by.get(node, set()) if node in found.free else {place[node]}
        for number in numbers or {place[node]}:
            numbered.setdefault(number, []).append(node)
    side = _block(found, numbered[shared]) if shared in numbered else None
    blocks = tuple(_block(found, numbered[number]) for number in range(len(pieces)) if number in numbered)
    return side, blocks


def _block(found: Dependencies, nodes: Sequence[ir.Node]) -> Block:
    inside = set(nodes)
    reads = dict.fromkeys(value for node in nodes for value in found.reads[node])
    inputs = [v for v in reads if v.producer() not in inside and not v.is_initializer()]
    made = [value for node in nodes for value in node.outputs if value.name]
    return Block(
        values=tuple(value.name or "" for value in made),
        inputs=tuple(value.name or "" for value in inputs),
        outputs=tuple(value.name or "" for value in made if _leaves(value, inside, found)),
        weight_bytes=_stored_bytes(nodes),
    )


def _leaves(value: ir.Value, inside: set[ir.Node], found: Dependencies) -> bool:
    """Tells whether a value that `inside` computes is read outside of it, by another block or as an output."""
    if value in found.outputs:
        return True
    if value.producer() in found.free:
        return False  # whoever reads it computes it
    return any(reader not in inside for reader in found.readers.get(value, ()))
