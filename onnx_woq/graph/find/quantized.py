"""Nodes that already carry low-bit weights, whatever operator wrote them.

Two forms exist. An operator of ONNX Runtime (domain `com.microsoft`) holds the codes itself: MatMulNBits, MatMulBnb4,
GatherBlockQuantized and the like. Or a DequantizeLinear of the ONNX standard turns constant codes into floats, and a
MatMul, Gemm or Gather reads those. The rest of `graph/` asks here instead of naming one operator.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_woq.graph.find.constants import Constant, resolve
from onnx_woq.graph.io.model import Model

LOW_BIT_OPS = {"MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE"}
"""The operators of ONNX Runtime for block-quantized weights."""

_BELOW_8_BITS = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.FLOAT4E2M1}
_8_BITS = {ir.DataType.INT8, ir.DataType.UINT8}
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # operator -> index of the input that a weight comes in by
_SCALES = 2  # index of the input of a `com.microsoft` product that the scales come in by


def low_bit_nodes(model: Model) -> int:
    """Returns the number of nodes that carry low-bit weights, in the graph, its bodies and its functions.

    These count:

    * the operators of ONNX Runtime for block-quantized weights;
    * QuantizeLinear and DequantizeLinear of a type below 8 bits;
    * DequantizeLinear of a constant int8 or uint8 matrix that a MatMul, Gemm or Gather reads as its weight.

    The 8-bit QuantizeLinear and DequantizeLinear around activations do not.
    """
    functions = (node for function in model.ir.functions.values() for node in function.all_nodes())
    return sum(map(_is_low_bit, (*model.ir.graph.all_nodes(), *functions)))


def low_bit_shape(node: ir.Node) -> tuple[int, int] | None:
    """Returns `(K, N)` of the low-bit weight `[K, N]` that a node multiplies by, None if it multiplies by none.

    Such a node is a `com.microsoft` operator with the integer attributes K and N, or a MatMul or Gemm whose right
    factor is the output of a DequantizeLinear over constants. The output of a DequantizeLinear has the shape of its
    codes (ONNX operator spec); a Gemm with transB=1 reads them as `[N, K]`.
    """
    if node.domain == "com.microsoft":
        sizes = [node.attributes.get(name) for name in ("K", "N")]
        if any(size is None or size.type != ir.AttributeType.INT for size in sizes):
            return None
        k, n = (size.as_int() for size in sizes if size is not None)
        return k, n
    dequantize = dequantized_factor(node)
    codes = None if dequantize is None else _codes(dequantize)
    if codes is None or len(codes.shape) < 2 or any(size != 1 for size in codes.shape[:-2]):
        return None
    k, n = codes.shape[-2:]
    transposed = node.attributes.get("transB") if node.op_type == "Gemm" else None
    return (n, k) if transposed is not None and transposed.as_int() else (k, n)


def low_bit_dtype(node: ir.Node) -> ir.DataType | None:
    """Returns the type that a node with a `low_bit_shape` computes in: that of its scales, None if it is not known."""
    dequantize = dequantized_factor(node)
    if dequantize is None:
        scales = node.inputs[_SCALES] if len(node.inputs) > _SCALES else None
    else:
        asked = dequantize.attributes.get("output_dtype")
        if asked is not None and asked.as_int():
            return ir.DataType(asked.as_int())
        scales = dequantize.inputs[1]
    return None if scales is None else scales.dtype


def dequantized_factor(node: ir.Node) -> ir.Node | None:
    """Returns the DequantizeLinear whose output is the right factor of a MatMul or Gemm, None if there is none."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _codes(dequantize: ir.Node) -> Constant | None:
    """Returns the codes that a DequantizeLinear reads, None unless all its inputs are constant."""
    constants = [resolve(value) for value in dequantize.inputs if value is not None]
    return constants[0] if len(constants) > 1 and None not in constants else None


def _is_low_bit(node: ir.Node) -> bool:
    if node.op_type in LOW_BIT_OPS:
        return True
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return False
    if any(value is not None and value.dtype in _BELOW_8_BITS for value in (*node.inputs, *node.outputs)):
        return True
    return node.op_type == "DequantizeLinear" and _is_8_bit_weight(node)


def _is_8_bit_weight(dequantize: ir.Node) -> bool:
    """Tells whether a DequantizeLinear reads a constant matrix of bytes and a product or Gather reads the result."""
    codes = resolve(dequantize.inputs[0]) if dequantize.inputs else None
    if codes is None or len(codes.shape) != 2 or codes.dtype not in _8_BITS:
        return False
    return any(
        not node.domain and _WEIGHT_INPUT.get(node.op_type) == index for node, index in dequantize.outputs[0].uses()
    )
