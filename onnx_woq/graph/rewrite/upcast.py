"""Conversion of a half-precision model, or part of one, to float32; also of one in double precision.

ONNX Runtime has next to no float16 kernels for the CPU and no bfloat16 ones. For float16 it casts around every node and
rounds where a part of a model ends, so the numbers would depend on how the model is cut. bfloat16 it does not run at
all. A part is therefore upcast before it runs. Its large weights are converted only when the session reads them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import is_large
from onnx_woq.graph.find.constants import release
from onnx_woq.graph.io.model import Model

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The types that `upcast` turns into float32."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def upcast(part: Model) -> None:
    """Turns every float16 and bfloat16 value of `part` into float32, in place.

    Args:
        part: a model that shares no nodes or values with another one; its tensors may be shared.
    """
    set_precision(part, HALF)


def set_precision(part: Model, dtypes: tuple[ir.DataType, ...]) -> int:
    """Turns every value of some types into float32, in place; returns how many constants and typed values it were.

    Args:
        part: a model that shares no nodes or values with another one; its tensors may be shared.
        dtypes: the types.
    """
    count = 0
    for graph in part.ir.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            constant = value.const_value is not None and value.const_value.dtype in dtypes
            if constant or (value.dtype in dtypes and isinstance(value.type, ir.TensorType)):
                value.type = ir.TensorType(ir.DataType.FLOAT)
                count += 1
            if constant and value.const_value is not None:
                value.const_value = _as_float32(value.const_value)
        for node in graph:
            _set_attributes(node, dtypes)
    return count


def _set_attributes(node: ir.Node, dtypes: tuple[ir.DataType, ...]) -> None:
    for name, attribute in list(node.attributes.items()):
        # `value` rather than `as_tensor`, which asks every tensor whether it is one
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in dtypes:
            node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.value, now=True))
        elif name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and attribute.as_int() in dtypes:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _as_float32(tensor: ir.TensorProtocol, *, now: bool = False) -> ir.TensorProtocol:
    def read() -> ir.Tensor:
        array = tensor.numpy().astype(np.float32)
        release(tensor)
        return ir.Tensor(array, name=tensor.name)

    if now or not is_large(tensor):
        return read()
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "")
