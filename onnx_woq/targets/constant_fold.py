"""Folding of stored codes to the constants that a session with optimizations makes of them when it loads.

Calibration runs parts of a half-quantized model in sessions without optimizations. Without folding, these would expand
the codes for every sample and multiply by the slowest kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.io.model import Model
from onnx_woq.targets.bitplanes import codes_of, planes_behind

_WEIGHT = {"MatMulNBits": slice(1, 4), "GatherBlockQuantized": slice(0, 3)}  # inputs: codes, scales, zero points


def fold_constants(part: Model) -> None:
    """Makes every low-bit operator of a model read constants, in place; inputs that cannot be folded stay computed.

    Large constants are computed when a session asks for them.

    Args:
        part: a model, or part of one, that shares no nodes with another.
    """
    main = part.ir.graph
    for node in list(main.all_nodes()):
        if node.op_type == "DequantizeLinear" and not node.domain and (tensor := _decoded(node)):
            _replace(main, node.outputs[0], tensor)
            continue
        for value in node.inputs[_WEIGHT[node.op_type]] if node.op_type in _WEIGHT else ():
            value = _unshaped(value)
            tensor = None if value is None or value.producer() is None else _folded(value)
            if value is None or tensor is None:
                continue
            _replace(main, value, tensor)


def _replace(main: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Makes everything that reads a computed value read a constant instead."""
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    constant = ir.Value(name=value.name, type=kind, shape=shape, const_value=tensor)
    value.replace_all_uses_with(constant)
    _remove(value)
    main.register_initializer(constant)


def _decoded(node: ir.Node) -> ir.TensorProtocol | None:
    """Returns the float weight that a DequantizeLinear makes of constant codes, None if its codes are computed."""
    codes, value = node.inputs[0], node.outputs[0]
    others = [one for one in node.inputs[1:] if one is not None]
    constants = [constant for one in others if (constant := resolve(one))]
    if codes is None or codes.const_value is None or codes.is_graph_input() or len(constants) < len(others):
        return None
    stored, dtype = codes.const_value, value.dtype or constants[0].dtype
    shape = tuple(int(size) for size in stored.shape.numpy())
    axis, block = (node.attributes.get_int(name, default) for name, default in (("axis", 1), ("block_size", 0)))

    def decode() -> np.ndarray:
        scale, *zero = (_spread(one.array(), shape, axis or 0, block or 0) for one in constants)
        out = stored.numpy().astype(np.float32)
        if zero:
            out -= zero[0]
        out *= scale
        return out.astype(dtype.numpy())

    return ir.LazyTensor(lambda: ir.Tensor(decode(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=value.name)


def _spread(numbers: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Repeats scales or zero points of DequantizeLinear for every code."""
    if block:
        return np.repeat(numbers, block, axis).take(range(shape[axis]), axis)
    return (
        numbers.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]) if numbers.ndim else numbers
    )


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """Returns the input of a Reshape, through which a table reads the codes of its head; any other value as it is."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else value


def _folded(value: ir.Value) -> ir.TensorProtocol | None:
    """Returns the constant that a computed input amounts to, None if this package did not write it."""
    if found := planes_behind(value):
        stored, layout = found
        tensors = [plane.const_value for plane in stored if plane.const_value is not None]
        n, blocks, width = (int(d) for d in tensors[0].shape.numpy())
        return _later(
            value,
            (n, blocks, layout.form.parts * width),
            lambda: codes_of([tensor.numpy() for tensor in tensors], layout),
        )
    constant = resolve(value)
    if constant is None:
        return None
    if not constant.steps:
        return constant.tensor
    return _later(value, constant.shape, constant.array)


def _later(value: ir.Value, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> ir.TensorProtocol:
    dtype = ir.DataType.UINT8 if value.dtype is None else value.dtype
    return ir.LazyTensor(lambda: ir.Tensor(read(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=value.name)


def _remove(value: ir.Value) -> None:
    """Removes what computes a value that nothing reads any more, and the constants it was computed from."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input() and value.graph is not None and value.name:
            value.graph.initializers.pop(value.name)
        return
    inputs = [read for read in node.inputs if read is not None]
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    for read in dict.fromkeys(inputs):
        _remove(read)
