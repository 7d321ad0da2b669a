"""The dependencies of a graph: what each node reads, which nodes depend on a weight, and which values are live when.

A node that owns graphs (the branches of an If, the body of a Loop or Scan) counts as one node that reads what its
bodies read from outside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from onnx_woq.graph.find.constants import Constant, resolve
from onnx_woq.graph.find.quantized import low_bit_shape

OPEN = ("If", "Loop", "Scan")
"""The operators whose bodies values can be taken out of: they know what an output that is added to a body means."""

UNCUT = 1 << 30
"""The size of a live set with a value that is no tensor: there is no cut, for what crosses it is kept and fed again."""

_NO_TENSOR = {
    "Optional", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap",
    "SplitToSequence", "ZipMap",
}  # fmt: skip

_PRODUCTS = re.compile("MatMul|Gemm|Conv|LSTM|GRU|RNN|QMoE")


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Returns the graphs that a node owns, such as the branches of an If."""
    if not node.attributes:  # most have none
        return []
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def owners(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Returns the owner of each node in a body, at every depth: the node that the body is an attribute of."""
    return {inner: node for node in graph.all_nodes() for body in bodies(node) for inner in body}


def closed_bodies(graph: ir.Graph) -> dict[ir.Node, str]:
    """Returns the nodes in bodies that values cannot be taken out of, each with the operator that owns the body."""
    owner_of = owners(graph)
    found: dict[ir.Node, str] = {}
    for node, owner in owner_of.items():
        above: ir.Node | None = owner
        while above is not None and above.op_type in OPEN and not above.domain:
            above = owner_of.get(above)
        if above is not None:
            found[node] = above.op_type
    return found


def is_tensor(value: ir.Value) -> bool:
    """Tells whether a value is a tensor, and not a sequence, a map or an optional, which cannot be fed or kept."""
    seen: ir.Value | None = value
    while seen is not None:
        if isinstance(seen.type, ir.SequenceType | ir.OptionalType):
            return False
        node = seen.producer()
        if node is None:
            return True
        if node.op_type in _NO_TENSOR:
            return False
        inner = bodies(node) if node.op_type == "If" else []
        seen = inner[0].outputs[seen.index() or 0] if inner else node.inputs[0] if node.op_type == "Identity" else None
    return True


def reads_of(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """Returns the values that `node` of `graph` reads, and those that its bodies read from outside themselves."""
    reads = [value for value in node.inputs if value is not None]
    inner = bodies(node)
    if inner:
        within = {g for body in inner for g in (body, *body.subgraphs())}
        for body in inner:
            outside = [*body.outputs, *(v for n in body.all_nodes() for v in n.inputs if v is not None)]
            reads += [v for v in outside if v.graph is graph or (v.graph is not None and v.graph not in within)]
    return list(dict.fromkeys(reads))


def constant_matrices(node: ir.Node) -> list[Constant]:
    """Returns the constants of two or more dimensions that a MatMul, Gemm, Conv or recurrent node reads."""
    if not _PRODUCTS.search(node.op_type):
        return []
    return [constant for constant in map(resolve, node.inputs) if constant and len(constant.shape) > 1]


def weight_shapes(node: ir.Node) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the weights that a node multiplies by, bodies left out.

    That of a linear is `[K, N]`, however it is stored: transposed, or quantized already.
    """
    if (shape := low_bit_shape(node)) is not None:
        return (shape,)
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    return tuple(constant.shape[::-1] if transposed else constant.shape for constant in constant_matrices(node))


def is_costly(node: ir.Node) -> bool:
    """Tells whether a node, or a node in its bodies, multiplies by a weight: it should not run twice without need."""
    return bool(weight_shapes(node)) or any(map(is_costly, (inner for body in bodies(node) for inner in body)))


def product_bytes(node: ir.Node) -> int:
    """Returns the bytes, in float32, of the weights that a node and its bodies multiply by.

    Quantizing a weight does not change the number, so it measures how long a node takes to run.
    """
    inner = sum(product_bytes(n) for body in bodies(node) for n in body)
    return inner + 4 * sum(map(math.prod, weight_shapes(node)))


@dataclass
class Dependencies:
    """The reads of the nodes of one graph, and the kinds of nodes by what they depend on.

    Attributes:
        nodes: every node, in graph order.
        reads: node -> the values it reads, its bodies' reads included.
        readers: value -> the nodes that read it.
        outputs: the outputs of the graph.
        downstream: in graph order, the costly nodes and every node that depends on one.
        costly: the nodes that multiply by a weight, see `is_costly`.
        free: the nodes that depend on constants alone. They are computed again wherever they are read.
    """

    nodes: list[ir.Node]
    reads: dict[ir.Node, list[ir.Value]]
    readers: dict[ir.Value, list[ir.Node]]
    outputs: set[ir.Value]
    downstream: list[ir.Node]
    costly: set[ir.Node]
    free: set[ir.Node]

    def count_costly(self, nodes: Iterable[ir.Node]) -> int:
        """Returns how many of `nodes` are costly."""
        return sum(node in self.costly for node in nodes)

    def live_counts(self) -> list[int]:
        """Returns the size of the live set behind each downstream node, one number per node; `UNCUT` with a sequence.

        The live set holds the values that are computed by then and still to be read by a later downstream node. Masks
        and rotary tables follow from the inputs alone and are left out, although the layers read them. The embeddings
        follow from the inputs alone as well, but they are the residual stream of the first layer. They are told apart
        by their last reader: it lies in the first half of the graph.
        """
        last_read: dict[ir.Value, int] = {}
        for index, node in enumerate(self.downstream):
            last_read |= {v: index for v in self.reads[node] if v.producer() and v.producer() not in self.free}
        nodes = set(self.downstream)
        early = [v for v, last in last_read.items() if v.producer() not in nodes and 2 * last < len(self.downstream)]
        live = {value: last_read[value] for value in early}
        counts = []
        for index, node in enumerate(self.downstream):
            live |= {value: last_read[value] for value in node.outputs if value in last_read}
            live = {value: last for value, last in live.items() if last > index}
            counts.append(len(live) if all(map(is_tensor, live)) else UNCUT)
        return counts


def find_dependencies(graph: ir.Graph) -> Dependencies:
    """Returns the dependencies of the nodes of `graph`, which must be in an order that they can run in."""
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
    downstream = [node for node in nodes if node in below]
    return Dependencies(nodes, reads, readers, set(graph.outputs), downstream, costly, free)
