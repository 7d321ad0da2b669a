"""The bias of a Gemm, for operators that know only a constant bias `[N]`, one number for each output channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.edit import add_initializer, add_node, prune
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.linears import Linear
from onnx_woq.graph.io.model import Model


def corrected_bias(model: Model, linear: Linear, bias: ir.Value | None, correction: np.ndarray) -> ir.Value:
    """Adds a correction to the constant bias of a linear; returns the new bias `[N]`.

    Args:
        model: the model that gets the new constant.
        linear: the linear, which names it.
        bias: `[N]`; None for none, which counts as zeros.
        correction: float32 `[N]`.
    """
    constant = None if bias is None else resolve(bias)
    array = correction if constant is None else correction + constant.array()
    dtype = ir.DataType.FLOAT if linear.dtype == ir.DataType.BFLOAT16 else linear.dtype
    with np.errstate(over="ignore"):
        stored = array.astype(dtype.numpy())
    prune(bias)
    return add_initializer(model.ir.graph, f"{linear.name}_bias", stored, dtype)


def split_bias(model: Model, linear: Linear) -> tuple[ir.Value | None, ir.Value | None]:
    """Returns what a Gemm adds to its product, `beta * C`, as a pair (constant bias `[N]`, value for an Add behind it).

    At most one of them is not None; both are None for a MatMul. The Gemm itself stays as it is.
    """
    c = linear.node.inputs[2] if linear.kind == "Gemm" and len(linear.node.inputs) > 2 else None
    attribute = linear.node.attributes.get("beta")
    beta = 1.0 if attribute is None else attribute.as_float()
    if c is None or beta == 0.0:
        return None, None
    constant = resolve(c)
    if constant is None or constant.overridable:
        return None, c if beta == 1.0 else _scaled(model, linear, c, beta)
    per_channel = constant.shape in ((), (1,), (linear.n,), (1, 1), (1, linear.n))
    dtype = ir.DataType.FLOAT if per_channel and linear.dtype == ir.DataType.BFLOAT16 else linear.dtype
    if beta == 1.0 and (constant.shape == (linear.n,) or not per_channel) and constant.dtype == dtype:
        return (c, None) if per_channel else (None, c)
    array = constant.array() * np.float32(beta)
    if per_channel:
        array = np.broadcast_to(array.reshape(-1), (linear.n,))
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array.astype(dtype.numpy()))
    value = add_initializer(model.ir.graph, f"{linear.name}_bias", stored, dtype)
    return (value, None) if per_channel else (None, value)


def _scaled(model: Model, linear: Linear, c: ir.Value, beta: float) -> ir.Value:
    factor = add_initializer(model.ir.graph, f"{linear.name}_beta", np.array(beta, linear.dtype.numpy()), linear.dtype)
    return add_node("Mul", [c, factor], f"{linear.name}_addend", before=linear.node)
