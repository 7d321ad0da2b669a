"""Replacement of an If by one of its branches, where every sample takes the same one.

A merged decoder is one If over "is there a past?" whose branches hold all layers. An If can only run whole. Once the
branch that the samples take is inlined, its layers are nodes of the main graph like any others, which can be cut into
blocks. A set of decisions is a mapping `taken`: name of the first output of an If -> the value of its condition.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnx_woq.graph.edit import fresh_name
from onnx_woq.graph.find.blocks import forget
from onnx_woq.graph.find.dependencies import is_costly
from onnx_woq.graph.io.model import Model, clone


def find_conditions(model: Model) -> dict[str, str]:
    """Returns the conditions that decide between branches with weights: first output of the If -> condition, by name.

    Only Ifs of the main graph count whose condition follows from the inputs alone, so that finding it out costs next to
    nothing.
    """
    costly: set[ir.Node | None] = set()
    found: dict[str, str] = {}
    for node in model.ir.graph:
        if node.op_type == "If" and is_costly(node) and node.inputs[0] is not None:
            if not _depends_on(node.inputs[0], costly):
                found[node.outputs[0].name or ""] = node.inputs[0].name or ""
            costly.add(node)
        elif is_costly(node) or any(v is not None and v.producer() in costly for v in node.inputs):
            costly.add(node)
    return found


def untaken_values(model: Model, taken: Mapping[str, bool]) -> set[str]:
    """Returns the names of the values that `inline_branches` drops with the branches that are not taken."""
    names: set[str] = set()
    for node in model.ir.graph:
        if node.op_type == "If" and node.outputs[0].name in taken:
            body = node.attributes["else_branch" if taken[node.outputs[0].name or ""] else "then_branch"].as_graph()
            names.update(value.name or "" for inner in body.all_nodes() for value in inner.outputs)
    return names


def inline_branches(model: Model, taken: Mapping[str, bool]) -> Model:
    """Returns a copy of `model` with the branches that `taken` chooses in the main graph, in place of the Ifs.

    Values keep their names. Those of the other branches are gone, see `untaken_values`.

    Args:
        model: stays as it is, and is returned itself if `taken` is empty.
        taken: name of the first output of an If -> the value of its condition.
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


def _depends_on(value: ir.Value, costly: set[ir.Node | None]) -> bool:
    return value.producer() is not None and value.producer() in costly
