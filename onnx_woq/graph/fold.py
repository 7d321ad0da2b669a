"""Weights that follow from constants alone: the nodes in between are computed when somebody reads the weight.

Exporters and tools leave a Reshape, a Split, a Mul by a number or fake quantization between a constant and the product
that reads it. Such a weight becomes a constant of its own here, whose numbers are computed by ONNX's reference
implementation each time they are read, so that nothing is computed when a model is loaded. Identity, Transpose and Cast
are left as they are: `graph.find.constants` looks through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx.reference import ReferenceEvaluator

from onnx_woq.errors import ModelError
from onnx_woq.graph.edit import LARGE, add_constant
from onnx_woq.graph.find.constants import FLOATS, mapped, resolve

_WEIGHT = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # operator -> the input that a weight comes in by
_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
_RANDOM |= {"RandomUniformLike"}
_QUANTIZING = 19  # the first opset whose quantizing operators have a reference implementation
_LONGEST = 64  # nodes between constants and a weight: more are no weight but a table that is computed, such as a mask


def fold_weights(main: ir.Graph) -> None:
    """Makes every weight of a product or Gather that follows from constants alone a constant, in place.

    A weight stays as it is where the constant would take more bytes than those it is made of, or where it is made of
    low-bit codes.

    Args:
        main: the main graph, whose value names are unique over all bodies.
    """
    made: dict[object, ir.Value | None] = {}
    known: dict[ir.Value, bool] = {}
    for node in list(main.all_nodes()):
        index = _WEIGHT.get(node.op_type, -1)
        if node.domain or not 0 <= index < len(node.inputs):
            continue
        value = node.inputs[index]
        if value is None or value.producer() is None or resolve(value) or not follows_from_constants(value, known):
            continue
        recipe = _Recipe.of(value)
        if recipe is None:
            continue
        key = recipe.key(value)
        if key not in made:
            made[key] = _constant(main, value, recipe)
        if constant := made[key]:
            node.replace_input_with(index, constant)
            _remove(value)


def follows_from_constants(value: ir.Value | None, known: dict[ir.Value, bool] | None = None) -> bool:
    """Tells whether a value is a constant, or is computed from constants by nodes that always give the same.

    Args:
        value: the value; None for an input left out, which counts as constant.
        known: answers for other values, which is added to.
    """
    known = {} if known is None else known
    pending = [value]
    while pending:
        one = pending[-1]
        if one is None or one in known:
            pending.pop()
            continue
        node = one.producer()
        if node is None:
            known[one] = one.is_initializer() and one.const_value is not None and not one.is_graph_input()
        elif node.domain or node.op_type in _RANDOM or any(_is_body(a) for a in node.attributes.values()):
            known[one] = False
        else:
            reads = [read for read in node.inputs if read is not None]
            if any(known.get(read) is False for read in reads):
                known[one] = False
            elif unknown := [read for read in reads if read not in known]:
                pending.append(unknown[0])
            else:
                known[one] = True
    return value is None or known[value]


@dataclass
class _Recipe:
    """The nodes and constants that a weight is computed from.

    Attributes:
        nodes: in an order in which they can run.
        leaves: the constants, by name.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    leaves: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    @classmethod
    def of(cls, value: ir.Value) -> _Recipe | None:
        """Returns the recipe of a value, None if it takes more than `_LONGEST` nodes."""
        recipe, seen = cls(), set[ir.Node]()
        pending: list[ir.Value | ir.Node] = [value]
        while pending:
            one = pending.pop()
            if isinstance(one, ir.Node):  # all that it reads is there
                recipe.nodes.append(one)
            elif (node := one.producer()) is None:
                if one.const_value is not None:
                    recipe.leaves[one.name or ""] = one.const_value
            elif node not in seen:
                seen.add(node)
                pending.append(node)
                pending += [read for read in node.inputs if read is not None]
            if len(seen) > _LONGEST:
                return None
        return recipe

    def key(self, value: ir.Value) -> object:
        """Returns a key that is equal for values that the same nodes compute from the same constants."""
        places: dict[ir.Value | None, object] = {None: None}
        steps = []
        for number, node in enumerate(self.nodes):
            attributes = tuple(
                (name, id(a.value) if a.type == ir.AttributeType.TENSOR else repr(a.value))
                for name, a in sorted(node.attributes.items())
            )
            steps.append((node.op_type, attributes, tuple(places.get(read, id(read)) for read in node.inputs)))
            places |= {output: (number, index) for index, output in enumerate(node.outputs)}
        return (tuple(steps), places[value])

    def model(self, name: str, opset: int) -> onnx.ModelProto:
        """Returns a model that computes the value `name`; large constants are its inputs."""
        inputs, small = [], []
        for leaf, tensor in self.leaves.items():
            shape = [int(d) for d in tensor.shape.numpy()]
            if tensor.nbytes > LARGE:
                inputs.append(onnx.helper.make_tensor_value_info(leaf, int(tensor.dtype), shape))
            else:
                small.append(onnx.helper.make_tensor(leaf, int(tensor.dtype), shape, tensor.tobytes(), raw=True))
        nodes = [ir.to_proto(node) for node in self.nodes]
        graph = onnx.helper.make_graph(nodes, "weight", inputs, [onnx.ValueInfoProto(name=name)], small)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _constant(main: ir.Graph, value: ir.Value, recipe: _Recipe) -> ir.Value | None:
    """Adds the constant that a value amounts to; returns None if it is better left as it is."""
    name = value.name or ""
    held = [*recipe.leaves.items(), *((n.name or "", n.attributes["value"].value) for n in recipe.nodes if _holds(n))]
    root, largest = max(held, key=lambda pair: pair[1].nbytes, default=("", None))
    if largest is None or largest.dtype not in FLOATS:
        return None
    try:
        model = recipe.model(name, main.opset_imports.get("", 1))
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        inferred = model.graph.output[0].type.tensor_type
        evaluator = _evaluator(model)
    except Exception:  # of many types, for nodes it does not know
        return None
    dims = [d.dim_value for d in inferred.shape.dim]
    dtype = ir.DataType(inferred.elem_type)
    if len(dims) < 2 or 0 in dims or dtype not in FLOATS:
        return None
    large = {leaf: tensor for leaf, tensor in recipe.leaves.items() if tensor.nbytes > LARGE}

    def read() -> ir.Tensor:
        try:
            (array,) = evaluator.run(None, {leaf: mapped(tensor) for leaf, tensor in large.items()})
        except Exception as error:  # whatever NumPy and the reference implementation raise
            raise ModelError(f"weight {name!r} cannot be computed from {root!r} ({error}): exclude it") from error
        return ir.Tensor(array, dtype=dtype)

    tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(dims), name=name)
    if tensor.nbytes > sum(one.nbytes for _, one in held):
        return None
    return add_constant(main, f"{root}_folded", tensor)


def _evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Returns what runs a small model; quantizing operators are raised to an opset that has a reference."""
    quantizes = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    if quantizes and model.opset_import[0].version < _QUANTIZING:
        model = version_converter.convert_version(model, _QUANTIZING)
    return ReferenceEvaluator(model)


def _holds(node: ir.Node) -> bool:
    attribute = node.attributes.get("value") if node.op_type == "Constant" else None
    return attribute is not None and attribute.type == ir.AttributeType.TENSOR


def _is_body(attribute: ir.Attr) -> bool:
    return attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _remove(value: ir.Value | None) -> None:
    """Removes what computes a value that nothing reads any more, and the constants that it was computed from."""
    if value is None or value.is_graph_output() or value.uses():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and value.graph is not None and value.name:
            value.graph.initializers.pop(value.name)
        return
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    reads = list(dict.fromkeys(node.inputs))
    node.graph.remove(node, safe=True)
    for read in reads:
        _remove(read)
