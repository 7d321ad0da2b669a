"""What a graph computes from what: ancestors, cuts, and whether two values are the same computation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnx_woq.graph.model import Model

_PRODUCTS = re.compile("MatMul|Gemm|Conv|LSTM|GRU|RNN|QMoE")


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
        self._owners: dict[ir.Node, ir.Node] = {}  # node in a body -> node of the main graph
        self._homes: dict[str, ir.Value] = {}  # value in a body -> an output of the node that has it
        for node in self.graph:
            self.named.update((value.name or "", value) for value in node.outputs)
            self.reads[node] = [value for value in node.inputs if value is not None]
            for body in _bodies(node):
                for inner in body.all_nodes():
                    self._owners[inner] = node
                    self._homes.update((value.name or "", node.outputs[0]) for value in inner.outputs)
                    self.reads[node] += [v for v in inner.inputs if v is not None and v.graph is self.graph]

    def depends(self, values: Iterable[str], nodes: Collection[ir.Node]) -> bool:
        """Whether any of `values` is computed from the outputs of `nodes`."""
        above = self._ancestors(self._found(values))
        return not above.isdisjoint(self._owners.get(node, node) for node in nodes)

    def crossing(self, values: Iterable[str], later: Iterable[str]) -> list[str]:
        """Names of what is known once `values` are, is read on the way to `later`, and was costly to compute."""
        wanted = self._found(later)
        done = self._ancestors(self._found(values))
        todo = self._ancestors(wanted) - done
        crossing = dict.fromkeys(value for value in wanted if value.producer() in done)
        for node in self.reads:
            if node in todo:
                crossing |= dict.fromkeys(value for value in self.reads[node] if value.producer() in done)
        costly: set[ir.Value] = set()
        for node, reads in self.reads.items():
            if node in done and (not costly.isdisjoint(reads) or _is_costly(node)):
                costly.update(node.outputs)
        return [value.name or "" for value in crossing if value in costly]

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

    def _ancestors(self, values: Iterable[ir.Value]) -> set[ir.Node]:
        """The nodes that have to run for `values`."""
        nodes: set[ir.Node] = set()
        pending = list(values)
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in nodes:
                nodes.add(node)
                pending += self.reads[node]
        return nodes


@dataclass
class Contents:
    """Gives values numbers that are equal exactly when the same operators computed them from the same constants."""

    numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)
    alive: dict[int, Any] = field(default_factory=dict)  # constants, so that no id is used twice

    def of(self, model: Model) -> dict[str, int]:
        """Value name -> number, for every value of the model and its bodies."""
        found: dict[ir.Value | None, int] = {None: 0}
        self._graph(model.ir.graph, found)
        return {value.name or "": number for value, number in found.items() if value is not None}

    def _graph(self, graph: ir.Graph, found: dict[ir.Value | None, int]) -> None:
        for value in graph.inputs:
            found[value] = self._number("input", value.name)
        for value in graph.initializers.values():
            found[value] = self._number("constant", self._identity(value.const_value))
        for node in graph:
            attributes = frozenset((a.name, self._attribute(a, found)) for a in node.attributes.values())
            reads = tuple([found[value] for value in node.inputs])
            for index, value in enumerate(node.outputs):
                found[value] = self._number(node.domain, node.op_type, node.overload, attributes, reads, index)

    def _attribute(self, attribute: ir.Attr, found: dict[ir.Value | None, int]) -> Any:
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            self._graph(body, found)
            return tuple(found[value] for value in (*body.inputs, *body.outputs))
        value = attribute.value
        if isinstance(value, (int, float, str, bytes)):
            return value
        if isinstance(value, Sequence) and all(isinstance(v, (int, float, str, bytes)) for v in value):
            return tuple(value)
        return self._identity(value)

    def _identity(self, thing: Any) -> int:
        self.alive[id(thing)] = thing
        return id(thing)

    def _number(self, *content: Any) -> int:
        return self.numbers.setdefault(content, len(self.numbers) + 1)


def _bodies(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _is_costly(node: ir.Node) -> bool:
    """Whether the node multiplies by a constant matrix, or runs bodies that do: not to be done twice without need."""
    if any(_is_costly(inner) for body in _bodies(node) for inner in body.all_nodes()):
        return True
    constants = (value.const_value for value in node.inputs if value is not None and value.const_value is not None)
    return bool(_PRODUCTS.search(node.op_type)) and any(len(tensor.shape) > 1 for tensor in constants)
