"""The head of a model: the last MatMul before its output, such as the one that makes logits from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_woq.graph.find.constants import FLOATS, resolve

# What may stand between the head and the output: one computed input, channels kept in place.
_TAIL_OPS = {
    "Add", "Cast", "Clip", "Div", "Identity", "LogSoftmax", "Max", "Min", "Mul", "Reshape", "Sigmoid", "Slice",
    "Softmax", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip
_SYMMETRIC = ("Add", "Sub", "Mul", "Div", "Max", "Min")  # every input is data; of the others only the first is


def find_heads(graph: ir.Graph, products: Sequence[ir.Node]) -> set[ir.Node]:
    """Returns the heads of a model: usually one node, several where an If with a head in each branch makes the output.

    A head is found by walking back from the first float output through elementwise and reshaping nodes. A model whose
    output is made otherwise, such as an encoder that ends in a norm, has the last of its products as its head.

    Args:
        graph: the main graph.
        products: the MatMul and Gemm nodes that may be a head, in graph order, those in bodies included.
    """
    candidates = set(products)
    output = next((v for v in graph.outputs if v.dtype in FLOATS), graph.outputs[0] if graph.outputs else None)
    found: set[ir.Node] = set()
    pending = [output]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or value is None:
            continue
        if node in candidates:
            found.add(node)
        elif node.op_type == "If":
            pending += [branch.as_graph().outputs[value.index() or 0] for branch in node.attributes.values()]
        elif node.op_type in _TAIL_OPS:
            computed = [v for v in node.inputs if v is not None and resolve(v) is None and not v.is_graph_input()]
            data = computed if node.op_type in _SYMMETRIC else computed[:1]
            pending += data if len(data) == 1 else []
    last = [node for node in products if node.graph is graph]
    return found or set(last[-1:])
