"""A model in memory: loading it with its weights left on disk, copying its structure, handing it to a session.

The *structure* of a model is everything but its large tensors (see `graph.edit.LARGE`). It is held in memory; the
large tensors stay in their files until somebody reads them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import xxhash
from onnx_ir.passes.common import InlinePass

from onnx_woq.core.cpu import no_garbage_search
from onnx_woq.errors import ModelError
from onnx_woq.graph.edit import LARGE, is_large, lift_constants, lift_large, share_names, unshare_names
from onnx_woq.graph.fold import fold_weights
from onnx_woq.graph.io import external_data as files
from onnx_woq.graph.io import wire
from onnx_woq.graph.io.interface import remember_interfaces
from onnx_woq.graph.io.proto import copy_structure, from_proto, to_proto
from onnx_woq.graph.plain_products import write_plainly

logger = logging.getLogger(__name__)

OPSETS = range(13, 26)
"""Versions of the ONNX operators that a model may use."""

OLDEST = 7
"""The oldest opset that ONNX's version converter knows all operators of."""

MOST_NODES = 1_000_000
"""Nodes that a model may have once its functions are inlined."""

MEMORY = "in memory"
"""The file name that `serialize` writes as the place of the tensors that `memory_tensors` holds."""


_READ_CLOSELY = {"MatMul", "Gemm", "Cast", "Transpose", "Identity"}  # this package relies on their inputs being there


@dataclass
class Model:
    """A model whose structure is in memory and whose large tensors are in files.

    Attributes:
        ir: the graph. External tensors have locations relative to `path.parent`.
        path: the real path of the .onnx file.
        named: its path as the user gave it, which may be a link.
        stamps: the real path of each file that the weights are read from, `path` first, and its stamp before that.
    """

    ir: ir.Model
    path: Path
    named: Path
    stamps: Mapping[Path, files.Stamp] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Returns the real paths of all files that the weights are read from, `path` first."""
        return tuple(self.stamps)

    def check_unchanged(self) -> None:
        """Raises InputChanged if a file of the model was changed, replaced or removed since it was loaded."""
        files.check_unchanged(self.stamps)


@no_garbage_search()
def load(path: str | Path, *, convert: bool = False) -> Model:
    """Loads the structure of the model at `path`; large weights stay on disk and are read when asked for.

    On the way the model is brought into a form that the rest of the package relies on:

    * value names are unique over the graph and all its bodies; the main graph keeps its own, and a file has those
      of `graph.io.interface` again;
    * functions that contain a MatMul or Gemm are inlined;
    * large Constant nodes are initializers, and large initializers of bodies are in the main graph;
    * every node stands behind the nodes it reads;
    * weights that nodes compute from constants are constants, see `graph.fold`;
    * products by a constant are MatMul and Gemm where they can be, see `graph.plain_products`.

    Args:
        path: the .onnx file.
        convert: take opsets from `OLDEST` on as well, for `graph.rewrite.modernize`.

    Raises:
        ModelError: the file cannot be used: not ONNX, truncated, data missing or unsafe, opset outside of `OPSETS`.
    """
    named = Path(path)
    real = files.real_path(named)
    source = files.describe_source(real, real.parent)
    proto = _read(named, real)
    _use_one_domain(proto)
    _check_opset(named, proto, OLDEST if convert else OPSETS[0])
    _check_nodes(named, proto)
    model = Model(_to_ir(named, proto), real, named)
    graphs = list(model.ir.graphs())  # a walk over every attribute of every node: once is enough
    lift_constants(graphs, LARGE // 16)  # 16 bytes is the largest element, so every large tensor is among them
    model.stamps = _place_tensors(model.ir, graphs, named, source)
    return finish(model, graphs)


def finish(model: Model, graphs: list[ir.Graph] | None = None) -> Model:
    """Brings a new model into the form that `load` describes: nodes in order, unique names, large tensors lifted.

    Args:
        model: the model; it is changed in place and returned.
        graphs: all its graphs, the main graph first, if the caller has them.
    """
    graphs = list(model.ir.graphs()) if graphs is None else graphs
    _sort(model.ir.graph)
    share_names(graphs, _unique_names(graphs, remember_interfaces(graphs)))
    write_plainly(model.ir.graph)
    fold_weights(model.ir.graph)
    lift_large(model.ir)
    return model


@no_garbage_search()
def clone(model: Model) -> Model:
    """Returns a copy of the structure to edit freely; the tensors are shared."""
    copy = copy_structure(model.ir)
    unshare_names(copy)
    return replace(model, ir=copy)


@no_garbage_search()
def structure(model: Model) -> onnx.ModelProto:
    """Returns the structure as protobuf, for a session or for shape inference; next to no weights are in it.

    Large tensors are external: those on disk at locations relative to `model.path.parent`, those in memory in a file
    called `MEMORY` that does not exist; `memory_tensors` has them under their names. Large tensors of bodies move to
    the main graph of `model`, in place.
    """
    places = {
        name: ir.ExternalTensor(MEMORY, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
        for name, tensor in _memory(model)
    }
    return to_proto(model.ir, places)


def serialize(model: Model) -> bytes:
    """Returns the protobuf of `structure` as the bytes of an .onnx file."""
    return structure(model).SerializeToString()


def memory_tensors(model: Model) -> dict[str, np.ndarray]:
    """Returns the large tensors that no file has, by name: a session needs them beside `serialize(model)`."""
    return {name: tensor.numpy() for name, tensor in _memory(model)}


def model_hash(model: Model) -> str:
    """Returns a hash of the contents of the .onnx file and its data files, whatever the files are called.

    It is XXH3 of 128 bits in hexadecimal digits. That is ten times as fast as a cryptographic hash, and telling apart
    the models that a user has needs no protection against forgery.

    Raises:
        ModelError: a file cannot be read any more.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(1 << 18))  # stays in the processor's cache
    try:
        for file in model.files:
            with file.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))  # shows bytes moved to the next file
                while count := stream.readinto(buffer):
                    digest.update(buffer[:count])
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): fetch it again") from error
    return digest.hexdigest()


def file_bytes(model: Model) -> int:
    """Returns the size in bytes of the .onnx file and its data files."""
    return sum(file.stat().st_size for file in model.files)


def _read(named: Path, real: Path) -> onnx.ModelProto:
    """Returns the structure in a file, or raises a ModelError that says what the file is instead of a model."""
    with real.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{named} is a Git LFS pointer, not the model: run 'git lfs pull' beside it")
    if head[4:8] == b"ORTM":
        raise ModelError(f"{named} is an ORT-format model: give the .onnx file it was made from")
    try:
        proto = wire.read_structure(real)
    except wire.WireError as error:
        raise ModelError(f"{named} is not an ONNX model, or is truncated ({error}): fetch it again") from error
    except OSError as error:
        raise ModelError(f"{named} cannot be read: {error.strerror}") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{named} is not an ONNX model: it has no graph; fetch or export it again")
    if not 0 <= proto.ir_version < 1 << 31:
        raise ModelError(f"{named} says IR version {proto.ir_version}, which does not exist: fetch or export it again")
    _drop_references(proto.graph)
    if proto.graph.sparse_initializer:
        raise ModelError(f"{named} has sparse initializers, which are not supported: export it with dense weights")
    return proto


def _use_one_domain(proto: onnx.ModelProto) -> None:
    """Makes "" the domain of ONNX's own operators everywhere; runtimes read "ai.onnx" as the same."""
    for imports in (proto.opset_import, *(function.opset_import for function in proto.functions)):
        versions = [one.version for one in imports if one.domain in ("", "ai.onnx")]
        if any(one.domain == "ai.onnx" for one in imports):
            others = [one for one in imports if one.domain not in ("", "ai.onnx")]
            kept = [onnx.helper.make_opsetid("", max(versions)), *others]
            del imports[:]
            imports.extend(kept)
    for node in _nodes(proto):
        if node.domain == "ai.onnx":
            node.domain = ""


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yields the nodes of the graph, of its functions, and of all bodies."""
    pending = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while pending:
        node = pending.pop()
        pending += [inner for attribute in node.attribute for inner in attribute.g.node]
        yield node


def _drop_references(graph: onnx.GraphProto) -> None:
    """Drops names of parameters from attributes: outside of functions nobody gives them, and runtimes ignore them."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                attribute.ClearField("ref_attr_name")
            if attribute.HasField("g"):
                _drop_references(attribute.g)


def _check_opset(named: Path, proto: onnx.ModelProto, oldest: int) -> None:
    version = _default_version(proto)
    if version is None:
        raise ModelError(f"{named} does not say which version of the ONNX operators it uses: export it again")
    if version < oldest:
        way = "give --convert (in Python convert=True), or " if version >= OLDEST else ""
        raise ModelError(f"{named} uses opset {version}, older than {oldest}: {way}export it with a newer opset")
    if version > OPSETS[-1]:
        raise ModelError(f"{named} uses opset {version}, newer than {OPSETS[-1]}: export it with opset {OPSETS[-1]}")


def _check_nodes(named: Path, proto: onnx.ModelProto) -> None:
    """Raises a ModelError for a node without the inputs and attributes that this package takes for granted."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    context.opset_imports = {"": _default_version(proto) or 0}
    for node in _nodes(proto):
        if node.op_type not in _READ_CLOSELY or node.domain:
            continue
        try:
            onnx.checker.check_node(node, context)
        except (onnx.checker.ValidationError, ValueError) as error:  # ValueError: a message that is not UTF-8
            raise ModelError(f"{named} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def _default_version(proto: onnx.ModelProto) -> int | None:
    return next((o.version for o in proto.opset_import if not o.domain), None)


def _to_ir(named: Path, proto: onnx.ModelProto) -> ir.Model:
    try:
        model = from_proto(proto)
    except Exception as error:  # onnx_ir wraps whatever it meets
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        raise ModelError(f"{named} is not a valid ONNX model: {cause}") from error
    heavy = _heavy_functions(model)
    if not heavy:
        return model
    if (nodes := _nodes_inlined(model)) > MOST_NODES:
        raise ModelError(f"{named} calls its functions so often that they are {nodes:,} nodes: export it without them")
    try:
        InlinePass(lambda function: function.identifier() in heavy)(model)
    except Exception as error:  # the pass raises ValueError or its own; it may stop half way, so start over
        logger.warning("the functions of %s cannot be inlined (%s); the MatMuls inside them stay float", named, error)
        return from_proto(proto)
    return model


def _nodes_inlined(model: ir.Model) -> int:
    """Returns the nodes of the model if every call of a function were written out; 0 if functions call themselves."""
    calls = {
        key: Counter(node.op_identifier() for node in function.all_nodes()) for key, function in model.functions.items()
    }
    sizes: dict[ir.OperatorIdentifier, int] = {}
    try:
        for key in TopologicalSorter({key: calls[key].keys() & calls.keys() for key in calls}).static_order():
            sizes[key] = sum(count * sizes.get(op, 1) for op, count in calls[key].items())
    except CycleError:  # the inliner says which
        return 0
    return sum(sizes.get(node.op_identifier(), 1) for node in model.graph.all_nodes())


def _heavy_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Returns the functions that contain a MatMul or Gemm, directly or through functions they call."""
    heavy: set[ir.OperatorIdentifier] = set()
    while True:
        more = {
            key
            for key, function in model.functions.items()
            if any(n.op_type in ("MatMul", "Gemm") or n.op_identifier() in heavy for n in function.all_nodes())
        }
        if more == heavy:
            return heavy
        heavy = more


def _place_tensors(
    model: ir.Model, graphs: Iterable[ir.Graph], named: Path, source: files.Source
) -> dict[Path, files.Stamp]:
    """Checks every external tensor and points it to its real file; returns the files' stamps, the .onnx first."""
    real = source.path
    sources = {real.name: source}

    def place(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        location = str(tensor.location)
        if location not in sources:
            sources[location] = files.describe_source(files.find_data_file(location, named, real), real.parent)
        return files.place_tensor(tensor, sources[location])

    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                placed = place(value.const_value)
                inner = value.graph is not model.graph  # sessions read files for the main graph alone
                value.const_value = placed if is_large(placed) or not inner else _in_memory(placed)
            elif value.const_value is not None:
                value.const_value = _unpacked(named, value.const_value)
        for node in graph:
            _load_attributes(node, place)
    for function in model.functions.values():
        for node in function.all_nodes():
            _load_attributes(node, place)
        for value in (value for body in function.subgraphs() for value in body.initializers.values()):
            if value.const_value is not None:
                value.const_value = _loaded(value.const_value, place)
    return {source.path: source.stamp for source in sources.values()}


def _load_attributes(node: ir.Node, place: Callable[[ir.ExternalTensor], ir.ExternalTensor]) -> None:
    """Reads the tensors in attributes of a node: only initializers may be external in every version of ONNX Runtime."""
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes[name] = ir.AttrTensor(name, _loaded(attribute.value, place))
        elif attribute.type == ir.AttributeType.TENSORS:
            node.attributes[name] = ir.AttrTensors(name, [_loaded(tensor, place) for tensor in attribute.value])


def _loaded(tensor: ir.TensorProtocol, place: Callable[[ir.ExternalTensor], ir.ExternalTensor]) -> ir.TensorProtocol:
    """Returns a tensor in memory, if it is external; others as they are."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return _in_memory(place(tensor))


def _in_memory(tensor: ir.ExternalTensor) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _unpacked(named: Path, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Returns `tensor`, or if it is large a copy as one array, which sessions may read in place.

    A large tensor that is not external is stored as a list of numbers. One whose data is missing is refused before
    anything allocates what its dimensions claim.

    Raises:
        ModelError: the tensor has no type or no data, or cannot be read.
    """
    proto = getattr(tensor, "raw", None)
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{named}: tensor {tensor.name!r} has no type: the model is damaged, fetch it again")
    if not isinstance(proto, onnx.TensorProto) or not is_large(tensor):
        return tensor
    if any(d < 0 for d in proto.dims) or proto.ByteSize() < tensor.nbytes // 4:  # varints take a byte per element
        raise ModelError(f"{named}: tensor {tensor.name!r} of shape {list(proto.dims)} has no data: export it again")
    try:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    except Exception as error:  # onnx_ir asserts that type and field belong together
        raise ModelError(f"{named}: tensor {tensor.name!r} cannot be read ({error}): export it again") from error


def _sort(graph: ir.Graph) -> None:
    """Sorts the nodes of a graph behind the nodes they read, unless they are in such an order."""
    seen: set[ir.Node | None] = {None}
    for node in graph:
        if not all(v is None or v.producer() in seen or v.graph is not graph for v in node.inputs):
            graph.sort()
            return
        seen.add(node)


def _unique_names(graphs: Iterable[ir.Graph], reserved: set[str]) -> set[str]:
    """Renames values of bodies so that every value of the model has a name of its own; returns all names.

    Args:
        graphs: all graphs of the model, the main graph first.
        reserved: names that no value is renamed to.
    """
    used: set[str] = set()
    counts: dict[str, int] = {}  # last number tried for a name: hundreds of bodies may all have the same ones
    for graph in graphs:  # the main graph comes first, and keeps its names
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in dict.fromkeys(values):
            if not value.name:
                continue
            name, count = value.name, counts.get(value.name, 1)
            while name in used or (count > 1 and name in reserved):
                count += 1
                name = f"{value.name}_{count}"
            counts[value.name] = count
            used.add(name)
            if name != value.name:
                value.name = name
    return used | reserved


def _memory(model: Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yields the large tensors that no file has, with their names; those of bodies move to the main graph first."""
    lift_large(model.ir)
    for name, value in model.ir.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and is_large(tensor) and not isinstance(tensor, ir.ExternalTensor):
            yield name, tensor
