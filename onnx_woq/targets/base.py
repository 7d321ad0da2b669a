"""The protocol of a low-bit operator: everything the rest of the package asks of the nodes it writes.

An **operator** is a module with the functions of a protocol below. A **target** is a pair of them, one for linears
(MatMul, Gemm) and one for embedding tables (Gather); `onnx_woq.targets.registry` lists the targets. A new target is one
file here and one line there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor

Speed = Literal["native", "slow", "decoded at load"]
"""The way a session runs an operator: by a low-bit kernel ("native"), by one that is slower than float ("slow"), or as
float weights that it decodes when it is made ("decoded at load")."""

Shapes = tuple[tuple[tuple[int, ...], np.dtype], ...]
"""The shape and type of each array that is stored of one weight, in the order of `Packed.arrays`."""

Version = tuple[int, int]
"""The major and minor version of an onnxruntime, such as `(1, 22)`."""

P = TypeVar("P", bound="Packed")


@dataclass(frozen=True)
class Storage:
    """The circumstances that decide, beside its number format, how a weight is stored.

    Attributes:
        scale_dtype: the type of the scales.
        opset: the version of the ONNX operators that the written model uses.
    """

    scale_dtype: type[np.float32] | type[np.float16]
    opset: int


class Packed(Protocol):
    """A weight `[K, N]` as an operator stores it: only arrays and numbers, so that it can be pickled and resumed."""

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns the arrays to store, in the order of `Operator.shapes`."""

    def with_arrays(self: P, arrays: Sequence[np.ndarray]) -> P:
        """Returns the same weight with other arrays of the same shapes."""


class Operator(Protocol):
    """The part of the protocol that is the same for linears and tables."""

    BY_CHANNEL: bool
    """True if output channels are the first axis of every stored array: a few of them can then be packed at a time."""

    def refusal(self, spec: Spec) -> str:
        """Returns the reason why the operator cannot hold weights of a number format, "" if it can."""

    def minimum_opset(self, spec: Spec, scale_dtype: type[np.floating]) -> int:
        """Returns the lowest opset version that the written nodes need; 0 for any."""

    def speed(self, spec: Spec) -> Speed:
        """Tells how a session runs weights of a number format."""

    def scale_factor(self, spec: Spec, storage: Storage) -> float:
        """Returns what scales are multiplied by before they are stored, a power of two."""

    def shapes(self, k: int, n: int, spec: Spec, storage: Storage) -> Shapes:
        """Returns the shape and type of each array of a weight `[k, n]`, known before it is solved."""

    def pack(self, q: QuantizedTensor, storage: Storage) -> Packed:
        """Lays the codes, scales and zero points of a weight out as the operator stores them."""

    def packed_from(self, arrays: Sequence[np.ndarray], k: int, n: int, spec: Spec, storage: Storage) -> Packed:
        """Returns the packed weight `[k, n]` that has these arrays, whose shapes are those that `shapes` gives."""

    def runtime(self, node: ir.Node, *, in_body: bool) -> Version | None:
        """Returns the oldest onnxruntime that runs a node which the operator wrote, None for any other node.

        Args:
            node: any node of a written model.
            in_body: the node lies in the body of an If, Loop or Scan.
        """


class LinearOperator(Operator, Protocol):
    """An operator that multiplies activations by low-bit weights."""

    def lower(
        self,
        model: Model,
        group: LinearGroup,
        packed: Sequence[Any],
        *,
        accuracy_level: int,
        bias: Sequence[np.ndarray] = (),
    ) -> object:
        """Rewrites every linear of a group in place; nodes and outputs keep their names.

        Args:
            model: the model that holds the group.
            group: the linear group.
            packed: its distinct weights, in order.
            accuracy_level: 4 computes with int8 activations where the operator can, 0 in float.
            bias: float32 `[n]` for each weight, to be added to its outputs; none if empty.
        """

    def store(self, model: Model, name: str, packed: Any, dtype: ir.DataType) -> tuple[ir.Value | None, ...]:
        """Adds a weight to the main graph; returns the inputs of the operator that describe it.

        Args:
            model: the model that gets it.
            name: the name of its codes; the names of its other arrays begin with it.
            packed: the weight.
            dtype: the type of the activation that is multiplied by it.
        """

    def multiply(
        self,
        before: ir.Node,
        activation: ir.Value | None,
        name: str,
        packed: Any,
        stored: Sequence[ir.Value | None],
        accuracy_level: int,
    ) -> ir.Value:
        """Adds the product of an activation with a stored weight to the graph; returns its output.

        Args:
            before: the node in front of which it is added; the output has the type of its output.
            activation: `[..., K]`.
            name: the name of the product.
            packed: the weight `[K, N]`.
            stored: from `store`.
            accuracy_level: see `lower`.
        """


class EmbeddingOperator(Operator, Protocol):
    """An operator that looks up rows of low-bit tables."""

    SHARES: bool
    """True if a table can read the codes of its head, a linear that multiplies by the transpose of the table."""

    def lower(self, model: Model, embedding: Embedding, packed: Any) -> None:
        """Rewrites every Gather of a table in place; nodes and outputs keep their names.

        Args:
            model: the model that holds the table.
            embedding: the table `[V, D]`.
            packed: the table as a weight `[D, V]`.
        """

    def share(self, model: Model, embedding: Embedding, input_scale: np.ndarray | None) -> None:
        """Rewrites every Gather of a table to read the codes of its head, which is lowered already.

        Args:
            model: the model that holds both.
            embedding: the table `[V, D]`; its head has the same number format.
            input_scale: `[D]` if the codes are those of `diag(input_scale) @ W`: rows are then divided by it.

        Raises:
            ValueError: there is no head, or it is float still.
        """


@dataclass(frozen=True)
class Target:
    """A pair of operators that models are written with.

    Attributes:
        linears: the operator for linears.
        embeddings: the operator for tables whose rows are looked up.
    """

    linears: LinearOperator
    embeddings: EmbeddingOperator


def stored_bytes(shapes: Shapes) -> int:
    """Returns the bytes that arrays of these shapes and types take together."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
