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
_HALVES = FLOATS[1:]


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

    def view(self) -> np.ndarray:
        """The numbers, read-only, where they lie and in the type they have there as far as that is possible.

        A view of a file is mapped on its own and unmapped with the view, whoever else reads the tensor. A Cast to a
        type that holds every number of the stored one is left out; after any other Cast it is a copy.

        Raises:
            ModelError: the data does not have the size its dimensions say.
        """
        try:
            array = mapped(self.tensor)
            stored = self.tensor.dtype
            for op, argument in self.steps:
                if op == "Transpose":
                    array = array.transpose(argument)
                elif argument != stored and not (argument == ir.DataType.FLOAT and stored in _HALVES):
                    with np.errstate(over="ignore"):  # the model, too, would compute with the infinity
                        array, stored = array.astype(argument.numpy()), argument
        except (ValueError, OSError) as error:
            raise ModelError(f"weight {self.root.name!r} cannot be read ({error}): fetch or export it again") from error
        array = array[...]
        array.flags.writeable = False
        return array

    def array(self) -> np.ndarray:
        """As `view`, a float32 copy that is independent of the file."""
        return np.array(self.view(), dtype=np.float32, order="C")


def mapped(tensor: ir.TensorProtocol) -> np.ndarray:
    """A tensor's array; of one in a file a map of its own, which no reader in another thread can take away."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    own = type(tensor)(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )
    return own.numpy()


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
