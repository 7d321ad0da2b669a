"""Rotation of the residual stream of a model by changing its weights; the outputs stay the same.

With an orthogonal matrix R, every weight that writes to the stream is multiplied by R, and every weight that reads it
by Rᵀ. The gammas of the norms in between move into the weights that read the norms (QuaRot: Ashkboos et al. 2024,
section 4, stage 1a; R1 of SpinQuant: Liu et al. 2024, section 3.1). For `y = norm(x)·W` with
`norm(x) = x / rms(x) ∘ γ`:

    (x·R / rms(x·R)) · (Rᵀ·diag(γ)·W) = y

A rotated weight is a lazy tensor: it is computed whenever somebody reads it, and takes no memory until then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_woq.core.rotation import rotation, turn
from onnx_woq.errors import RotationError
from onnx_woq.graph.edit import add_constant, add_initializer, add_node, insert_after, prune
from onnx_woq.graph.find.blocks import forget
from onnx_woq.graph.find.constants import Constant, readers, resolve
from onnx_woq.graph.find.residual import (
    ResidualStream,
    find_residual_streams,
    has_layer_norm,
    linear_weight,
    output_axis,
)
from onnx_woq.graph.io.model import Model

SEED = 0
"""Seed of every rotation: the same model is always rotated in the same way."""


def rotate(model: Model, quantized: Collection[ir.Node] = (), sharing: Collection[ir.Node] = ()) -> None:
    """Rotates the residual stream of `model` in place; its outputs stay the same up to rounding.

    A weight with other readers, such as a table that the embedding shares with the head, stays as it is for them if a
    rotated copy would be larger than R. Instead the Gather gets a MatMul by R behind it, and the head a MatMul by
    `Rᵀ·diag(γ)` before it. Each takes D² numbers, where a second table would take D for every token of the vocabulary.
    The weight of a head in `quantized` is rotated all the same: its codes become a second table in any case.

    Args:
        model: a model with RMSNorm, written out or as an operator.
        quantized: the nodes whose constants are going to be replaced by codes: MatMul, Gemm, and Gather of a table.
        sharing: the nodes that are going to read the codes of one table, a Gather and a head: they keep their constant.

    Raises:
        RotationError: there is no residual stream with RMSNorm, or a node reads or writes it in a way that no rule
            covers. The model is unchanged then.
    """
    found = find_residual_streams(model)
    if not found:
        raise _refused(model, "it has LayerNorm, which takes the mean away" if has_layer_norm(model) else "no RMSNorm")
    problems = [problem for stream in found for problem in stream.problems]
    if not problems and any(stream.width != found[0].width for stream in found):
        problems.append("a weight is shared by streams of different width")
    edit = None if problems else _Rotation(model, found, quantized, sharing)
    if edit is None or (problems := list(edit.problems())):
        raise _refused(model, problems[0])
    edit.apply()
    forget(model)


def _refused(model: Model, reason: str) -> RotationError:
    return RotationError(f"the residual stream of {model.path} cannot be rotated: {reason}; leave out rotation")


@dataclass(frozen=True)
class _WeightChange:
    """The change of the weight of one linear.

    Attributes:
        gamma: key of the vector that its input channels are multiplied by, or None.
        axes: the axes to rotate; that of the input channels comes first if it is one of them.
    """

    gamma: tuple[object, ...] | None
    axes: tuple[int, ...]


class _Rotation:
    """All changes that rotate one model, known before the first of them is made.

    Attributes:
        main: the main graph of the model.
        rotation: R.
        streams: the streams to rotate.
        quantized: see `rotate`.
        sharing: see `rotate`.
        entrances: inputs of the model that belong to a stream; each gets a MatMul by R.
        reads: the linears that read a stream -> the gamma that moves into their weight. Linears that read an entrance
            directly are left out: they go on reading the input as it is.
        writes: the linears that write to a stream, as an ordered set: the order of the file follows it.
        tables: the Gather nodes that write to a stream, as an ordered set.
        leaving: the linears among `reads` that keep their weight and read the stream rotated back.
        kept: the Gather nodes among `tables` that keep their table; their output is rotated.
        gammas: key of a gamma -> its numbers, float32 [D].
        made: key of a changed constant -> its initializer, so that equal changes are made once.
    """

    def __init__(
        self, model: Model, found: list[ResidualStream], quantized: Collection[ir.Node], sharing: Collection[ir.Node]
    ) -> None:
        self.main = model.ir.graph
        self.rotation = rotation(found[0].width, SEED)
        self.streams = found
        self.quantized, self.sharing = quantized, sharing
        self.entrances = [value for stream in found for value in stream.entrances]
        self.reads = {
            node: gamma
            for stream in found
            for node, gamma in stream.reads.items()
            if node.inputs[0] not in self.entrances
        }
        self.writes = dict.fromkeys(node for stream in found for node in stream.writes)
        self.tables = dict.fromkeys(node for stream in found for node in stream.tables)
        self.leaving = [node for node in self.reads if self._must_leave(node)]
        self.kept = [node for node in self.tables if self._stays_tied(node)]
        self.gammas = {gamma.key: _flat(gamma) for gamma in self.reads.values() if gamma is not None}
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def problems(self) -> Iterator[str]:
        """Yields the reasons why the model cannot be rotated although a rule covers each of its nodes."""
        for node in {**self.reads, **self.writes}:
            weight = linear_weight(node)
            for other, _ in readers(weight.root) if weight else ():
                if linear_weight(other) is not None and self._change_of(other) != self._change_of(node):
                    yield f"{node.name!r} and {other.name!r} share a weight that would have to become two"
        for node in self.leaving:
            if node in self.sharing and not self._leaves_alone(node.inputs[0]):
                yield f"{node.name!r} shares the codes of an embedding and its input with others"

    def apply(self) -> None:
        """Makes the changes, in place."""
        for stream in self.streams:
            for node, index in stream.vectors:
                self._replace(node, index, self._vector)
        for value in dict.fromkeys(node.inputs[0] for node in self.leaving):
            self._leave(value)
        for node in {**self.reads, **self.writes}:
            self._rotate_weight(node)
        for node in self.tables:
            if node in self.kept:
                insert_after(node, "MatMul", [self._matrix(_dtype(node.inputs[0]))], "unrotated")
            else:
                self._replace(node, 0, lambda table: _lazy(table, partial(turn, by=self.rotation, axis=1)))
        for value in self.entrances:
            self._enter(value)
        for stream in self.streams:
            for node, index in stream.norms:
                self._replace(node, index, _ones)

    def _must_leave(self, node: ir.Node) -> bool:
        """Tells whether a linear must keep its weight, as others read the weight and a copy is larger than R."""
        weight = linear_weight(node)
        if weight is None or node in self.sharing:
            return node in self.sharing
        if node in self.quantized or weight.tensor.nbytes <= self._matrix_bytes(weight):
            return False
        return any(other not in self.reads or index != 1 for other, index in readers(weight.root))

    def _stays_tied(self, node: ir.Node) -> bool:
        """Tells whether a Gather must keep its table, as others read the table and a copy is larger than R."""
        table = resolve(node.inputs[0])
        if table is None or node in self.sharing:
            return node in self.sharing
        if node in self.quantized or table.tensor.nbytes <= self._matrix_bytes(table):
            return False
        return any(other not in self.tables or index != 0 for other, index in readers(table.root))

    def _matrix_bytes(self, constant: Constant) -> int:
        return len(self.rotation.signs) ** 2 * constant.dtype.numpy().itemsize

    def _leaves_alone(self, value: ir.Value | None) -> bool:
        """Tells whether all nodes that compute with a value are leaving: the value itself can be rotated back then."""
        users = [node for node, _ in value.uses() if node.op_type != "Shape"] if value is not None else []
        return value is not None and value.index() == 0 and all(node in self.leaving for node in users)

    def _change_of(self, node: ir.Node) -> _WeightChange:
        out = output_axis(node)
        reads = node in self.reads and node not in self.leaving
        gamma = self.reads[node] if reads else None
        axes = tuple(axis for axis, wanted in ((1 - out, reads), (out, node in self.writes)) if wanted)
        return _WeightChange(None if gamma is None else gamma.key, axes)

    def _rotate_weight(self, node: ir.Node) -> None:
        """Rotates the weight of a linear, on the sides where it touches the stream."""
        wanted = self._change_of(node)
        scale = None if wanted.gamma is None else np.expand_dims(self.gammas[wanted.gamma], 1 - wanted.axes[0])

        def change(array: np.ndarray) -> None:
            if scale is not None:
                array *= scale
            for axis in wanted.axes:
                turn(array, self.rotation, axis)

        if wanted.axes:
            self._replace(node, 1, lambda weight: _lazy(weight, change), wanted)

    def _replace(
        self, node: ir.Node, index: int, change: Callable[[Constant], ir.TensorProtocol], *details: object
    ) -> None:
        """Replaces the constant at input `index` of a node by a changed copy; equal changes share one copy.

        Args:
            node: reads the constant.
            index: of the input.
            change: makes the changed tensor.
            details: tell this change from others of the same constant.

        Raises:
            ValueError: the input is no constant any more.
        """
        old, constant = node.inputs[index], resolve(node.inputs[index])
        if constant is None:
            raise ValueError(f"input {index} of {node.name!r} is no constant any more")
        key = (*constant.key, change is _ones, *details)
        if key not in self.made:
            suffix = "ones" if change is _ones else "rotated"
            self.made[key] = add_constant(self.main, f"{constant.root.name}_{suffix}", change(constant))
        node.replace_input_with(index, self.made[key])
        prune(old)

    def _vector(self, constant: Constant) -> ir.TensorProtocol:
        array = _flat(constant)[None]
        turn(array, self.rotation, 1)
        return ir.Tensor(array.reshape(constant.shape).astype(constant.dtype.numpy()), dtype=constant.dtype)

    def _matrix(self, dtype: ir.DataType, gamma: Constant | None = None, *, back: bool = False) -> ir.Value:
        """Returns a constant with R, or with `back` and a gamma `Rᵀ·diag(γ)`."""
        key = ("matrix", dtype, back, gamma and gamma.key)
        if key not in self.made:
            matrix = self.rotation.matrix()
            matrix = matrix.T if back else matrix
            matrix = matrix if gamma is None else matrix * self.gammas[gamma.key]
            name = "rotation_back" if back else "rotation"
            array = np.ascontiguousarray(matrix, dtype.numpy())
            self.made[key] = add_initializer(self.main, name, array, dtype)
        return self.made[key]

    def _leave(self, value: ir.Value | None) -> None:
        """Rotates a value back for those of its readers that are leaving: they go on reading the old channels."""
        users = [node for node, index in value.uses() if index == 0 and node in self.leaving] if value else []
        weight = linear_weight(users[0]) if users else None
        producer = value.producer() if value is not None else None
        if value is None or weight is None or producer is None:
            raise ValueError("nothing leaves the stream here any more")
        matrix = self._matrix(weight.dtype, self.reads[users[0]], back=True)
        if self._leaves_alone(value):
            insert_after(producer, "MatMul", [matrix], "rotated")
            return
        unrotated = add_node("MatMul", [value, matrix], f"{value.name}_unrotated", before=users[0])
        for node in users:
            node.replace_input_with(0, unrotated)

    def _enter(self, value: ir.Value) -> None:
        """Rotates an input of the model for all its readers but linears, which go on reading the input as it is."""
        users = [(node, index) for node, index in value.uses() if linear_weight(node) is None]
        rotated = add_node("MatMul", [value, self._matrix(_dtype(value))], f"{value.name}_rotated", before=self.main[0])
        for node, index in users:
            node.replace_input_with(index, rotated)


def _lazy(constant: Constant, change: Callable[[np.ndarray], None]) -> ir.TensorProtocol:
    """Returns a tensor that applies `change` to the last two axes of a constant, in float32, whenever it is read."""

    def read() -> ir.TensorProtocol:
        array = constant.array()
        change(array.reshape(array.shape[-2:]))
        return ir.Tensor(array.astype(constant.dtype.numpy(), copy=False), dtype=constant.dtype)

    return ir.LazyTensor(read, dtype=constant.dtype, shape=ir.Shape(constant.shape))


def _ones(constant: Constant) -> ir.TensorProtocol:
    return ir.Tensor(np.ones(constant.shape, constant.dtype.numpy()), dtype=constant.dtype)


def _flat(constant: Constant) -> np.ndarray:
    return constant.array().reshape(-1)


def _dtype(value: ir.Value | None) -> ir.DataType:
    constant = resolve(value)
    if constant is not None:
        return constant.dtype
    return (value.dtype if value is not None else None) or ir.DataType.FLOAT
