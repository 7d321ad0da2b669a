"""Find the residual stream of a model with RMSNorm: every value of it, and whoever writes or reads it.

Multiplying the stream x by an orthogonal matrix keeps its length in every token, so an RMSNorm without its gamma gives
`x·R / rms(x·R) = (x / rms(x))·R`: what it makes is rotated like what it reads (SliceGPT: Ashkboos et al. 2024, section
3.1). `streams` follows a rotated value through the graph, forwards and backwards, by rules that hold for every R, and
says what stands in the way where no rule does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_woq.graph.find.constants import FLOATS, Constant, readers, resolve
from onnx_woq.graph.io.model import Model

_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")
_SKIP, _SUM = "SkipSimplifiedLayerNormalization", 3  # output: of its two inputs, with the bias
_CENTRED = ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization")
_PASSING = ("Cast", "Identity")
_COUNTING = ("Shape", "Size")  # readers that do not look at the numbers
_LENGTHS = ("ReduceMean", "ReduceSum")  # of squares
_ELEMENTWISE = ("Add", "Div", "Mul", "Sub", "Sqrt", "Reciprocal", "Pow", "Cast", "Identity", "Max", "Clip")
_DEEP = 8  # nodes between a value and the length of a token that it follows from


@dataclass
class Stream:
    """The values that are rotated together, and what is to be done for it.

    Attributes:
        main: the main graph of the model.
        width: channels.
        values: of the stream, and unit vectors that norms make of it.
        normed: what norms make, multiplied by gamma: rotated once gamma is 1.
        norms: (node, input) of every gamma.
        reads: linear nodes that read `values` or `normed`, with the gamma their input is without.
        writes: linear nodes that make `values`.
        vectors: (node, input) of constants that are added to them.
        tables: Gather nodes that take them from a constant.
        entrances: inputs of the model among `values`.
        problems: why it cannot be rotated.
    """

    main: ir.Graph
    width: int = 0
    values: dict[ir.Value, None] = field(default_factory=dict)
    normed: dict[ir.Value, None] = field(default_factory=dict)
    norms: dict[tuple[ir.Node, int], None] = field(default_factory=dict)
    reads: dict[ir.Node, Constant | None] = field(default_factory=dict)
    writes: dict[ir.Node, None] = field(default_factory=dict)
    vectors: dict[tuple[ir.Node, int], None] = field(default_factory=dict)
    tables: dict[ir.Node, None] = field(default_factory=dict)
    entrances: dict[ir.Value, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lengths_of: set[ir.Value] = field(default_factory=set)

    def fits(self, width: int) -> bool:
        """Whether `width` is the number of channels; the first one asked for is."""
        self.width = self.width or width
        return width == self.width

    def roots(self) -> set[ir.Value]:
        """The constants it is written by and read through."""
        constants = [linear_weight(node) for node in (*self.reads, *self.writes)]
        constants += [resolve(node.inputs[0]) for node in self.tables]
        return {constant.root for constant in constants if constant is not None}


def streams(model: Model) -> list[Stream]:
    """The residual stream: that of the most norms, and those that share weights with it, as branches of an If do.

    Empty where there is no RMSNorm.
    """
    found: list[Stream] = []
    seen: set[ir.Value] = set()
    for value in _normalized(model):
        if value not in seen:
            found.append(_followed(value, model.ir.graph))
            seen.update(found[-1].values)
    if not found:
        return []
    largest = max(found, key=lambda stream: len(stream.norms))
    roots = largest.roots()
    return [largest, *(one for one in found if one is not largest and not roots.isdisjoint(one.roots()))]


def has_layer_norm(model: Model) -> bool:
    """Whether the graph has a LayerNorm as an operator."""
    return any(node.op_type in _CENTRED for node in model.ir.graph.all_nodes())


def linear_weight(node: ir.Node) -> Constant | None:
    """The constant [K, N] (or [N, K], see `output_axis`) that a MatMul or Gemm multiplies by, None if it has none."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    constant = resolve(node.inputs[1])
    if constant is None or constant.overridable or constant.dtype not in FLOATS or len(constant.shape) < 2:
        return None
    if any(d != 1 for d in constant.shape[:-2]) or (node.op_type == "Gemm" and _int(node, "transA")):
        return None
    return constant


def output_axis(node: ir.Node) -> int:
    """Of the last two axes of a linear node's weight, the one along which its outputs lie."""
    return 0 if node.op_type == "Gemm" and _int(node, "transB") else 1


def is_shared(root: ir.Value, nodes: set[ir.Node]) -> bool:
    """Whether anything but `nodes` needs a constant."""
    return root.is_graph_output() or any(node not in nodes for node, _ in readers(root))


def _normalized(model: Model) -> Iterator[ir.Value]:
    """What is squared and averaged, or goes into an RMSNorm."""
    for node in model.ir.graph.all_nodes():
        if node.op_type in (*_NORMS, _SKIP) and node.inputs[0] is not None:
            yield node.inputs[0]
        elif node.domain in ("", "ai.onnx") and (squared := _length_of(node)) is not None:
            yield squared


def _followed(start: ir.Value, main: ir.Graph) -> Stream:
    stream = Stream(main)
    pending = [start]
    while pending:
        value = pending.pop()
        if value in stream.values:
            continue
        stream.values[value] = None
        pending += _writer(stream, value)
        for node, index in value.uses():
            pending += _reader(stream, value, node, index)
        if value.is_graph_output():
            stream.problems.append(f"{value.name!r} is an output of the graph")
    if not stream.lengths_of <= stream.values.keys():
        stream.problems.append("a norm divides by the length of something else")
    return stream


def _writer(stream: Stream, value: ir.Value) -> list[ir.Value]:
    """The values that are rotated if `value` is, for it is made of them."""
    node = value.producer()
    if node is None:
        if value.is_initializer() or value.graph is not stream.main:
            stream.problems.append(f"{value.name!r} comes from outside of what can be followed")
        stream.entrances[value] = None
        return []
    op, inputs = _op(node), node.inputs
    if op in _PASSING:
        return _present(inputs[0])
    if op == "Add":
        return [v for index in (0, 1) if not _is_vector(stream, node, index) for v in _present(inputs[index])]
    if op in ("Mul", "Div") and (rotated := _scaled(stream, node)) is not None:
        return [rotated]
    if op == _SKIP and value.index() == _SUM:
        return _skip(stream, node)
    table = resolve(inputs[0]) if op == "Gather" and not _int(node, "axis") else None
    if table is not None and not table.overridable and len(table.shape) == 2 and stream.fits(table.shape[1]):
        stream.tables[node] = None
        return []
    weight = linear_weight(node)
    if weight is not None and stream.fits(weight.shape[-2:][output_axis(node)]) and _has_fine_bias(stream, node):
        stream.writes[node] = None
        return []
    mean = " (a LayerNorm, which takes the mean away, is no RMSNorm)" if op == "Sub" else ""
    stream.problems.append(f"{_name(node)} writes to it{mean}")
    return []


def _reader(stream: Stream, value: ir.Value, node: ir.Node, index: int) -> list[ir.Value]:
    """The values that are rotated if `value` is, for `node` makes them of it."""
    op, inputs = _op(node), node.inputs
    if op in _COUNTING:
        return []
    if op in _PASSING or (op == "Add" and len(inputs) == 2):
        return [node.outputs[0]]
    if op in _NORMS and index == 0 and _int(node, "axis", -1) == -1:
        return _norm(stream, node, 1)
    if op == _SKIP and index in (0, 1):
        return _skip(stream, node)
    if _length_of(node) is value or (_square_of(node) is value and _is_only_averaged(node.outputs[0], value)):
        return []
    if op == "Mul" and _is_gamma(stream, node, 1 - index):
        return _norm(stream, node, 1 - index)
    if op in ("Mul", "Div") and _scaled(stream, node) is value:
        return [node.outputs[0]]
    if _reads(stream, node, index, None):
        return []
    stream.problems.append(f"{_name(node)} reads it")
    return []


def _norm(stream: Stream, node: ir.Node, index: int) -> list[ir.Value]:
    """A norm whose gamma is input `index` of `node`: whatever reads it must be linear, for gamma goes there."""
    gamma = resolve(node.inputs[index])
    if gamma is None or not _is_gamma(stream, node, index):
        stream.problems.append(f"the scale of {_name(node)} is not {stream.width or 'so many'} constant numbers")
        return []
    stream.norms[node, index] = None
    pending = [node.outputs[0]]
    while pending:
        value = pending.pop()
        stream.normed[value] = None
        if value.is_graph_output():
            stream.problems.append(f"{value.name!r} is an output of the graph")
        for reader, at in value.uses():
            if _op(reader) in _PASSING:
                pending.append(reader.outputs[0])
            elif _op(reader) not in _COUNTING and not _reads(stream, reader, at, gamma):
                stream.problems.append(f"{_name(reader)} reads the output of a norm")
    return []


def _skip(stream: Stream, node: ir.Node) -> list[ir.Value]:
    """A norm of the sum of two values of the stream, which may give the sum as well."""
    if (node, 2) in stream.norms:
        return []
    if len(node.inputs) > 3 and node.inputs[3] is not None and not _is_vector(stream, node, 3):
        stream.problems.append(f"{_name(node)} adds a bias that is not constant")
    total = list(node.outputs[_SUM : _SUM + 1])
    return [*_norm(stream, node, 2), *_present(node.inputs[0]), *_present(node.inputs[1]), *total]


def _reads(stream: Stream, node: ir.Node, index: int, gamma: Constant | None) -> bool:
    """Whether `node` multiplies what it reads by a constant, which can take up R and gamma."""
    weight = linear_weight(node) if index == 0 else None
    if weight is None or not stream.fits(weight.shape[-2:][1 - output_axis(node)]):
        return False
    stream.reads[node] = gamma
    return True


def _scaled(stream: Stream, node: ir.Node) -> ir.Value | None:
    """The operand of a Mul or Div that the other one only makes longer or shorter, token by token."""
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        rotated, by = node.inputs[index], node.inputs[1 - index]
        if rotated is None or rotated is by or resolve(rotated) is not None:
            continue
        bases = set() if _is_number(by) else _bases(by)
        if bases is not None:
            stream.lengths_of |= bases
            return rotated
    return None


def _bases(value: ir.Value | None, deep: int = _DEEP) -> set[ir.Value] | None:
    """The values from whose lengths alone `value [..., 1]` follows, None if it follows from anything else."""
    node = value.producer() if value is not None else None
    if node is None or not deep:
        return None
    if (squared := _length_of(node)) is not None:
        return {squared}
    if _op(node) not in _ELEMENTWISE:
        return None
    computed = [_bases(v, deep - 1) for v in node.inputs if v is not None and not _is_number(v)]
    if not computed or any(bases is None for bases in computed):
        return None
    return {base for bases in computed if bases is not None for base in bases}


def _length_of(node: ir.Node) -> ir.Value | None:
    """The value whose sum of squares over the last axis, or the mean or root of it, `node` computes."""
    op = _op(node)
    if op not in (*_LENGTHS, "ReduceL2", "ReduceSumSquare") or node.inputs[0] is None or not _int(node, "keepdims", 1):
        return None
    if op in _LENGTHS:
        square = node.inputs[0].producer()
        value = _square_of(square) if square is not None else None
    else:
        value = node.inputs[0]
    attribute = node.attributes.get("axes")
    axes = resolve(node.inputs[1]) if attribute is None and len(node.inputs) > 1 else None
    over = list(attribute.as_ints()) if attribute is not None else [] if axes is None else axes.tensor.numpy().tolist()
    return value if over == [-1] else None


def _square_of(node: ir.Node) -> ir.Value | None:
    """x where `node` is x²."""
    if _op(node) == "Mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if _op(node) == "Pow" and (exponent := resolve(node.inputs[1])) is not None and _size(exponent) == 1:
        return node.inputs[0] if float(exponent.tensor.numpy().reshape(-1)[0]) == 2 else None
    return None


def _is_vector(stream: Stream, node: ir.Node, index: int) -> bool:
    """Whether an input is a constant with a number for each channel, which is added and so must be rotated."""
    if not _is_gamma(stream, node, index):
        return False
    stream.vectors[node, index] = None
    return True


def _is_gamma(stream: Stream, node: ir.Node, index: int) -> bool:
    """Whether an input is a constant with a number for each channel."""
    constant = resolve(node.inputs[index])
    if constant is None or constant.overridable or constant.dtype not in FLOATS or not constant.shape:
        return False
    return constant.shape[-1] == _size(constant) > 1 and stream.fits(constant.shape[-1])


def _has_fine_bias(stream: Stream, node: ir.Node) -> bool:
    """Whether what a linear node adds can be rotated."""
    return node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None or _is_vector(stream, node, 2)


def _is_number(value: ir.Value | None) -> bool:
    constant = resolve(value)
    return constant is not None and not constant.overridable and _size(constant) == 1


def _size(constant: Constant) -> int:
    return math.prod(constant.shape)


def _is_only_averaged(square: ir.Value, value: ir.Value) -> bool:
    return not square.is_graph_output() and all(_length_of(user) is value for user, _ in square.uses())


def _present(value: ir.Value | None) -> list[ir.Value]:
    return [] if value is None else [value]


def _op(node: ir.Node) -> str:
    """The operator, by its domain too where that is another than expected."""
    ours = ("com.microsoft",) if node.op_type in (_SKIP, _NORMS[0]) else ()
    return node.op_type if node.domain in ("", "ai.onnx", *ours) else f"{node.domain}.{node.op_type}"


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
