"""The residual stream of a model with RMSNorm: its values, the nodes that write them and the nodes that read them.

The residual stream `x [tokens, D]` is the sum that every layer of a transformer reads through a norm and adds to. To
*rotate* it is to multiply it by an orthogonal matrix `R [D, D]`. That keeps the length of x in every token, so an
RMSNorm without its scale γ (gamma) gives `x·R / rms(x·R) = (x / rms(x))·R`: its output is rotated as its input is
(SliceGPT: Ashkboos et al. 2024, section 3.1).

`find_residual_streams` starts at the input of a norm and follows the values that must be rotated together, forwards to
readers and backwards to writers. Each step follows a rule that holds for every R. Where no rule holds, the node goes
into `problems`: it keeps the stream from being rotated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_woq.graph.find.constants import FLOATS, Constant, resolve
from onnx_woq.graph.io.model import Model

_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")
_SKIP, _SUM = "SkipSimplifiedLayerNormalization", 3  # index of the output that is the sum of its inputs and bias
_CENTRED = ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization")
_PASSING = ("Cast", "Identity")
_COUNTING = ("Shape", "Size")  # these readers do not look at the numbers
_LENGTHS = ("ReduceMean", "ReduceSum")  # of squares they make the length of a token
_ELEMENTWISE = ("Add", "Div", "Mul", "Sub", "Sqrt", "Reciprocal", "Pow", "Cast", "Identity", "Max", "Clip")
_DEEP = 8  # the most nodes between the length of a token and the factor that follows from it


@dataclass
class ResidualStream:
    """The values that must be rotated together, and the nodes and constants that a rotation has to change.

    The dicts are ordered sets, except `reads`. A linear is a MatMul or Gemm with a constant weight.

    Attributes:
        main: the main graph of the model.
        width: the number of channels D.
        values: the residual stream, and the unit vectors that norms without gamma make of it.
        normed: the outputs of norms, which include gamma; they are rotated once gamma is moved elsewhere.
        norms: (node, index of the input) of every gamma.
        reads: the linears that read `values` or `normed` -> the gamma to move into their weight, or None.
        writes: the linears that make `values`.
        vectors: (node, index of the input) of every constant that is added to `values`.
        tables: the Gather nodes that take `values` from a constant.
        entrances: the inputs of the model among `values`.
        problems: the reasons why the stream cannot be rotated.
        lengths_of: the values whose lengths something on the way is divided or multiplied by.
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
        """Tells whether `width` is the number of channels; the first width that is asked about becomes that number."""
        self.width = self.width or width
        return width == self.width

    def roots(self) -> set[ir.Value]:
        """Returns the constants that the stream is made from and multiplied by."""
        constants = [linear_weight(node) for node in (*self.reads, *self.writes)]
        constants += [resolve(node.inputs[0]) for node in self.tables]
        return {constant.root for constant in constants if constant is not None}


def find_residual_streams(model: Model) -> list[ResidualStream]:
    """Returns the residual stream of a model, and the other streams that share weights with it.

    The residual stream is the one with the most norms. Other streams share weights with it where the layers stand in
    several branches of an If. The list is empty if there is no RMSNorm.
    """
    found: list[ResidualStream] = []
    seen: set[ir.Value] = set()
    for value in _normalized(model):
        if value not in seen:
            found.append(_follow(value, model.ir.graph))
            seen.update(found[-1].values)
    if not found:
        return []
    largest = max(found, key=lambda stream: len(stream.norms))
    roots = largest.roots()
    return [largest, *(one for one in found if one is not largest and not roots.isdisjoint(one.roots()))]


def has_layer_norm(model: Model) -> bool:
    """Tells whether the graph has a LayerNorm as one operator."""
    return any(node.op_type in _CENTRED for node in model.ir.graph.all_nodes())


def linear_weight(node: ir.Node) -> Constant | None:
    """Returns the weight `[K, N]` (or `[N, K]`, see `output_axis`) of a MatMul or Gemm, None if it is not constant."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain:
        return None
    constant = resolve(node.inputs[1])
    if constant is None or constant.overridable or constant.dtype not in FLOATS or len(constant.shape) < 2:
        return None
    if any(d != 1 for d in constant.shape[:-2]) or (node.op_type == "Gemm" and _int(node, "transA")):
        return None
    return constant


def output_axis(node: ir.Node) -> int:
    """Returns the axis of the output channels in the weight of a linear: 1 for `[K, N]`, 0 for `[N, K]` (transB)."""
    return 0 if node.op_type == "Gemm" and _int(node, "transB") else 1


def _normalized(model: Model) -> Iterator[ir.Value]:
    """Yields the inputs of RMSNorms, and the values that are squared and averaged as in an RMSNorm written out."""
    for node in model.ir.graph.all_nodes():
        if node.op_type in (*_NORMS, _SKIP) and node.inputs[0] is not None:
            yield node.inputs[0]
        elif not node.domain and (squared := _length_of(node)) is not None:
            yield squared


def _follow(start: ir.Value, main: ir.Graph) -> ResidualStream:
    stream = ResidualStream(main)
    pending = [start]
    while pending:
        value = pending.pop()
        if value in stream.values:
            continue
        stream.values[value] = None
        pending += _trace_writer(stream, value)
        for node, index in value.uses():
            pending += _trace_reader(stream, value, node, index)
        if value.is_graph_output():
            stream.problems.append(f"{value.name!r} is an output of the graph")
    if not stream.lengths_of <= stream.values.keys():
        stream.problems.append("a norm divides by the length of something else")
    return stream


def _trace_writer(stream: ResidualStream, value: ir.Value) -> list[ir.Value]:
    """Notes how `value` is made; returns the values that it is made of and that must be rotated with it."""
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
        return [v for index in (0, 1) if not _note_vector(stream, node, index) for v in _present(inputs[index])]
    if op in ("Mul", "Div") and (rotated := _rescaled_operand(stream, node)) is not None:
        return [rotated]
    if op == _SKIP and value.index() == _SUM:
        return _trace_skip_norm(stream, node)
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


def _trace_reader(stream: ResidualStream, value: ir.Value, node: ir.Node, index: int) -> list[ir.Value]:
    """Notes how `node` reads `value`; returns the values that it makes of it and that must be rotated with it."""
    op, inputs = _op(node), node.inputs
    if op in _COUNTING:
        return []
    if op in _PASSING or (op == "Add" and len(inputs) == 2):
        return [node.outputs[0]]
    if op in _NORMS and index == 0 and _int(node, "axis", -1) == -1:
        return _trace_norm(stream, node, 1)
    if op == _SKIP and index in (0, 1):
        return _trace_skip_norm(stream, node)
    if _length_of(node) is value or (_square_of(node) is value and _is_only_averaged(node.outputs[0], value)):
        return []
    if op == "Mul" and _is_channel_vector(stream, node, 1 - index):
        return _trace_norm(stream, node, 1 - index)
    if op in ("Mul", "Div") and _rescaled_operand(stream, node) is value:
        return [node.outputs[0]]
    if _note_reader(stream, node, index, None):
        return []
    stream.problems.append(f"{_name(node)} reads it")
    return []


def _trace_norm(stream: ResidualStream, node: ir.Node, index: int) -> list[ir.Value]:
    """Notes a norm whose gamma is input `index` of `node`; returns no values, as the linears behind it end the stream.

    Every reader of the norm must be a linear, as gamma moves into their weights.
    """
    gamma = resolve(node.inputs[index])
    if gamma is None or not _is_channel_vector(stream, node, index):
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
            elif _op(reader) not in _COUNTING and not _note_reader(stream, reader, at, gamma):
                stream.problems.append(f"{_name(reader)} reads the output of a norm")
    return []


def _trace_skip_norm(stream: ResidualStream, node: ir.Node) -> list[ir.Value]:
    """Notes a norm of a sum; returns the operands of the sum, and the sum if it is an output of the node."""
    if (node, 2) in stream.norms:
        return []
    if len(node.inputs) > 3 and node.inputs[3] is not None and not _note_vector(stream, node, 3):
        stream.problems.append(f"{_name(node)} adds a bias that is not constant")
    total = list(node.outputs[_SUM : _SUM + 1])
    return [*_trace_norm(stream, node, 2), *_present(node.inputs[0]), *_present(node.inputs[1]), *total]


def _note_reader(stream: ResidualStream, node: ir.Node, index: int, gamma: Constant | None) -> bool:
    """Notes and tells whether `node` is a linear that reads input `index`: its weight can take up R and gamma."""
    weight = linear_weight(node) if index == 0 else None
    if weight is None or not stream.fits(weight.shape[-2:][1 - output_axis(node)]):
        return False
    stream.reads[node] = gamma
    return True


def _rescaled_operand(stream: ResidualStream, node: ir.Node) -> ir.Value | None:
    """Returns the operand of a Mul or Div that the other one only makes longer or shorter, token by token."""
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        rotated, by = node.inputs[index], node.inputs[1 - index]
        if rotated is None or rotated is by or resolve(rotated) is not None:
            continue
        sources = set() if _is_number(by) else _length_sources(by)
        if sources is not None:
            stream.lengths_of |= sources
            return rotated
    return None


def _length_sources(value: ir.Value | None, deep: int = _DEEP) -> set[ir.Value] | None:
    """Returns the values from whose lengths alone `value [..., 1]` follows, None if it follows from anything else."""
    node = value.producer() if value is not None else None
    if node is None or not deep:
        return None
    if (squared := _length_of(node)) is not None:
        return {squared}
    if _op(node) not in _ELEMENTWISE:
        return None
    computed = [_length_sources(v, deep - 1) for v in node.inputs if v is not None and not _is_number(v)]
    if not computed or any(sources is None for sources in computed):
        return None
    return {source for sources in computed if sources is not None for source in sources}


def _length_of(node: ir.Node) -> ir.Value | None:
    """Returns the value of which `node` computes the sum of squares over the last axis, or the mean or root of it."""
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
    """Returns x if `node` computes x², else None."""
    if _op(node) == "Mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if _op(node) == "Pow" and (exponent := resolve(node.inputs[1])) is not None and _size(exponent) == 1:
        return node.inputs[0] if float(exponent.tensor.numpy().reshape(-1)[0]) == 2 else None
    return None


def _note_vector(stream: ResidualStream, node: ir.Node, index: int) -> bool:
    """Notes and tells whether an input is a constant vector over the channels: it is added, so it must be rotated."""
    if not _is_channel_vector(stream, node, index):
        return False
    stream.vectors[node, index] = None
    return True


def _is_channel_vector(stream: ResidualStream, node: ir.Node, index: int) -> bool:
    """Tells whether an input is a constant vector over the channels."""
    constant = resolve(node.inputs[index])
    if constant is None or constant.overridable or constant.dtype not in FLOATS or not constant.shape:
        return False
    return constant.shape[-1] == _size(constant) > 1 and stream.fits(constant.shape[-1])


def _has_fine_bias(stream: ResidualStream, node: ir.Node) -> bool:
    """Tells whether a linear adds nothing, or a bias that can be rotated."""
    return node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None or _note_vector(stream, node, 2)


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
    """Returns the operator of a node, with its domain in front where that is not the expected one."""
    ours = ("com.microsoft",) if node.op_type in (_SKIP, _NORMS[0]) else ()
    return node.op_type if node.domain in ("", *ours) else f"{node.domain}.{node.op_type}"


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
