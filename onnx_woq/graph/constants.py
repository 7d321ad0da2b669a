"""Follow a value back to the constant it is, through the nodes that exporters put in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_woq.errors import ModelError

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Constant:
    """A constant and what happens to it before it is read.

    Attributes:
        root: the initializer, or the output of a Constant node.
        tensor: its data.
        steps: ("Cast", data type) and ("Transpose", permutation), in the order they are applied.
        shape: after all steps.
        dtype: after all steps.
        overridable: the initializer is also an input of its graph, so a caller may replace it.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    steps: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    overridable: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two constants that are the same numbers by construction."""
        return (id(self.root), self.steps)

    def array(self) -> np.ndarray:
        """The numbers, a float32 copy that is independent of the file.

        Raises:
            ModelError: the data does not have the size its dimensions say.
        """
        try:
            array = self.tensor.numpy()
            for op, argument in self.steps:
                with np.errstate(over="ignore"):  # the model, too, would compute with the infinity
                    array = array.astype(argument.numpy()) if op == "Cast" else array.transpose(argument)
            out = np.array(array, dtype=np.float32, order="C")
        except (ValueError, OSError) as error:
            raise ModelError(f"weight {self.root.name!r} cannot be read ({error}): fetch or export it again") from error
        del array
        release(self.tensor)
        return out


def release(tensor: ir.TensorProtocol) -> None:
    """Unmaps a tensor's file, unless someone still looks at it."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):  # another reader's view keeps the map; it goes with the view
            tensor.release()


def resolve(value: ir.Value | None) -> Constant | None:
    """The constant behind `value`, through Identity, Transpose and float Cast nodes; None if it is computed."""
    steps: list[tuple[str, Any]] = []
    while value is not None:
        if value.is_initializer() and value.const_value is not None:
            return _constant(value, value.const_value, steps)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            attribute = node.attributes.get("value")
            return None if attribute is None or attribute.is_ref() else _constant(value, attribute.as_tensor(), steps)
        if node.op_type == "Cast":
            to = ir.DataType(node.attributes["to"].as_int())
            if to not in FLOATS:
                return None
            steps.append(("Cast", to))
        elif node.op_type == "Transpose":
            permutation = node.attributes.get("perm")
            steps.append(("Transpose", None if permutation is None else tuple(permutation.as_ints())))
        elif node.op_type != "Identity":
            return None
        value = node.inputs[0]
    return None


def _constant(root: ir.Value, tensor: ir.TensorProtocol, backwards: list[tuple[str, Any]]) -> Constant | None:
    shape = tuple(int(d) for d in tensor.shape.numpy())
    dtype = tensor.dtype
    steps: list[tuple[str, Any]] = []
    for op, argument in reversed(backwards):
        if op == "Transpose":
            argument = argument or tuple(reversed(range(len(shape))))
            if sorted(argument) != list(range(len(shape))):
                return None  # an invalid node, for the runtime to complain about
            shape = tuple(shape[axis] for axis in argument)
            if steps and steps[-1] == (op, argument) and len(shape) == 2:
                steps.pop()  # there and back again
                continue
        else:
            dtype = argument
        steps.append((op, argument))
    return Constant(root, tensor, tuple(steps), shape, dtype, root.is_graph_input())


def readers(root: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every (node, input index) that reads a constant, through the nodes `resolve` looks through."""
    for node, index in root.uses():
        if node.domain in ("", "ai.onnx") and node.op_type in ("Identity", "Transpose", "Cast"):
            yield from readers(node.outputs[0])
            if node.outputs[0].is_graph_output():
                yield node, index
        else:
            yield node, index
