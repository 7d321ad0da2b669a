"""Small edits of a graph: new constants and nodes, under names that nothing else has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

LARGE = 1024  # bytes; a tensor above it is kept in a file, the others are part of the structure
_NAMES = "onnx_woq names"  # key of the set of value names in the `meta` of every graph of a model; never saved


def share_names(graphs: Iterable[ir.Graph], names: set[str]) -> None:
    """Lets every graph of a model know the names in use in all of them."""
    for graph in graphs:
        graph.meta[_NAMES] = names


def unshare_names(copy: ir.Model) -> None:
    """Gives a clone names of its own: what it takes later, its original does not know of."""
    if names := copy.graph.meta.get(_NAMES):
        share_names(copy.graphs(), set(names))


def fresh(graph: ir.Graph, name: str) -> str:
    """`name`, or `name_2`, `name_3` … when some value of the model has it; taken from now on."""
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
    """The graph that `item` is in."""
    graph = item.graph
    if graph is None:
        raise ValueError(f"{item.name!r} is not in a graph: it was removed, or belongs to an earlier copy")
    return graph


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer of `graph`, called `name` if nothing else is."""
    return add_constant(graph, name, ir.Tensor(array, dtype=dtype))


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """As `add_initializer`, of a tensor, which is named as well."""
    tensor.name = name = fresh(graph, name)
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
    """Adds a node of the default domain and returns its only output; both are called `name` if nothing else is."""
    beside = before if before is not None else after
    graph = graph_of(beside) if beside is not None else end_of
    if graph is None:
        raise ValueError("say where the node goes")
    name = fresh(graph, name)
    node = ir.node(op, inputs, attributes=attributes, outputs=[ir.Value(name=name)], name=name)
    if before is not None:
        graph.insert_before(before, node)
    elif after is not None:
        graph.insert_after(after, node)
    else:
        graph.append(node)
    return node.outputs[0]


def insert_after(
    node: ir.Node,
    op: str,
    others: Sequence[ir.Value],
    suffix: str,
    *,
    label: str = "",
    **attributes: int | Sequence[int],
) -> ir.Value:
    """Inserts a node behind `node` that takes over its output: name, type, readers. Returns what `node` makes now.

    Args:
        node: its first output becomes the first input of the new node.
        op: of the default domain.
        others: the other inputs.
        suffix: of the name that the value in between gets.
        label: ends the name of the new node; `op` by default.
        attributes: of the new node.
    """
    graph = graph_of(node)
    product = node.outputs[0]
    name = product.name or ""
    result = ir.Value(type=product.type, shape=product.shape)
    new = ir.node(op, [None, *others], attributes=attributes, outputs=[result], name=f"{node.name or name}_{label or op}")
    graph.insert_after(node, new)
    product.replace_all_uses_with(result, replace_graph_outputs=True)
    new.replace_input_with(0, product)
    product.name, result.name = fresh(graph, f"{name}_{suffix}"), name
    return product


def prune(value: ir.Value | None) -> None:
    """Removes a constant, and the nodes between it and its former reader, as far as nothing else reads them."""
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
    """Whether a tensor belongs into a file rather than into the structure."""
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > LARGE


def is_movable(value: ir.Value) -> bool:
    """Whether a body's initializer can live in the main graph instead."""
    return not value.is_graph_input() and not value.is_graph_output()


def lift_constants(graphs: Iterable[ir.Graph], elements: int) -> None:
    """Makes an initializer of every Constant node with a tensor of at least so many elements."""
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
    """Moves large constants of bodies to the main graph: runtimes take them from outside only there.

    Value names must be unique over all graphs.
    """
    for graph in model.graph.subgraphs():
        for name, value in list(graph.initializers.items()):
            if value.const_value is not None and is_large(value.const_value) and is_movable(value):
                graph.initializers.pop(name)
                model.graph.initializers.add(value)
