"""The linears that make keys and values of attention, and the attention probabilities that weight their tokens.

An error in the key or value of a token reaches every query that attends to the token. Decoders send a third to nine
tenths of all attention to their first token ("attention sink": Xiao et al. 2023), which counts as one of hundreds in a
plain sum over tokens. Hence calibration weights the tokens of these linears by the attention they receive.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.io.model import Model

FIRST_TOKEN = "first token"  # noqa: S105
"""Stands for the attention probabilities of a fused operator that attends to earlier tokens only and hides them."""

_KEEP_ORDER = {"Cast", "Dropout", "Identity", "Where"}  # exporters put these between softmax and product
_ARRANGE = {"Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
_CHANGE = {
    "Add", "Cast", "Clip", "Concat", "Div", "Identity", "LayerNormalization", "Mul", "Neg", "Pow", "ReduceMean",
    "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "Sqrt", "Sub",
}  # fmt: skip
_FUSED = {"GroupQueryAttention": 1, "MultiHeadAttention": 0}  # operator -> its default of `unidirectional`


def find_key_value_linears(model: Model) -> dict[ir.Node, str]:
    """Returns the linears that make keys or values, each with the name of its attention probabilities `[B, H, T, S]`.

    Where one fused operator does all of attention and looks back only, the name is `FIRST_TOKEN`. A linear that makes
    queries as well (q, k and v in one) counts. Attention in a form that cannot be followed is left out.
    """
    found: dict[ir.Node, str] = {}
    for graph in model.ir.graphs():
        for node in graph:
            for value, probabilities in _reads(node):
                for linear in _linears_behind(value):
                    found.setdefault(linear, probabilities)
    return found


def _reads(node: ir.Node) -> Iterator[tuple[ir.Value | None, str]]:
    """Yields the keys and values that a Softmax or fused node attends with, each with the name of the probabilities."""
    if node.domain == "com.microsoft" and node.op_type in _FUSED:
        attribute = node.attributes.get("unidirectional")
        if attribute.as_int() if attribute is not None else _FUSED[node.op_type]:
            packed = len(node.inputs) < 3 or node.inputs[1] is None
            for value in node.inputs[:1] if packed else node.inputs[1:3]:
                yield value, FIRST_TOKEN
    elif node.op_type == "Softmax" and node.domain == "":
        product, probabilities = _product_with_values(node.outputs[0])
        scores = _product_with_keys(node.inputs[0])
        if product is not None and scores is not None:
            yield product.inputs[1], probabilities.name or ""
            yield scores.inputs[1], probabilities.name or ""


def _product_with_values(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """Returns the product of the attention probabilities `value` with values, and its left factor."""
    for node, index in value.uses():
        if node.op_type == "MatMul" and index == 0 and resolve(node.inputs[1]) is None:
            return node, value
    for node, _ in value.uses():
        if node.op_type in _KEEP_ORDER:
            product, factor = _product_with_values(node.outputs[0])
            if product is not None:
                return product, factor
    return None, value


def _product_with_keys(value: ir.Value | None) -> ir.Node | None:
    """Returns the product of queries with keys behind the scores `value` that a Softmax reads."""
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


def _linears_behind(value: ir.Value | None) -> list[ir.Node]:
    """Returns the linears whose outputs are rearranged to `value`, with biases, norms and rotations on the way."""
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
