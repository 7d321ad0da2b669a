"""Rotate the residual stream of a model, offline: other weights, the same outputs.

With R orthogonal, what writes to the stream is multiplied by R and what reads it by Rᵀ, the gammas of the norms in
between having been moved into the weights that read them (QuaRot: Ashkboos et al. 2024, section 4, stage 1a; R1 of
SpinQuant: Liu et al. 2024, section 3.1). For `y = norm(x)·W` with `norm(x) = x / rms(x) ∘ γ`:

    (x·R / rms(x·R)) · (Rᵀ·diag(γ)·W) = y

Weights are not rewritten: each becomes a tensor that is computed whenever it is read.
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
from onnx_woq.graph.find.residual import Stream, has_layer_norm, linear_weight, output_axis, streams
from onnx_woq.graph.io.model import Model

SEED = 0
"""Of every rotation: the same model is always rotated the same way."""


def rotate(model: Model, quantized: Collection[ir.Node] = (), sharing: Collection[ir.Node] = ()) -> None:
    """Rotates the residual stream of `model` in place; its outputs stay, but for rounding.

    A weight that something else reads as well, such as an embedding table tied to the head, stays for that reader. The
    Gather of such a table gets a MatMul by R behind it, and a head that is not in `quantized` one by `Rᵀ·diag(γ)`
    before it: D² numbers each, where a table of its own would take D for each token of the vocabulary. The weight of a
    quantized head is rotated: it would have become another one than the table in any case.

    Args:
        model: with RMSNorm, written out or as an operator.
        quantized: nodes whose constants are going to be replaced: MatMul, Gemm, and Gather of a table.
        sharing: nodes that are going to read the codes of one table, a Gather and a head: they keep what they read.

    Raises:
        RotationError: it has no such stream, or something reads or writes it that no rule is known for; nothing has
            been changed then.
    """
    found = streams(model)
    if not found:
        raise _refused(model, "it has LayerNorm, which takes the mean away" if has_layer_norm(model) else "no RMSNorm")
    problems = [problem for stream in found for problem in stream.problems]
    if not problems and any(stream.width != found[0].width for stream in found):
        problems.append("a weight is shared by streams of different width")
    edit = None if problems else _Edit(model, found, quantized, sharing)
    if edit is None or (problems := list(edit.problems())):
        raise _refused(model, problems[0])
    edit.apply()
    forget(model)


def _refused(model: Model, reason: str) -> RotationError:
    return RotationError(f"the residual stream of {model.path} cannot be rotated: {reason}; leave out rotation")


@dataclass(frozen=True)
class _How:
    """What becomes of a linear node's weight.

    Attributes:
        gamma: key of the vector that its rows are multiplied by, or None.
        axes: that are turned, that of the inputs first where it is one of them.
    """

    gamma: tuple[object, ...] | None
    axes: tuple[int, ...]


class _Edit:
    """The changes of one model, which are all known before the first is made."""

    def __init__(
        self, model: Model, found: list[Stream], quantized: Collection[ir.Node], sharing: Collection[ir.Node]
    ) -> None:
        self.main = model.ir.graph
        self.by = rotation(found[0].width, SEED)
        self.streams = found
        self.quantized, self.sharing = quantized, sharing
        self.entrances = [value for stream in found for value in stream.entrances]
        self.reads = {
            node: gamma
            for stream in found
            for node, gamma in stream.reads.items()
            if node.inputs[0] not in self.entrances  # it goes on reading the input as it comes
        }
        self.writes = dict.fromkeys(node for stream in found for node in stream.writes)  # in order: files follow it
        self.tables = dict.fromkeys(node for stream in found for node in stream.tables)
        self.leaving = [node for node in self.reads if self._is_left(node)]
        self.kept = [node for node in self.tables if self._is_tied(node)]
        self.gammas = {gamma.key: _flat(gamma) for gamma in self.reads.values() if gamma is not None}
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def problems(self) -> Iterator[str]:
        """What cannot be done although every node by itself is understood."""
        for node in {**self.reads, **self.writes}:
            weight = linear_weight(node)
            for other, _ in readers(weight.root) if weight else ():
                if linear_weight(other) is not None and self._how(other) != self._how(node):
                    yield f"{node.name!r} and {other.name!r} share a weight that would have to become two"
        for node in self.leaving:
            if node in self.sharing and not self._is_last(node.inputs[0]):
                yield f"{node.name!r} shares the codes of an embedding and its input with others"

    def apply(self) -> None:
        for stream in self.streams:
            for node, index in stream.vectors:
                self._replace(node, index, self._vector)
        for value in dict.fromkeys(node.inputs[0] for node in self.leaving):
            self._leave(value)
        for node in {**self.reads, **self.writes}:
            self._turn(node)
        for node in self.tables:
            if node in self.kept:
                insert_after(node, "MatMul", [self._matrix(_dtype(node.inputs[0]))], "unrotated")
            else:
                self._replace(node, 0, lambda table: _lazy(table, partial(turn, by=self.by, axis=1)))
        for value in self.entrances:
            self._enter(value)
        for stream in self.streams:
            for node, index in stream.norms:
                self._replace(node, index, _ones)

    def _is_left(self, node: ir.Node) -> bool:
        """Whether a node that reads the stream keeps a weight that others read, too."""
        weight = linear_weight(node)
        if weight is None or node in self.sharing:
            return node in self.sharing
        if node in self.quantized or weight.tensor.nbytes <= self._matrix_bytes(weight):
            return False
        return any(other not in self.reads or index != 1 for other, index in readers(weight.root))

    def _is_tied(self, node: ir.Node) -> bool:
        """Whether others read a table, and a copy of it is larger than R."""
        table = resolve(node.inputs[0])
        if table is None or node in self.sharing:
            return node in self.sharing
        if node in self.quantized or table.tensor.nbytes <= self._matrix_bytes(table):
            return False
        return any(other not in self.tables or index != 0 for other, index in readers(table.root))

    def _matrix_bytes(self, constant: Constant) -> int:
        return len(self.by.signs) ** 2 * constant.dtype.numpy().itemsize

    def _is_last(self, value: ir.Value | None) -> bool:
        """Whether all that compute with a value leave the stream, so that it can leave under its name."""
        users = [node for node, _ in value.uses() if node.op_type != "Shape"] if value is not None else []
        return value is not None and value.index() == 0 and all(node in self.leaving for node in users)

    def _how(self, node: ir.Node) -> _How:
        out = output_axis(node)
        reads = node in self.reads and node not in self.leaving
        gamma = self.reads[node] if reads else None
        axes = tuple(axis for axis, wanted in ((1 - out, reads), (out, node in self.writes)) if wanted)
        return _How(None if gamma is None else gamma.key, axes)

    def _turn(self, node: ir.Node) -> None:
        """Rotates the weight of a linear node, on the sides where it touches the stream."""
        how = self._how(node)
        scale = None if how.gamma is None else np.expand_dims(self.gammas[how.gamma], 1 - how.axes[0])

        def change(array: np.ndarray) -> None:
            if scale is not None:
                array *= scale
            for axis in how.axes:
                turn(array, self.by, axis)

        if how.axes:
            self._replace(node, 1, lambda weight: _lazy(weight, change), how)

    def _replace(
        self, node: ir.Node, index: int, change: Callable[[Constant], ir.TensorProtocol], *how: object
    ) -> None:
        """Puts what becomes of a constant in its place; the same thing becomes of it elsewhere."""
        old, constant = node.inputs[index], resolve(node.inputs[index])
        if constant is None:
            raise ValueError(f"input {index} of {node.name!r} is no constant any more")
        key = (*constant.key, change is _ones, *how)
        if key not in self.made:
            suffix = "ones" if change is _ones else "rotated"
            self.made[key] = add_constant(self.main, f"{constant.root.name}_{suffix}", change(constant))
        node.replace_input_with(index, self.made[key])
        prune(old)

    def _vector(self, constant: Constant) -> ir.TensorProtocol:
        array = _flat(constant)[None]
        turn(array, self.by, 1)
        return ir.Tensor(array.reshape(constant.shape).astype(constant.dtype.numpy()), dtype=constant.dtype)

    def _matrix(self, dtype: ir.DataType, gamma: Constant | None = None, *, back: bool = False) -> ir.Value:
        """R, or `Rᵀ·diag(γ)`."""
        key = ("matrix", dtype, back, gamma and gamma.key)
        if key not in self.made:
            matrix = self.by.matrix()
            matrix = matrix.T if back else matrix
            matrix = matrix if gamma is None else matrix * self.gammas[gamma.key]
            name = "rotation_back" if back else "rotation"
            array = np.ascontiguousarray(matrix, dtype.numpy())
            self.made[key] = add_initializer(self.main, name, array, dtype)
        return self.made[key]

    def _leave(self, value: ir.Value | None) -> None:
        """Has those of the readers of a value that are leaving read what they read before, in the old channels."""
        users = [node for node, index in value.uses() if index == 0 and node in self.leaving] if value else []
        weight = linear_weight(users[0]) if users else None
        producer = value.producer() if value is not None else None
        if value is None or weight is None or producer is None:
            raise ValueError("nothing leaves the stream here any more")
        matrix = self._matrix(weight.dtype, self.reads[users[0]], back=True)
        if self._is_last(value):
            insert_after(producer, "MatMul", [matrix], "rotated")
            return
        unrotated = add_node("MatMul", [value, matrix], f"{value.name}_unrotated", before=users[0])
        for node in users:
            node.replace_input_with(0, unrotated)

    def _enter(self, value: ir.Value) -> None:
        """Rotates an input of the model, but for linear nodes that read it directly."""
        users = [(node, index) for node, index in value.uses() if linear_weight(node) is None]
        rotated = add_node("MatMul", [value, self._matrix(_dtype(value))], f"{value.name}_rotated", before=self.main[0])
        for node, index in users:
            node.replace_input_with(index, rotated)


def _lazy(constant: Constant, change: Callable[[np.ndarray], None]) -> ir.TensorProtocol:
    """A constant whose last two axes are changed in float32 whenever it is read."""

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
