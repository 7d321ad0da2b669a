"""Find what makes the keys and values of attention, and where the model says how much attention each token receives.

An error in the key or value of a token reaches every query that attends to it. Decoders send a third to nine tenths of
all attention to their first token ("attention sink": Xiao et al. 2023), which in a plain sum over tokens counts as one
of hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.io.model import Model

FIRST_TOKEN = "first token"  # noqa: S105
"""Stands for the probabilities of an operator that keeps them to itself and attends to earlier tokens only."""

HEADS_AXIS = -3
"""Of attention probabilities: the others may be missing in front, these three are always there."""

_KEEP_ORDER = {"Cast", "Dropout", "Identity", "Where"}  # what exporters put between softmax and product
_ARRANGE = {"Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
_CHANGE = {
    "Add", "Cast", "Clip", "Concat", "Div", "Identity", "LayerNormalization", "Mul", "Neg", "Pow", "ReduceMean",
    "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "Sqrt", "Sub",
}  # fmt: skip
_FUSED = {"GroupQueryAttention": 1, "MultiHeadAttention": 0}  # operator -> `unidirectional` where it is not said


def attended(model: Model) -> dict[ir.Node, str]:
    """MatMul and Gemm nodes that make keys or values -> the name of the attention probabilities `[B, H, T, S]`.

    Where one operator does all of attention and looks only back, the name is `FIRST_TOKEN`. A product that makes
    queries as well (q, k and v in one) counts. What cannot be followed is left out.
    """
    found: dict[ir.Node, str] = {}
    for graph in model.ir.graphs():
        for node in graph:
            for value, probabilities in _reads(node):
                for linear in _makers(value):
                    found.setdefault(linear, probabilities)
    return found


def sum_over_heads(part: Model, names: Iterable[str]) -> dict[str, str]:
    """Lets `part` output the squares of attention probabilities, summed over heads: name of the output -> of that.

    Probabilities [B, H, T, S] become [B, T, S], the [H, T, S] of exporters without a batch axis [T, S].
    """
    graph = part.ir.graph
    outputs = {value.name: index for index, value in enumerate(graph.outputs)}
    renamed: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in outputs:
            continue
        value = graph.outputs[outputs[name]]
        operands = [value]
        attributes: dict[str, Any] = {"keepdims": 0}
        if graph.opset_imports.get("", 1) >= 18:
            operands.append(add_initializer(graph, f"{name}_heads", np.array([HEADS_AXIS], np.int64)))
        else:
            attributes["axes"] = [HEADS_AXIS]
        total = add_node("ReduceSumSquare", operands, f"{name}_squares", end_of=graph, **attributes)
        total.type = value.type
        graph.outputs[outputs[name]] = total
        renamed[name] = total.name or ""
    return renamed


def _reads(node: ir.Node) -> Iterator[tuple[ir.Value | None, str]]:
    """The keys and values that a node attends with, each with the name of the probabilities."""
    if node.domain == "com.microsoft" and node.op_type in _FUSED:
        attribute = node.attributes.get("unidirectional")
        if attribute.as_int() if attribute is not None else _FUSED[node.op_type]:
            packed = len(node.inputs) < 3 or node.inputs[1] is None
            for value in node.inputs[:1] if packed else node.inputs[1:3]:
                yield value, FIRST_TOKEN
    elif node.op_type == "Softmax" and node.domain == "":
        product, probabilities = _product(node.outputs[0])
        scores = _scores(node.inputs[0])
        if product is not None and scores is not None:
            yield product.inputs[1], probabilities.name or ""
            yield scores.inputs[1], probabilities.name or ""


def _product(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """The product of attention probabilities with values, and the factor it reads."""
    for node, index in value.uses():
        if node.op_type == "MatMul" and index == 0 and resolve(node.inputs[1]) is None:
            return node, value
    for node, _ in value.uses():
        if node.op_type in _KEEP_ORDER:
            product, factor = _product(node.outputs[0])
            if product is not None:
                return product, factor
    return None, value


def _scores(value: ir.Value | None) -> ir.Node | None:
    """The product of queries with keys that a softmax is taken of."""
    pending, seen = [value], set()
    while pending:
        node = value.producer() if (value := pending.pop()) is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul" and node.domain == "":
            if resolve(node.inputs[1]) is None and resolve(node.inputs[0]) is None:
                return node
        elif node.op_type in _KEEP_ORDER | _CHANGE:
            pending += node.inputs
    return None


def _makers(value: ir.Value | None) -> list[ir.Node]:
    """The products with constants that `value` is arranged from."""
    found, pending, seen = [], [value], set()
    while pending:
        node = value.producer() if (value := pending.pop()) is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            if resolve(node.inputs[1]) is not None:
                found.append(node)
        elif node.op_type in _ARRANGE:
            pending.append(node.inputs[0])
        elif node.op_type in _CHANGE:
            pending += node.inputs
    return found
