"""The structure of a graph: which values depend on which, and digests that tell whether a value is still the same.

A *body* is a graph inside a node, such as a branch of an If.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import onnx_ir as ir

from onnx_woq.graph.find.dependencies import bodies, is_costly, is_tensor, product_bytes, reads_of
from onnx_woq.graph.io.model import Model


class Structure:
    """The main graph of a model as it is now. A node computes everything that its bodies compute.

    Attributes:
        graph: the main graph.
        named: its values by name, without initializers.
        reads: node of the main graph -> the values of the main graph that it and its bodies read.
    """

    def __init__(self, model: Model) -> None:
        self.graph = model.ir.graph
        self.named: dict[str, ir.Value] = {value.name or "": value for value in self.graph.inputs}
        self.reads: dict[ir.Node, list[ir.Value]] = {}
        self._weights: dict[ir.Node, int] = {}
        self._homes: dict[str, ir.Value] = {}  # name of a value in a body -> an output of the node that has the body
        for node in self.graph:
            self.named.update((value.name or "", value) for value in node.outputs)
            self.reads[node] = [value for value in reads_of(node, self.graph) if value.graph is self.graph]
            for body in bodies(node):
                for inner in body.all_nodes():
                    self._homes.update((value.name or "", node.outputs[0]) for value in inner.outputs)

    def depends(self, values: Iterable[str], others: Iterable[str]) -> bool:
        """Tells whether any of `values` is computed from any of `others`."""
        return not self._ancestors(self._found(values)).isdisjoint(v.producer() for v in self._found(others))

    def crossing(
        self, values: Iterable[str], later: Iterable[str], side: Collection[str] = (), more: Collection[str] = ()
    ) -> list[str]:
        """Returns the names of the values to remember once `values` are computed, because `later` ones need them.

        Worth remembering is a value that was costly to compute or is named in `side`. What is no tensor cannot be
        remembered: the nodes that make it run again, from tensors.

        Args:
            values: names of the values computed up to now.
            later: names of the values wanted later.
            side: names of values that are cheap to compute but read by many blocks.
            more: names of values to remember, if computed and costly, whoever reads them.
        """
        wanted = self._found(later)
        done = self._ancestors(self._found(values))
        done -= {node for node in self.reads if not all(map(is_tensor, node.outputs))}
        todo = self._ancestors(wanted) - done
        crossing = dict.fromkeys(value for value in wanted if value.producer() in done)
        for node in self.reads:
            if node in todo:
                crossing |= dict.fromkeys(value for value in self.reads[node] if value.producer() in done)
        crossing |= dict.fromkeys(value for value in self._found(more) if value.producer() in done)
        costly: set[ir.Value] = set()
        for node, reads in self.reads.items():
            if node in done and (not costly.isdisjoint(reads) or is_costly(node)):
                costly.update(node.outputs)
        return [value.name or "" for value in crossing if value in costly or value.name in side]

    def weights(self, have: Collection[str], outputs: Iterable[str]) -> int:
        """Returns the bytes in float32 of the matrices that `outputs` take, computed from the values in `have`."""
        nodes: set[ir.Node] = set()
        pending = self._found(outputs)
        while pending:
            value = pending.pop()
            node = value.producer()
            if value.name not in have and node is not None and node not in nodes:
                nodes.add(node)
                pending += self.reads[node]
        return sum(self._weight(node) for node in nodes)

    def _weight(self, node: ir.Node) -> int:
        """Returns the bytes of the matrices that a node multiplies by."""
        if node not in self._weights:
            self._weights[node] = product_bytes(node)
        return self._weights[node]

    def between(self, have: Collection[str], outputs: Sequence[str]) -> ir.Graph:
        """Returns a copy of the part that computes `outputs`; its inputs are the values in `have` that it needs."""
        inputs: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        nodes: set[ir.Node] = set()
        pending = [self.named[name] for name in outputs]
        while pending:
            value = pending.pop()
            node = value.producer()
            if value.name in have:
                inputs[value] = None
            elif value.is_initializer():
                constants[value] = None
            elif node is not None and node not in nodes:
                nodes.add(node)
                pending += self.reads[node]
        view = ir.GraphView(
            tuple(inputs),
            [self.named[name] for name in outputs],
            nodes=[node for node in self.reads if node in nodes],
            initializers=tuple(constants),
            opset_imports=self.graph.opset_imports,
            name="part",
        )
        part = view.clone()
        fed = {value.name for value in part.inputs}
        for node in part:
            for value in node.outputs:
                if value.name in fed:  # this output of a node is an input already, but another one is needed as well
                    value.name = f"{value.name}/again"
        return part

    def _found(self, names: Iterable[str]) -> list[ir.Value]:
        """Returns the values of these names; for a value in a body, an output of the node that has the body."""
        places = (self.named.get(name, self._homes.get(name)) for name in names)
        return [value for value in places if value is not None]

    def _ancestors(self, values: Iterable[ir.Value]) -> set[ir.Node | None]:
        """Returns the nodes that have to run for `values`."""
        nodes: set[ir.Node | None] = set()
        pending = list(values)
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in nodes:
                nodes.add(node)
                pending += self.reads[node]
        return nodes


def contents(model: Model) -> dict[str, str]:
    """Returns a digest for the name of every value, also in bodies.

    Two digests are equal if the same operators compute the value from the same constants. A constant counts by its
    name, because a model and its edited copies never use a name for two constants. So digests of different processes
    can be compared.
    """
    found: dict[ir.Value | None, str] = {None: ""}
    _digest_graph(model.ir.graph, found)
    return {value.name or "": digest for value, digest in found.items() if value is not None}


def _digest_graph(graph: ir.Graph, found: dict[ir.Value | None, str]) -> None:
    """Adds the digests of all values of a graph and its bodies to `found`."""
    for value in graph.inputs:
        found[value] = _digest("input", value.name)
    for value in graph.initializers.values():
        found[value] = _digest("constant", value.name)
    for node in graph:
        attributes = sorted((a.name, _attribute(a, found)) for a in node.attributes.values())
        reads = [found[value] for value in node.inputs]
        made = _digest(node.domain, node.op_type, node.overload, attributes, reads)
        for index, value in enumerate(node.outputs):
            found[value] = f"{made}/{index}" if index else made


def _attribute(attribute: ir.Attr, found: dict[ir.Value | None, str]) -> str:
    """Returns a text that identifies an attribute; digests of a body's values are added to `found`."""
    if attribute.type == ir.AttributeType.GRAPH:
        body = attribute.as_graph()
        _digest_graph(body, found)
        return _digest(*(found[value] for value in (*body.inputs, *body.outputs)))
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.value
        return _digest(str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
    return repr(attribute.value)


def _digest(*content: Any) -> str:
    """Returns a hash of some values, as 32 hex digits."""
    return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()
