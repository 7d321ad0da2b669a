"""Primitive edits of a graph: adding constants and nodes under names of their own, removing what nothing reads.

Every graph of a model knows one set of the value names in use in all of them, so that a new name is unique in the whole
model: value names must be, once constants move from bodies to the main graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import onnx_ir as ir

LARGE = 1024  # bytes; a larger tensor is kept in a file, the others are part of the structure
_NAMES = "onnx_woq names"  # key of the set of value names in the `meta` of every graph of a model; never saved


def share_names(graphs: Iterable[ir.Graph], names: set[str]) -> None:
    """Gives every graph of a model the set of the value names in use in all of them."""
    for graph in graphs:
        graph.meta[_NAMES] = names


def unshare_names(copy: ir.Model) -> None:
    """Gives a cloned model a set of names of its own, so that names it takes later stay free in the original."""
    if names := copy.graph.meta.get(_NAMES):
        share_names(copy.graphs(), set(names))


def fresh_name(graph: ir.Graph, name: str) -> str:
    """Returns `name`, or `name_2`, `name_3` … if a value of the model has it, and takes the result for the caller."""
    names: set[str] | None = graph.meta.get(_NAMES)
    if names is None:  # not from `load`: know at least this graph and its bodies
        inner = (graph, *graph.subgraphs())
        values = [v for g in inner for v in (*g.inputs, *g.initializers.values(), *(o for n in g for o in n.outputs))]
        names = graph.meta[_NAMES] = {value.name or "" for value in values}
    candidate, count = name, 1
    while candidate in names:
        count += 1
        candidate = f"{name}_{count}"
    names.add(candidate)
    return candidate


def graph_of(item: ir.Node | ir.Value) -> ir.Graph:
    """Returns the graph that a node or value is in.

    Raises:
        ValueError: it is in none: it was removed, or belongs to an earlier copy.
    """
    graph = item.graph
    if graph is None:
        raise ValueError(f"{item.name!r} is not in a graph: it was removed, or belongs to an earlier copy")
    return graph


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Adds an initializer with the data of `array` to `graph`, under the name `name` or the next free one."""
    return add_constant(graph, name, ir.Tensor(array, dtype=dtype))


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds an initializer with the data of `tensor` to `graph`; both get the name `name` or the next free one."""
    tensor.name = name = fresh_name(graph, name)
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def add_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    end_of: ir.Graph | None = None,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    **attributes: int | str | Sequence[int] | ir.TensorProtocol,
) -> ir.Value:
    """Adds a node of the default domain and returns its only output; both get the name `name` or the next free one.

    Args:
        op: the operator.
        inputs: the values it reads; None for an optional input left out.
        name: of the node and its output.
        end_of: the graph to append it to, unless `before` or `after` is given.
        before: the node to insert it before.
        after: the node to insert it behind.
        attributes: of the node.

    Raises:
        ValueError: no place is given.
    """
    beside = before if before is not None else after
    graph = graph_of(beside) if beside is not None else end_of
    if graph is None:
        raise ValueError("say where the node goes")
    name = fresh_name(graph, name)
    node = ir.node(op, inputs, attributes=attributes, outputs=[ir.Value(name=name)], name=name)
    if before is not None:
        graph.insert_before(before, node)
    elif after is not None:
        graph.insert_after(after, node)
    else:
        graph.append(node)
    return node.outputs[0]


@overload
def as_float32(value: ir.Value, name: str, before: ir.Node) -> ir.Value: ...


@overload
def as_float32(value: ir.Value | None, name: str, before: ir.Node) -> ir.Value | None: ...


def as_float32(value: ir.Value | None, name: str, before: ir.Node) -> ir.Value | None:
    """Returns a value in float32: itself, or the output of a Cast called `name` that is added in front of `before`."""
    if value is None or value.dtype == ir.DataType.FLOAT:
        return value
    return add_node("Cast", [value], name, before=before, to=ir.DataType.FLOAT)


def insert_after(
    node: ir.Node,
    op: str,
    others: Sequence[ir.Value],
    suffix: str,
    *,
    label: str = "",
    **attributes: int | Sequence[int],
) -> ir.Value:
    """Inserts a node behind `node` that takes over its first output: name, type and readers.

    Args:
        node: its first output becomes the first input of the new node.
        op: the operator of the new node, of the default domain.
        others: the other inputs of the new node.
        suffix: ends the name that the value between the two nodes gets.
        label: ends the name of the new node; `op` by default.
        attributes: of the new node.

    Returns:
        The value between the two nodes.
    """
    graph = graph_of(node)
    product = node.outputs[0]
    name = product.name or ""
    result = ir.Value(type=product.type, shape=product.shape)
    new_name = f"{node.name or name}_{label or op}"
    new = ir.node(op, [None, *others], attributes=attributes, outputs=[result], name=new_name)
    graph.insert_after(node, new)
    product.replace_all_uses_with(result, replace_graph_outputs=True)
    new.replace_input_with(0, product)
    product.name, result.name = fresh_name(graph, f"{name}_{suffix}"), name
    return product


def prune(value: ir.Value | None) -> None:
    """Removes a constant that has lost a reader, and the nodes in between, as far as nothing else reads them.

    Args:
        value: the former input of the reader: an initializer, or made from one by Identity, Transpose or Cast nodes.
    """
    while value is not None and not value.uses() and not value.is_graph_output():
        node = value.producer()
        if node is None:
            if value.is_initializer() and not value.is_graph_input() and value.graph is not None and value.name:
                value.graph.initializers.pop(value.name)
            return
        if node.op_type not in ("Constant", "Identity", "Transpose", "Cast") or node.graph is None:
            return
        following = node.inputs[0] if node.inputs else None
        node.graph.remove(node, safe=True)
        value = following


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Tells whether a tensor is kept in a file rather than in the structure, see `LARGE`."""
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > LARGE


def is_movable(value: ir.Value) -> bool:
    """Tells whether an initializer of a body can move to the main graph: it is no input or output of the body."""
    return not value.is_graph_input() and not value.is_graph_output()


def lift_constants(graphs: Iterable[ir.Graph], elements: int) -> None:
    """Turns every Constant node whose tensor has at least `elements` elements into an initializer."""
    for graph in graphs:
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and len(node.attributes) == 1:
                _lift_constant(graph, node, elements)


def _lift_constant(graph: ir.Graph, node: ir.Node, elements: int) -> None:
    value, attribute = node.outputs[0], node.attributes.get("value")
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return
    tensor = attribute.value  # `as_tensor` compares it with a protocol, member by member
    if tensor.size < elements or value.is_graph_output() or not value.name:
        return
    constant = ir.Value(
        name=value.name,
        type=ir.TensorType(tensor.dtype),
        shape=tensor.shape,
        const_value=tensor,
        metadata_props=dict(value.metadata_props),
    )
    constant.meta.update(value.meta)
    graph.register_initializer(constant)
    value.replace_all_uses_with(constant)
    graph.remove(node, safe=True)


def lift_large(model: ir.Model) -> None:
    """Moves the large initializers of bodies to the main graph, in place.

    ONNX Runtime takes the data of a tensor from outside the .onnx file only there. Value names must be unique over all
    graphs of the model.
    """
    for graph in model.graph.subgraphs():
        for name, value in list(graph.initializers.items()):
            if value.const_value is not None and is_large(value.const_value) and is_movable(value):
                graph.initializers.pop(name)
                model.graph.initializers.add(value)
