"""The names by which a runtime looks into a body: they stand in the file as they stood, whatever they are here.

The body of an If, Loop or Scan is called by position: its names mean nothing outside of it. The body of any other node,
such as the decoder of `GreedySearch`, is called by the names of its inputs and outputs: its *interface*. In memory,
every value of a model has a name of its own, so an input of such a body is renamed where the main graph has one of the
same name. Where the model becomes a file, the interface has its own names again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir

_INTERFACE = "onnx_woq interface"  # key in the `meta` of a body: the names of its inputs, and those of its outputs


def remember_interfaces(graphs: Iterable[ir.Graph]) -> set[str]:
    """Notes the names of every interface in these graphs, in their bodies; returns the names.

    A body that has its names noted already keeps those.
    """
    names: set[str] = set()
    for graph in graphs:
        for node in graph:
            if node.domain and node.attributes:
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.GRAPH:
                        names.update(*_interface(attribute.as_graph()))
    return names


@contextmanager
def interfaces_restored(graph: ir.Graph) -> Iterator[None]:
    """Gives every interface in the bodies of `graph` the names that were noted, until the `with` block ends."""
    renamed: list[tuple[ir.Value, str | None]] = []
    try:
        for body in graph.subgraphs():
            for values, names in zip((body.inputs, body.outputs), body.meta.get(_INTERFACE, ()), strict=False):
                renamed += _rename(values, names)
        yield
    finally:
        for value, name in renamed:
            value.name = name


def _interface(body: ir.Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if _INTERFACE not in body.meta:
        body.meta[_INTERFACE] = tuple(tuple(value.name or "" for value in side) for side in (body.inputs, body.outputs))
    found: tuple[tuple[str, ...], tuple[str, ...]] = body.meta[_INTERFACE]
    return found


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> list[tuple[ir.Value, str | None]]:
    """Renames values where need be; returns those that it renamed, with the names that they had."""
    changed = [(value, name) for value, name in zip(values, names, strict=True) if value.name != name]
    before = [(value, value.name) for value, _ in changed]
    for value, name in changed:
        value.name = name
    return before
