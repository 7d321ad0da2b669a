"""The MatMul and Gemm nodes that can be quantized, grouped by the activation they read.

A **linear** is one MatMul or Gemm node with a constant weight `W [K, N]`: `y = x @ W`, with K input channels and N
output channels. A **linear group** is the set of linears that read the same activation, such as q/k/v or gate/up. Its
weights are concatenated and solved as one matrix because they share input statistics. Linears that read the same weight
are in one group as well, whatever activations they read. A **weight source** is one distinct weight of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir

from onnx_woq.core.spec import Spec
from onnx_woq.errors import ModelError
from onnx_woq.graph.find.attention import FIRST_TOKEN, find_key_value_linears
from onnx_woq.graph.find.constants import FLOATS, Constant, resolve
from onnx_woq.graph.find.dependencies import closed_bodies
from onnx_woq.graph.find.heads import find_heads
from onnx_woq.graph.find.ranks import Ranks
from onnx_woq.graph.fold import follows_from_constants
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe

SMALLEST_K = 16
"""The fewest input channels to quantize: the smallest block of a kernel. Below it scales cost more than they save."""


_MULTIPLIES = {"MatMul": ("",), "Gemm": ("",), "FusedMatMul": ("com.microsoft",), "FusedGemm": ("com.microsoft",)}

_EXPONENTS = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all ones: infinite, or not a number
_TILE = 1 << 17  # numbers checked in one go


@dataclass(frozen=True, eq=False)
class Linear:
    """One MatMul or Gemm with a constant weight `[K, N]`: `y = x @ W`.

    Attributes:
        name: the name of its output value, which is unique.
        node: the node. A target rewrites it in place.
        node_name: the name of the node, which may be empty.
        weight_name: the name of the initializer, before any Transpose or Cast.
        k: the number of input channels.
        n: the number of output channels.
        dtype: the type of the activation.
        kind: "MatMul" or "Gemm".
        root: the constant called `weight_name`.
        scale: alpha of a Gemm, which counts as part of the weight; 1 for a MatMul.
    """

    name: str
    node: ir.Node
    node_name: str
    weight_name: str
    k: int
    n: int
    dtype: ir.DataType
    kind: str
    root: ir.Value
    scale: float = 1.0

    def constant(self) -> Constant:
        """Returns the weight that the node reads now: a rewrite may have replaced it since the linear was found.

        Raises:
            ModelError: the node reads no constant any more.
        """
        constant = resolve(self.node.inputs[1])
        if constant is None:
            raise ModelError(f"the weight of {self.name!r} is no longer constant")
        return constant

    def key(self) -> tuple[object, ...]:
        """Returns a key that is equal for linears that read the same numbers."""
        return (*self.constant().key, self.transposed(), self.scale)

    def transposed(self) -> bool:
        """Tells whether the graph stores the weight as `[N, K]` and Gemm transposes it."""
        attribute = self.node.attributes.get("transB")
        return self.kind == "Gemm" and attribute is not None and bool(attribute.as_int())

    def view(self) -> np.ndarray:
        """Returns the weight `[K, N]`, read-only, in the type it is stored in and in either memory order.

        It is a view of the stored data, except where the graph rounds it to another type, and where `scale` is not 1:
        then it is a copy, in float32 if it is scaled.

        Raises:
            ModelError: the weight cannot be read.
        """
        array = self.constant().view()
        array = array.T if self.transposed() else array.reshape(self.k, self.n)
        if self.scale != 1.0:
            array = array.astype(np.float32) * np.float32(self.scale)
            array.flags.writeable = False
        return array

    def finite_view(self) -> np.ndarray:
        """Returns `view()` after a check that every number is finite.

        Raises:
            ModelError: the weight has NaN or infinite values, or cannot be read.
        """
        array = self.view()
        if not _is_finite(array):
            raise ModelError(
                f"weight {self.weight_name!r} of {self.node_name or self.name!r} has NaN or infinite values: "
                "export the model again, or exclude this node"
            )
        return array


@dataclass(frozen=True)
class WeightSource:
    """A distinct weight of a linear group or an embedding, read lazily.

    Attributes:
        name: the name of the weight.
        k: the number of input channels.
        n: the number of output channels.
        read: returns the weight `[k, n]` in float32, float16 or bfloat16, read-only and in either memory order. It is
            mapped from its file if possible, and unmapped once nobody holds the array. Its numbers may be not finite.
        computed: whether reading it computes the whole weight, as after a rotation.
    """

    name: str
    k: int
    n: int
    read: Callable[[], np.ndarray]
    computed: bool = False


Sources = tuple[tuple[str, str], ...]
"""The activations of a linear group, each with the attention that weights its tokens ("" for tokens that count alike).
"""


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """The linears that read the same activation or the same weight, quantized together.

    Attributes:
        name: the name of its first linear, which is unique.
        values: the names of the activations; several only where linears share a weight.
        linears: the linears, in graph order.
        spec: the number format of all their weights.
        k: the number of input channels.
        n: the number of output channels, summed over the distinct weights.
        weight_bytes: the size of the distinct weights as the model stores them.
        attention: for each of `values`, the name of the attention probabilities that weight its tokens in calibration
            (see `graph.find.attention`); "" for tokens that count alike.
    """

    name: str
    values: tuple[str, ...]
    linears: tuple[Linear, ...]
    spec: Spec
    k: int
    n: int
    weight_bytes: int
    attention: tuple[str, ...]

    @property
    def sources(self) -> Sources:
        """Returns (activation, attention that weights its tokens) pairs: equal for groups with the same statistics."""
        return tuple(zip(self.values, self.attention, strict=True))

    @property
    def reads(self) -> set[str]:
        """Returns the names of all values that the statistics of the group are made of."""
        return {name for source in self.sources for name in source if name and name != FIRST_TOKEN}

    def weight(self) -> np.ndarray:
        """Returns the distinct weights side by side, `[K, n]`, as a float32 copy.

        Raises:
            ModelError: a weight is not finite or cannot be read.
        """
        whole = np.empty((self.k, self.n), np.float32)
        end = 0
        for linear in self._distinct():
            start, end = end, end + linear.n
            whole[:, start:end] = linear.finite_view()
        return whole

    def weight_sources(self) -> list[WeightSource]:
        """Returns the distinct weights one by one, in the order of `weight()`, in the types they are stored in."""
        return [
            WeightSource(
                linear.weight_name, linear.k, linear.n, linear.view, isinstance(linear.constant().tensor, ir.LazyTensor)
            )
            for linear in self._distinct()
        ]

    def check(self) -> None:
        """Reads every weight once, to raise the errors of `weight()` before hours of work instead of after.

        Raises:
            ModelError: a weight is not finite or cannot be read.
        """
        for linear in self._distinct():
            linear.finite_view()

    def slices(self) -> Iterator[tuple[Linear, slice]]:
        """Yields each linear with its columns of `weight()`; linears that read the same weight share them."""
        places: dict[tuple[object, ...], slice] = {}
        start = 0
        for linear in self.linears:
            key = linear.key()
            if key not in places:
                places[key] = slice(start, start + linear.n)
                start += linear.n
            yield linear, places[key]

    @property
    def kernel_dtype(self) -> type[np.float32] | type[np.float16]:
        """Returns the type that the kernel computes in: float16 for a model in float16, else float32."""
        return np.float16 if self.linears[0].dtype == ir.DataType.FLOAT16 else np.float32

    def weight_indices(self) -> list[int]:
        """Returns, for each linear that is still float, which of the distinct weights it reads."""
        indices: dict[tuple[object, ...], int] = {}
        return [indices.setdefault(linear.key(), len(indices)) for linear in self.linears]

    def _distinct(self) -> list[Linear]:
        first: dict[tuple[object, ...], Linear] = {}
        for linear in self.linears:
            first.setdefault(linear.key(), linear)
        return list(first.values())


@dataclass(frozen=True)
class Skipped:
    """A node that stays as it is: a matrix product, the Gather of a table, or any other that reads large constants.

    Attributes:
        name: the name of its output value.
        node_name: the name of the node, which may be empty.
        op_type: "MatMul", "Gemm", a fused form of these, "Gather", or any other; "" for a constant that nothing reads.
        reason: why it stays, for people.
        weight_bytes: the size of its constants as stored; 0 if it has none.
        again: how many of these bytes belong to a weight that is counted before, because another node reads it too.
    """

    name: str
    node_name: str
    op_type: str
    reason: str
    weight_bytes: int
    again: int = 0

    def to_dict(self) -> dict[str, object]:
        """Returns a JSON-ready dictionary."""
        row = asdict(self)
        return row if self.again else {name: row[name] for name in row if name != "again"}


def find_linear_groups(model: Model, recipe: Recipe) -> tuple[list[LinearGroup], list[Skipped]]:
    """Returns the linear groups that a recipe quantizes, in graph order, and the other matrix products with a reason.

    With `recipe.lm_head` off, the head of the model stays float (see `graph.find.heads`). With
    `recipe.attention_weighted`, the linears that make keys and values form a group of their own beside the queries',
    as their tokens are weighted.
    """
    ranks = Ranks(model)
    linears: list[Linear] = []
    skipped: list[Skipped] = []
    for node in model.ir.graph.all_nodes():
        if node.domain in _MULTIPLIES.get(node.op_type, ()):
            found = _examine(node, ranks)
            (linears if isinstance(found, Linear) else skipped).append(found)  # type: ignore[arg-type]
    for function in model.ir.functions.values():
        reason = f"inside the function {function.name}, which could not be inlined"
        skipped += [_skip(node, reason) for node in function.all_nodes() if node.op_type in ("MatMul", "Gemm")]
    heads = set() if recipe.lm_head else find_heads(model.ir.graph, [linear.node for linear in linears])
    closed = closed_bodies(model.ir.graph) if recipe.needs_data else {}
    chosen: list[tuple[Linear, Spec]] = []
    for linear in linears:
        spec, reason = recipe.spec_for(linear.node_name, linear.name, linear.weight_name)
        if linear.node in heads:
            spec, reason = None, "the last MatMul, left float by the recipe"
        if spec is not None and (owner := closed.get(linear.node)):
            spec, reason = None, f"inside {owner}, where calibration cannot look: rtn and hqq quantize it"
        if spec is None:
            skipped.append(_skip(linear.node, reason))
        else:
            chosen.append((linear, spec))
    groups = _group(chosen, find_key_value_linears(model) if recipe.attention_weighted else {})
    return groups, skipped


def _examine(node: ir.Node, ranks: Ranks) -> Linear | Skipped:
    """Returns the linear that a node is, or the reason why it is none."""
    left, right = (resolve(v) for v in node.inputs[:2])
    if node.op_type.startswith("Fused"):
        return _skip(node, f"{node.op_type} of this form is not supported: export it without runtime optimizations")
    if right is None:
        return _skip(node, _computed(node, left))
    if reason := _unfit(node, right, ranks):
        return _skip(node, reason)
    transposed = node.op_type == "Gemm" and _int(node, "transB", 0)
    k, n = right.shape[-2:] if not transposed else right.shape[::-1]
    return Linear(
        name=node.outputs[0].name or "",
        node=node,
        node_name=node.name or "",
        weight_name=right.root.name or "",
        k=k,
        n=n,
        dtype=right.dtype,
        kind=node.op_type,
        root=right.root,
        scale=_float(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0,
    )


def _computed(node: ir.Node, left: Constant | None) -> str:
    """Returns the reason why a product whose right factor is not constant is skipped."""
    if left is not None:
        return "the constant is the left factor"
    producer = node.inputs[1].producer() if node.inputs[1] is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear" and resolve(producer.inputs[0]):
        return "the weight is quantized already (DequantizeLinear)"
    if producer is not None and follows_from_constants(node.inputs[1]):
        return f"the weight is made of constants by {producer.op_type}: computed, it takes more bytes, or it cannot be"
    return "both inputs are computed"


def _unfit(node: ir.Node, weight: Constant, ranks: Ranks) -> str:
    """Returns the reason why a product with a constant right factor cannot be quantized, "" if it can."""
    if weight.overridable:
        return "the weight is also a graph input, which a caller may override: --convert makes it a constant"
    if resolve(node.inputs[0]) is not None:
        return "both inputs are constant"
    if weight.dtype not in FLOATS or weight.tensor.dtype not in FLOATS:
        way = ": --convert makes it float32" if weight.tensor.dtype == ir.DataType.DOUBLE else ""
        return f"the weight is {weight.tensor.dtype.name.lower()}, not float32, float16 or bfloat16{way}"
    if len(weight.shape) < 2:
        return "the weight is a vector"
    if any(d != 1 for d in weight.shape[:-2]):
        return f"the weight is a stack of matrices {list(weight.shape)}"
    if len(weight.shape) > 2 and (ranks.of(node.inputs[0]) or 0) < len(weight.shape):
        return f"the weight has {len(weight.shape)} dimensions and the activation is not known to have as many"
    k = weight.shape[-1] if node.op_type == "Gemm" and _int(node, "transB", 0) else weight.shape[-2]
    if k < SMALLEST_K or 0 in weight.shape:
        return f"only {k} input channels, fewer than the smallest block ({SMALLEST_K})"
    return ""


def _skip(node: ir.Node, reason: str) -> Skipped:
    constants = [c for v in node.inputs[:2] if (c := resolve(v)) is not None]
    size = sum(c.tensor.nbytes for c in constants)
    return Skipped(node.outputs[0].name or "", node.name or "", node.op_type, reason, size)


def _group(chosen: Sequence[tuple[Linear, Spec]], attention: Mapping[ir.Node, str]) -> list[LinearGroup]:
    """Joins linears of one spec into groups, in graph order.

    Two linears are in one group if they read the same activation with its tokens weighted alike, or the same weight.
    The relation is transitive, so the groups are the components of a graph, found by union-find.
    """
    leaders: dict[int, int] = {}

    def leader(i: int) -> int:
        while leaders[i] != i:
            leaders[i] = leaders[leaders[i]]
            i = leaders[i]
        return i

    first: dict[object, int] = {}
    for i, (linear, spec) in enumerate(chosen):
        leaders[i] = i
        read = ("value", id(linear.node.inputs[0]), attention.get(linear.node, ""), spec)
        for mark in (read, ("weight", *linear.key(), spec)):
            other = leader(first.setdefault(mark, i))
            low, high = sorted((other, leader(i)))
            leaders[high] = low
    groups: dict[int, list[Linear]] = {}
    for i, (linear, _) in enumerate(chosen):
        groups.setdefault(leader(i), []).append(linear)
    return [_linear_group(tuple(linears), chosen[i][1], attention) for i, linears in groups.items()]


def _linear_group(linears: tuple[Linear, ...], spec: Spec, attention: Mapping[ir.Node, str]) -> LinearGroup:
    reads = [(linear.node, value) for linear in linears if (value := linear.node.inputs[0]) is not None]
    sources = {value.name or "": attention.get(node, "") for node, value in reads}
    values = tuple(sources)
    n = sum({linear.key(): linear.n for linear in linears}.values())
    size = sum({linear.root: linear.constant().tensor.nbytes for linear in linears}.values())
    return LinearGroup(linears[0].name, values, linears, spec, linears[0].k, n, size, tuple(sources.values()))


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _is_finite(array: np.ndarray) -> bool:
    """Tells whether every number of a matrix is finite, from the bits of the exponents.

    That needs no copy of the matrix in another type.
    """
    rows = array if array.flags.c_contiguous else array.T
    bits = rows.view(np.dtype(f"u{array.dtype.itemsize}"))
    mask = bits.dtype.type(_EXPONENTS[array.dtype.name])
    step = max(1, _TILE // max(1, bits.shape[1]))
    return not any(((bits[i : i + step] & mask) == mask).any() for i in range(0, len(bits), step))
