"""Inner values of a model as outputs, those inside the bodies of If, Loop and Scan nodes included.

A value that leaves a body is flattened to `[tokens, K]`, so that it has one form on every way out:

* If: the branch that does not compute the value yields an empty `[0, K]`;
* Loop: a state variable starts empty and every iteration appends its tokens, so iterations may differ in length;
* Scan: a scan output stacks the iterations, as the state of a Scan may not grow; they have equal length by definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_woq.errors import ModelError
from onnx_woq.graph.edit import add_initializer, add_node, fresh_name, graph_of
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.dependencies import bodies
from onnx_woq.graph.find.quantized import low_bit_dtype, low_bit_shape
from onnx_woq.graph.io.model import Model, clone


def expose(model: Model, value_names: Iterable[str]) -> tuple[Model, dict[str, str]]:
    """Returns a copy of `model` that also outputs the named values.

    Args:
        model: stays as it is.
        value_names: names of values of the main graph, which are output as they are, or of values of bodies, which are
            output as `[tokens, K]`.

    Returns:
        The copy, and value name -> name of the output.

    Raises:
        ModelError: a value does not exist, its body belongs to an operator other than If, Loop and Scan, or its last
            dimension is not known.
    """
    copy = clone(model)
    main = copy.ir.graph
    values = _values(copy)
    owner_of = {body: node for node in main.all_nodes() for body in bodies(node)}
    outputs = {}
    for name in dict.fromkeys(value_names):
        if name not in values:
            raise ModelError(f"the model has no value called {name!r}")
        value = values[name]
        if value.graph is not main:
            value = _take_out(value, owner_of)
            values = _values(copy)  # the outputs of the operators it left may have moved
        if value.is_graph_input() or value.is_initializer():
            value = add_node("Identity", [value], f"{name}_copy", end_of=main)
        if not value.is_graph_output():
            main.outputs.append(value)
        outputs[name] = value.name or ""
    return copy, outputs


def _values(model: Model) -> dict[str, ir.Value]:
    values: dict[str, ir.Value] = {}
    for graph in model.ir.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            values[value.name or ""] = value
    return values


def _take_out(value: ir.Value, owner_of: dict[ir.Graph, ir.Node]) -> ir.Value:
    """Takes a value out of all the bodies it is in; returns it as a value `[tokens, K]` of the main graph."""
    k, dtype = _channels(value)
    flat = value
    while (body := graph_of(flat)) in owner_of:
        node = owner_of[body]
        shape = add_initializer(body, f"{value.name}_rows", np.array([-1, k], np.int64))
        flat = add_node("Reshape", [flat, shape], f"{value.name}_tokens", end_of=body)
        flat.type, flat.shape = ir.TensorType(dtype), ir.Shape([None, k])
        nothing = ir.Tensor(np.empty((0, k), dtype.numpy()), dtype=dtype)
        if node.op_type == "If":
            flat = _take_out_of_if(node, body, flat, nothing)
        elif node.op_type == "Loop":
            flat = _take_out_of_loop(node, body, flat, nothing)
        elif node.op_type == "Scan":
            flat = _take_out_of_scan(node, body, flat)
        else:
            raise ModelError(f"value {value.name!r} is inside a {node.op_type}, which it cannot be taken out of")
        flat.type = ir.TensorType(dtype)
    return flat


def _take_out_of_if(node: ir.Node, taken: ir.Graph, flat: ir.Value, nothing: ir.Tensor) -> ir.Value:
    """Adds an output to an If: `flat` from the branch that computes it, the empty `nothing` from the other one."""
    results = []
    for branch in bodies(node):
        other = branch is not taken
        value = add_node("Constant", [], f"{flat.name}_none", end_of=branch, value=nothing) if other else flat
        results.append((branch, value))
    return _add_output(node, results, len(node.outputs))


def _take_out_of_loop(node: ir.Node, body: ir.Graph, flat: ir.Value, nothing: ir.Tensor) -> ir.Value:
    """Adds a state variable to a Loop that collects `flat` over its iterations; returns its final value."""
    carried = max(0, len(node.inputs) - 2)  # the state variables follow the trip count and the condition
    start = add_node("Constant", [], f"{flat.name}_none", before=node, value=nothing)
    node.resize_inputs(carried + 3)
    node.replace_input_with(carried + 2, start)
    state = ir.Value(name=fresh_name(body, f"{flat.name}_so_far"), type=flat.type, shape=flat.shape)
    body.inputs.append(state)
    collected = add_node("Concat", [state, flat], f"{flat.name}_collected", end_of=body, axis=0)
    collected.type, collected.shape = flat.type, flat.shape
    return _add_output(node, [(body, collected)], carried, first=1)


def _take_out_of_scan(node: ir.Node, body: ir.Graph, flat: ir.Value) -> ir.Value:
    """Adds a scan output to a Scan: `flat` of all iterations, stacked."""
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].as_ints(), 0])
    return _add_output(node, [(body, flat)], len(node.outputs))


def _add_output(node: ir.Node, results: Sequence[tuple[ir.Graph, ir.Value]], place: int, first: int = 0) -> ir.Value:
    """Inserts an output at index `place` of `node` and returns it.

    onnx_ir can add outputs only at the end of a node. So the outputs behind `place` move up by one: each hands its
    name, type and readers to the next one, the last one to the new output.

    Args:
        node: an If, Loop or Scan.
        results: each body of the node, with the value in it that makes the output.
        place: the index of the output.
        first: the number of outputs of a body that are no outputs of the node, such as the condition of a Loop.
    """
    for body, value in results:
        body.outputs.insert(first + place, value)
    node.resize_outputs(len(node.outputs) + 1)
    outputs = node.outputs
    outputs[-1].name = fresh_name(graph_of(node), f"{results[0][1].name}_{node.op_type}")
    for index in range(len(outputs) - 1, place, -1):
        before, after = outputs[index - 1], outputs[index]
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name, after.name = after.name, before.name
        after.type, after.shape, before.type, before.shape = before.type, before.shape, None, None
    return outputs[place]


def _channels(value: ir.Value) -> tuple[int, ir.DataType]:
    """Returns the last dimension and the type of an activation: from the weight it multiplies, else from its shape."""
    for node, index in value.uses():
        if index == 0 and node.op_type in ("MatMul", "Gemm") and (weight := resolve(node.inputs[1])):
            transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
            return weight.shape[-1 if transposed else -2], weight.dtype
        if index == 0 and (shape := low_bit_shape(node)) and (dtype := low_bit_dtype(node)):
            return shape[0], dtype
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int) and value.dtype is not None:
        return value.shape[-1], value.dtype
    raise ModelError(f"the width of value {value.name!r} is not known, so it cannot be taken out of its body")
