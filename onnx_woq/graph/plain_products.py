"""Products in other forms, written as the MatMul and Gemm that the rest of the package knows; the numbers are the same.

* Gemm with transA: a Transpose in front of its activation.
* FusedMatMul of ONNX Runtime by a constant: a MatMul. What the node does to its weight, a Transpose and a factor, is
  done by nodes in front of the weight, which count as part of the constant.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node
from onnx_woq.graph.fold import follows_from_constants

_OTHERS = ("transA", "transBatchA", "transBatchB")  # of FusedMatMul: they turn the activation, or a stack of weights


def write_plainly(main: ir.Graph) -> None:
    """Rewrites the products by a constant that have another form, in place; nodes and outputs keep their names."""
    for node in list(main.all_nodes()):
        if node.op_type == "Gemm" and not node.domain and node.attributes.get_int("transA"):
            if follows_from_constants(node.inputs[1]) and not follows_from_constants(node.inputs[0]):
                turned = add_node("Transpose", [node.inputs[0]], f"{_name(node)}_turned", before=node, perm=[1, 0])
                node.replace_input_with(0, turned)
                del node.attributes["transA"]
        elif node.op_type == "FusedMatMul" and node.domain == "com.microsoft" and _is_plain(node):
            _write_fused(main, node)


def _is_plain(node: ir.Node) -> bool:
    """Tells whether a FusedMatMul multiplies by a constant, and does to its activation nothing else."""
    by_constant = follows_from_constants(node.inputs[1]) and not follows_from_constants(node.inputs[0])
    return by_constant and not any(node.attributes.get_int(name, 0) for name in _OTHERS)


def _write_fused(main: ir.Graph, node: ir.Node) -> None:
    weight, factor = node.inputs[1], node.attributes.get_float("alpha", 1.0)
    shape, dtype = (weight.shape, weight.dtype) if weight is not None else (None, None)
    if shape is None or dtype is None:
        return
    if node.attributes.get_int("transB", 0) and len(shape) > 1:
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        weight = add_node("Transpose", [weight], f"{_name(node)}_turned", before=node, perm=perm)
    if factor != 1.0:
        number = add_initializer(main, f"{_name(node)}_alpha", np.array(factor, dtype.numpy()), dtype)
        weight = add_node("Mul", [weight, number], f"{_name(node)}_scaled", before=node)
    node.replace_input_with(1, weight)
    node.op_type, node.domain, node.version = "MatMul", "", None
    node.attributes.clear()


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or "product"
