"""Cut a graph into blocks: pieces between which only the residual stream is alive.

The nodes of a transformer's graph fall into two kinds. Those below a product with a constant matrix carry the *stream*;
the others (shapes, masks, rotary tables, embeddings) follow from the inputs alone at next to no cost. Walking along the
stream, the values already computed and still to be read are *alive*; where no more than one is (two in graphs whose
norms add the residual themselves), the graph can be cut, and what lies between two cuts is a *segment*. Segments of
equal structure that come back again and again are the layers: a block is one period of them. What follows from the
inputs alone is computed beside the blocks, once, where several of them read it, and in the block that reads it
otherwise. A node that owns a subgraph is one node; the branches of a merged decoder are cut as graphs of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnx_woq.graph.find.constants import Constant, resolve
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model

Kind = Literal["repeated", "balanced", "whole"]

ALIVE = (1, 2)  # values that may cross a cut: the residual stream; and the norm of it, where norms add the residual
PIECES = 16  # blocks of a graph without repetition, at most
_MOST = 0.75  # of the products in one piece: that graph is as good as whole
_WORTH = 2  # two values may cross where that makes the largest block smaller by this factor

_CUTS, _REACH = "onnx_woq cuts", "onnx_woq reach"  # keys in the `meta` of a graph; never saved

_PRODUCTS = re.compile("MatMul|Gemm|Conv|LSTM|GRU|RNN|QMoE")


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one graph that run together.

    Attributes:
        values: names of what its nodes compute.
        inputs: names of what it reads from outside: inputs of the graph, side values, what earlier blocks leave.
        outputs: names of what later blocks read, and of the graph's outputs that it computes.
        weight_bytes: of the constants it reads, as stored.
    """

    values: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Cut:
    """How one graph falls into blocks.

    Attributes:
        graph: "" for the main graph, else the branch of an If.
        kind: "repeated" layers; "balanced" by bytes for want of repetition; "whole" where it cannot be cut.
        reason: one sentence for people.
        side: what follows from the inputs alone and several blocks read; None if there is nothing such.
        blocks: in the order they run.
    """

    graph: str
    kind: Kind
    reason: str
    side: Block | None
    blocks: tuple[Block, ...]


def cuts(model: Model) -> list[Cut]:
    """How the main graph is cut, and after it each branch of an If that holds layers of its own.

    Found once for a model and its clones: quantizing does not change it.
    """
    meta = model.ir.graph.meta
    if _CUTS not in meta:
        meta[_CUTS] = _found(model.ir.graph)
    return list(meta[_CUTS])


def forget(model: Model) -> None:
    """Has `cuts` look again, after the graph has been given other nodes."""
    for key in (_CUTS, _REACH):
        model.ir.graph.meta.pop(key, None)


def _found(main: ir.Graph) -> tuple[Cut, ...]:
    found = [_cut(main, "")]
    for node in main:
        if node.op_type == "If":
            for attribute in node.attributes.values():
                body = attribute.as_graph()
                if sum(map(is_costly, body)) > 1:
                    found.append(_cut(body, f"{attribute.name} of {node.name or node.outputs[0].name}"))
    return tuple(found)


def blocks_of(model: Model, groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """The taps in consecutive groups, those of one block together; their order is kept."""
    return [members for _, members in groups_by_block(model, groups)]


def groups_by_block(model: Model, groups: Sequence[LinearGroup]) -> list[tuple[Block | None, list[LinearGroup]]]:
    """As `blocks_of`, each group with its block; None for what lies in no block."""
    numbers: dict[str, int] = {}
    blocks = [block for cut in cuts(model)[::-1] for block in cut.blocks]  # branches first: values in them are theirs
    for number, block in enumerate(blocks):
        for name in block.values:
            numbers.setdefault(name, number)
    owners: dict[ir.Node, ir.Node] = {}
    found: list[tuple[Block | None, list[LinearGroup]]] = []
    last: int | None = None
    for group in groups:
        node: ir.Node | None = group.linears[0].node
        while node is not None and (node.outputs[0].name or "") not in numbers:
            owners = owners or _owners(model.ir.graph)
            node = owners.get(node)
        home = None if node is None else numbers[node.outputs[0].name or ""]
        if not found or home != last:
            found.append((None if home is None else blocks[home], []))
        found[-1][1].append(group)
        last = home
    return found


def reach(model: Model) -> dict[str, int]:
    """Value name -> bytes of the matrices, in float32, multiplied up to it when the nodes run in their order.

    In the branches of an If, up to it in that branch; in other bodies, when the node that has the body has run. Found
    once, as `cuts` are.
    """
    meta = model.ir.graph.meta
    if _REACH in meta:
        return dict(meta[_REACH])
    found: dict[str, int] = {}
    _reach(model.ir.graph, 0, found)
    meta[_REACH] = found
    return dict(found)


def _reach(graph: ir.Graph, total: int, found: dict[str, int]) -> int:
    for node in graph:
        if node.op_type == "If":  # only one branch is run, and its layers one after another once it is written out
            total = max(_reach(body, total, found) for body in bodies(node))
        else:
            total += product_bytes(node)
            inner = (n for body in bodies(node) for n in body.all_nodes())
            found.update((value.name or "", total) for n in inner for value in n.outputs)
        found.update((value.name or "", total) for value in node.outputs)
    return total


def product_bytes(node: ir.Node) -> int:
    """Bytes of the matrices, in float32, that a node and its bodies multiply by."""
    inner = sum(product_bytes(n) for body in bodies(node) for n in body)
    return inner + 4 * sum(map(math.prod, _shapes(node)))


def is_costly(node: ir.Node) -> bool:
    """Whether the node multiplies by a constant matrix, or runs bodies that do: not to be done twice without need."""
    return bool(_matrices(node)) or any(map(is_costly, (inner for body in bodies(node) for inner in body)))


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node owns."""
    if not node.attributes:  # most have none
        return []
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def reads_of(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """What `node` of `graph` reads, and its bodies read from outside themselves."""
    reads = [value for value in node.inputs if value is not None]
    inner = bodies(node)
    if inner:
        within = {g for body in inner for g in (body, *body.subgraphs())}
        for body in inner:
            outside = [*body.outputs, *(v for n in body.all_nodes() for v in n.inputs if v is not None)]
            reads += [v for v in outside if v.graph is graph or (v.graph is not None and v.graph not in within)]
    return list(dict.fromkeys(reads))


def _matrices(node: ir.Node) -> list[Constant]:
    """The constant matrices that the node itself multiplies by."""
    if not _PRODUCTS.search(node.op_type):
        return []
    return [constant for constant in map(resolve, node.inputs) if constant and len(constant.shape) > 1]


def _owners(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Node in a body -> the node that has the body, at every depth."""
    return {inner: node for node in graph.all_nodes() for body in bodies(node) for inner in body}


@dataclass
class _Flow:
    """The nodes of a graph by kind, in graph order.

    Attributes:
        nodes: everything.
        reads: node -> what it reads, in its bodies too.
        readers: value -> the nodes that read it.
        outputs: of the graph.
        stream: nodes below a product with a constant matrix, these included.
        costly: those of them that are such products.
        free: nodes that read constants alone; whoever needs them does them.
    """

    nodes: list[ir.Node]
    reads: dict[ir.Node, list[ir.Value]]
    readers: dict[ir.Value, list[ir.Node]]
    outputs: set[ir.Value]
    stream: list[ir.Node]
    costly: set[ir.Node]
    free: set[ir.Node]

    def products(self, piece: Iterable[ir.Node]) -> int:
        """How many of the nodes in `piece` are products."""
        return sum(node in self.costly for node in piece)


def _flow(graph: ir.Graph) -> _Flow:
    nodes = list(graph)
    reads = {node: reads_of(node, graph) for node in nodes}
    costly = {node for node in nodes if is_costly(node)}
    below: set[ir.Node] = set()
    free: set[ir.Node] = set()
    for node in nodes:
        producers = {value.producer() for value in reads[node]}
        if node in costly or not below.isdisjoint(producers):
            below.add(node)
        elif all(value.is_initializer() or value.producer() in free for value in reads[node]):
            free.add(node)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes:
        for value in reads[node]:
            readers.setdefault(value, []).append(node)
    stream = [node for node in nodes if node in below]
    return _Flow(nodes, reads, readers, set(graph.outputs), stream, costly, free)


def _cut(graph: ir.Graph, name: str) -> Cut:
    flow = _flow(graph)
    best: tuple[Kind, list[list[ir.Node]]] = ("whole", [flow.stream])
    largest = _largest(best[1])
    for alive in ALIVE:
        kind, pieces = _pieces(_segments(flow, alive))
        size = _largest(pieces)
        if len(pieces) > 1 and (best[0] == "whole" or size * _WORTH <= largest):
            best, largest = (kind, pieces), size
    kind, pieces = best
    if kind == "balanced" and max(map(flow.products, pieces)) > _MOST * len(flow.costly):
        kind, pieces = "whole", [flow.stream]
    side, blocks = _assign(flow, pieces)
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


def _segments(flow: _Flow, alive: int) -> list[list[ir.Node]]:
    """The stream cut wherever at most `alive` values of it are still to be read; each segment has a product.

    The embeddings are the residual stream of the first layer. They follow from the inputs alone, as masks do, but the
    last layers do not read them.
    """
    on_stream = set(flow.stream)
    last_read: dict[ir.Value, int] = {}
    for index, node in enumerate(flow.stream):
        last_read |= {v: index for v in flow.reads[node] if v.producer() and v.producer() not in flow.free}
    segments: list[list[ir.Node]] = [[]]
    early = [v for v, last in last_read.items() if v.producer() not in on_stream and 2 * last < len(flow.stream)]
    living = {value: last_read[value] for value in early}
    for index, node in enumerate(flow.stream):
        segments[-1].append(node)
        living |= {value: last_read[value] for value in node.outputs if value in last_read}
        living = {value: last for value, last in living.items() if last > index}
        if len(living) <= alive and not flow.costly.isdisjoint(segments[-1]):
            segments.append([])
    if len(segments) > 1 and flow.costly.isdisjoint(segments[-1]):
        rest = segments.pop()
        segments[-1] += rest
    return segments


def _pieces(segments: list[list[ir.Node]]) -> tuple[Kind, list[list[ir.Node]]]:
    """Segments joined to one piece per period of what repeats, or to pieces of about equal bytes if nothing does."""
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
    """What two layers of one kind have in common: their products and the shapes of these.

    Not what is between: of the first layer that is partly off the stream. A layer that is quantized already is of the
    same kind as one that is not.
    """
    return tuple(shapes for node in segment if (shapes := _shapes(node)))


def _shapes(node: ir.Node) -> tuple[tuple[int, ...], ...]:
    """Of the matrices that a node multiplies by; `[K, N]` in a linear layer, whatever it is stored in."""
    if node.op_type == "MatMulNBits":
        return ((node.attributes["K"].as_int(), node.attributes["N"].as_int()),)
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    return tuple(constant.shape[::-1] if transposed else constant.shape for constant in _matrices(node))


def _repetition(marks: Sequence[int]) -> tuple[int, int, int]:
    """(start, period, count) of what repeats and covers most of `marks`; the shortest period of equals."""
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
    """Consecutive segments joined as long as their matrices take at most `limit` bytes in float32."""
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
    """Bytes of the matrices that `nodes` and their bodies multiply by, in float32: quantizing does not change it."""
    return sum(4 * sum(map(math.prod, _shapes(node))) + sum(_size(body) for body in bodies(node)) for node in nodes)


def _bytes(nodes: Iterable[ir.Node]) -> int:
    """Of the constants that `nodes` and their bodies read, each counted once."""
    found: dict[int, int] = {}
    for node in nodes:
        found |= {id(c.root): c.tensor.nbytes for c in _matrices(node)}
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.is_initializer():
                found[id(value)] = value.const_value.nbytes
        found[id(node)] = sum(_bytes(body) for body in bodies(node))
    return sum(found.values())


def _assign(flow: _Flow, pieces: Sequence[Sequence[ir.Node]]) -> tuple[Block | None, tuple[Block, ...]]:
    """The blocks made of `pieces` of the stream, with the other nodes put where they are read."""
    place = {node: number for number, piece in enumerate(pieces) for node in piece}
    needed_by: dict[ir.Node, set[int]] = {}
    shared = -1
    for node in reversed(flow.nodes):
        if node not in place:  # its readers have their places by now
            numbers = needed_by.get(node, set())
            place[node] = shared if len(numbers) > 1 else min(numbers, default=0)
        for value in flow.reads[node]:
            producer = value.producer()
            if producer is not None:
                needed_by.setdefault(producer, set()).add(place[node])
    numbered: dict[int, list[ir.Node]] = {}
    for node in flow.nodes:
        numbers = needed_by.get(node, set()) if node in flow.free else {place[node]}
        for number in numbers or {place[node]}:
            numbered.setdefault(number, []).append(node)
    side = _block(flow, numbered[shared]) if shared in numbered else None
    blocks = tuple(_block(flow, numbered[number]) for number in range(len(pieces)) if number in numbered)
    return side, blocks


def _block(flow: _Flow, nodes: Sequence[ir.Node]) -> Block:
    inside = set(nodes)
    reads = dict.fromkeys(value for node in nodes for value in flow.reads[node])
    inputs = [v for v in reads if v.producer() not in inside and not v.is_initializer()]
    made = [value for node in nodes for value in node.outputs if value.name]
    return Block(
        values=tuple(value.name or "" for value in made),
        inputs=tuple(value.name or "" for value in inputs),
        outputs=tuple(value.name or "" for value in made if _leaves(value, inside, flow)),
        weight_bytes=_bytes(nodes),
    )


def _leaves(value: ir.Value, inside: set[ir.Node], flow: _Flow) -> bool:
    """Whether something outside reads a value that `inside` computes."""
    if value in flow.outputs:
        return True
    if value.producer() in flow.free:
        return False  # whoever reads it computes it
    return any(reader not in inside for reader in flow.readers.get(value, ()))
