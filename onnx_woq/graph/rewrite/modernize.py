"""Old and unusual models in the form that the rest of the package takes: what `onnx-woq convert` does.

None of this is done unasked. A caller of the model may override an initializer that is an input as well, a model may
want its double precision, and a converter may not know a node.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_woq.graph.edit import add_node, fresh_name
from onnx_woq.graph.io.model import OPSETS, Model
from onnx_woq.graph.rewrite.raise_opset import raise_opset
from onnx_woq.graph.rewrite.upcast import set_precision


def modernize(model: Model) -> tuple[Model, list[str]]:
    """Returns a model that computes the same from today's operators, and lines for people on what was changed.

    * Initializers that are inputs as well become constants.
    * Double precision becomes single, except in the model's own inputs and outputs.
    * An opset before `OPSETS` is raised to the first of them.

    Args:
        model: from `load` with `convert`; it is changed in place.

    Raises:
        ModelError: the version converter cannot convert the model.
    """
    done = []
    if count := _freeze(model.ir.graph):
        done.append(f"{count} initializers that were inputs as well are constants now")
    if count := _to_single(model):
        done.append(f"{count} values in double precision are in single now")
    model.ir.ir_version = max(model.ir.ir_version, 4)  # the first in which initializers need not be inputs
    before = model.ir.opset_imports[""]
    if before < OPSETS[0]:
        model = raise_opset(model, OPSETS[0])
        done.append(f"the opset is {OPSETS[0]} instead of {before}")
    return model, done


def _freeze(graph: ir.Graph) -> int:
    """Takes the initializers out of the inputs of a graph; returns how many there were."""
    values = [value for value in graph.inputs if value.is_initializer()]
    for value in values:
        graph.inputs.remove(value)
    return len(values)


def _to_single(model: Model) -> int:
    """Turns double precision into single, with Casts at inputs and outputs; returns how many values it was."""
    graph, double = model.ir.graph, ir.TensorType(ir.DataType.DOUBLE)
    inputs = [value for value in graph.inputs if value.dtype == ir.DataType.DOUBLE]
    outputs = [index for index, value in enumerate(graph.outputs) if value.dtype == ir.DataType.DOUBLE]
    count = set_precision(model, (ir.DataType.DOUBLE,))
    for value in inputs:
        value.type = double
        uses = list(value.uses())
        cast = add_node("Cast", [value], f"{value.name}_single", before=graph[0], to=ir.DataType.FLOAT)
        for node, index in uses:
            node.replace_input_with(index, cast)
    for index in outputs:
        value = graph.outputs[index]
        if value in inputs:
            continue
        name = value.name or ""
        value.name = fresh_name(graph, f"{name}_single")
        cast = add_node("Cast", [value], f"{name}_double", end_of=graph, to=ir.DataType.DOUBLE)
        cast.name, cast.type, cast.shape = name, double, value.shape
        graph.outputs[index] = cast
    return count
