"""What a graph computes from what: ancestors, cuts, and whether two values are the same computation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import onnx_ir as ir

from onnx_woq.graph.find.dependencies import bodies, is_costly, product_bytes, reads_of
from onnx_woq.graph.io.model import Model


class Structure:
    """The main graph of a model as it is now; what happens in bodies counts as the doing of the node that has them.

    Attributes:
        graph: the main graph.
        named: every value of it by name, initializers left out.
        reads: node of the main graph -> the values of the main graph it reads, in its bodies too.
    """

    def __init__(self, model: Model) -> None:
        self.graph = model.ir.graph
        self.named: dict[str, ir.Value] = {value.name or "": value for value in self.graph.inputs}
        self.reads: dict[ir.Node, list[ir.Value]] = {}
        self._weights: dict[ir.Node, int] = {}
        self._homes: dict[str, ir.Value] = {}  # value in a body -> an output of the node that has it
        for node in self.graph:
            self.named.update((value.name or "", value) for value in node.outputs)
            self.reads[node] = [value for value in reads_of(node, self.graph) if value.graph is self.graph]
            for body in bodies(node):
                for inner in body.all_nodes():
                    self._homes.update((value.name or "", node.outputs[0]) for value in inner.outputs)

    def depends(self, values: Iterable[str], others: Iterable[str]) -> bool:
        """Whether any of `values` is computed from any of `others`."""
        return not self._ancestors(self._found(values)).isdisjoint(v.producer() for v in self._found(others))

    def crossing(
        self, values: Iterable[str], later: Iterable[str], side: Collection[str] = (), more: Collection[str] = ()
    ) -> list[str]:
        """Names of what is known once `values` are and is read on the way to `later`, if worth remembering.

        That is what was costly to compute, and what `side` names: cheap, but read again and again. `more` names values
        to remember, if known and costly, whoever reads them.
        """
        wanted = self._found(later)
        done = self._ancestors(self._found(values))
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
        """Bytes of the matrices, in float32, multiplied on the way from the values in `have` to `outputs`."""
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
        if node not in self._weights:
            self._weights[node] = product_bytes(node)
        return self._weights[node]

    def between(self, have: Collection[str], outputs: Sequence[str]) -> ir.Graph:
        """A copy of the part that computes `outputs` from those values in `have` that it needs: its inputs."""
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
                if value.name in fed:  # one output of a node is there already, another one has to be computed again
                    value.name = f"{value.name}/again"
        return part

    def _found(self, names: Iterable[str]) -> list[ir.Value]:
        """The values called so, or an output of the node in whose bodies they are."""
        places = (self.named.get(name, self._homes.get(name)) for name in names)
        return [value for value in places if value is not None]

    def _ancestors(self, values: Iterable[ir.Value]) -> set[ir.Node | None]:
        """The nodes that have to run for `values`."""
        nodes: set[ir.Node | None] = set()
        pending = list(values)
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in nodes:
                nodes.add(node)
                pending += self.reads[node]
        return nodes


def contents(model: Model) -> dict[str, str]:
    """Value name -> a digest that is equal where the same operators compute it from the same constants.

    It covers the bodies' values too. Constants go by their names, which are never used twice in a model and its edited
    copies, so that digests can be compared from one process to the next.
    """
    found: dict[ir.Value | None, str] = {None: ""}
    _digest_graph(model.ir.graph, found)
    return {value.name or "": digest for value, digest in found.items() if value is not None}


def _digest_graph(graph: ir.Graph, found: dict[ir.Value | None, str]) -> None:
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
    if attribute.type == ir.AttributeType.GRAPH:
        body = attribute.as_graph()
        _digest_graph(body, found)
        return _digest(*(found[value] for value in (*body.inputs, *body.outputs)))
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.value
        return _digest(str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
    return repr(attribute.value)


def _digest(*content: Any) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()
