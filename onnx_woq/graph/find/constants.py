"""Constants of a graph: following a value back to the constant it is made of, and reading the numbers.

Exporters put Identity, Transpose and Cast nodes between a constant and its reader. They are looked through. A
DequantizeLinear is not: its output is a weight that is quantized already, see `graph.find.quantized`.
"""

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
    """A constant as one reader sees it: the stored numbers, and the Casts and Transposes on the way to the reader.

    Attributes:
        root: the initializer, or the output of a Constant node.
        tensor: the data of `root`.
        steps: ("Cast", data type) and ("Transpose", permutation), in the order they are applied.
        shape: the shape after all steps.
        dtype: the type after all steps.
        overridable: whether the initializer is also an input of its graph, so that a caller may replace it.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    steps: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    overridable: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Returns a key that is equal for two constants of the same root and steps, hence of the same numbers."""
        return (id(self.root), self.steps)

    def view(self) -> np.ndarray:
        """Returns the numbers, read-only, in the shape `shape`: a view of the stored data where that is possible.

        Data in a file is mapped into memory, and unmapped with the view. A Cast from half precision to float32 is left
        out, so the array then has the stored type. After any other Cast it is a copy.

        Raises:
            ModelError: the data cannot be read, or does not have the size its dimensions say.
        """
        try:
            array = mapped(self.tensor)
            stored = self.tensor.dtype
            for op, argument in self.steps:
                if op == "Transpose":
                    array = array.transpose(argument)
                elif argument != stored and not (argument == ir.DataType.FLOAT and stored in _HALVES):
                    with np.errstate(over="ignore"):  # the model would compute with the infinity as well
                        array, stored = array.astype(argument.numpy()), argument
        except (ValueError, OSError) as error:
            raise ModelError(f"weight {self.root.name!r} cannot be read ({error}): fetch or export it again") from error
        array = array[...]
        array.flags.writeable = False
        return array

    def array(self) -> np.ndarray:
        """Returns the numbers as a float32 copy, independent of the file.

        Raises:
            ModelError: the data cannot be read, or does not have the size its dimensions say.
        """
        return np.array(self.view(), dtype=np.float32, order="C")


def mapped(tensor: ir.TensorProtocol) -> np.ndarray:
    """Returns the array of a tensor; one in a file is mapped anew, as another thread may unmap the tensor itself."""
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
    """Unmaps the file of a tensor, unless an array of it is still in use."""
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):  # another reader's view keeps the map; it goes with the view
            tensor.release()


def resolve(value: ir.Value | None) -> Constant | None:
    """Returns the constant behind `value`, through Identity, Transpose and float Cast nodes; None if it is computed."""
    steps: list[tuple[str, Any]] = []
    while value is not None:
        if value.is_initializer() and value.const_value is not None:
            return _constant(value, value.const_value, steps)
        node = value.producer()
        if node is None or node.domain:
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
                return None  # an invalid node: ONNX Runtime will refuse the model
            shape = tuple(shape[axis] for axis in argument)
            if steps and steps[-1] == (op, argument) and len(shape) == 2:
                steps.pop()  # there and back again
                continue
        else:
            dtype = argument
        steps.append((op, argument))
    return Constant(root, tensor, tuple(steps), shape, dtype, root.is_graph_input())


def readers(root: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yields every reader of the constant `root` as `(node, index of the input)`, through the nodes of `resolve`.

    A node that `resolve` looks through counts as a reader itself where its output is an output of the graph.
    """
    for node, index in root.uses():
        if not node.domain and node.op_type in ("Identity", "Transpose", "Cast"):
            yield from readers(node.outputs[0])
            if node.outputs[0].is_graph_output():
                yield node, index
        else:
            yield node, index
