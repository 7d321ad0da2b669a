"""Put one branch of an If in its place, where every sample takes the same one.

A merged decoder is one If over "is there a past?" whose branches hold all layers. As a node it can only run whole; with
the branch that the samples take written out, its layers are nodes of the main graph like any others.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnx_woq.graph.edit import fresh_name
from onnx_woq.graph.find.blocks import forget
from onnx_woq.graph.find.dependencies import is_costly
from onnx_woq.graph.io.model import Model, clone


def conditions(model: Model) -> dict[str, str]:
    """The Ifs of the main graph that hold products and decide by the inputs alone: first output -> condition, names."""
    costly: set[ir.Node | None] = set()
    found: dict[str, str] = {}
    for node in model.ir.graph:
        if node.op_type == "If" and is_costly(node) and node.inputs[0] is not None:
            if not _below(node.inputs[0], costly):
                found[node.outputs[0].name or ""] = node.inputs[0].name or ""
            costly.add(node)
        elif is_costly(node) or any(v is not None and v.producer() in costly for v in node.inputs):
            costly.add(node)
    return found


def untaken(model: Model, taken: Mapping[str, bool]) -> set[str]:
    """Names of the values that `take` leaves out with the other branches."""
    names: set[str] = set()
    for node in model.ir.graph:
        if node.op_type == "If" and node.outputs[0].name in taken:
            body = node.attributes["else_branch" if taken[node.outputs[0].name or ""] else "then_branch"].as_graph()
            names.update(value.name or "" for inner in body.all_nodes() for value in inner.outputs)
    return names


def _below(value: ir.Value, costly: set[ir.Node | None]) -> bool:
    return value.producer() is not None and value.producer() in costly


def take(model: Model, taken: Mapping[str, bool]) -> Model:
    """A copy of `model` with the branches that `taken` names (If's first output -> its condition) in the main graph.

    Values keep their names; those of the other branch are gone.
    """
    if not taken:
        return model
    flat = clone(model)
    forget(flat)
    main = flat.ir.graph
    for node in [n for n in main if n.op_type == "If" and n.outputs[0].name in taken]:
        body = node.attributes["then_branch" if taken[node.outputs[0].name or ""] else "else_branch"].as_graph()
        for name, constant in list(body.initializers.items()):
            body.initializers.pop(name)
            main.initializers.add(constant)
        results = list(body.outputs)
        body.outputs.clear()
        inner = list(body)
        body.remove(inner)
        main.insert_before(node, inner)
        for old, result in zip(list(node.outputs), results, strict=True):
            name = old.name or ""
            old.name = fresh_name(main, f"{name}/untaken")
            new = ir.Value(name=name, type=old.type, shape=old.shape)
            main.insert_before(node, ir.node("Identity", [result], outputs=[new], name=name))
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        main.remove(node, safe=True)
    return flat
