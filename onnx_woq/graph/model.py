"""Load a model with its weights left on disk, copy its structure, hand it to a session."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from onnx_woq.errors import ModelError
from onnx_woq.graph import files, wire
from onnx_woq.graph.edit import LARGE, is_large, is_movable, lift_large, share_names, unshare_names
from onnx_woq.graph.save import check_output, save

__all__ = [
    "LARGE", "MEMORY", "Model", "check_output", "clone", "file_bytes", "load", "low_bit_nodes", "memory_tensors",
    "model_hash", "save", "serialize",
]  # fmt: skip

logger = logging.getLogger(__name__)

OPSETS = range(13, 26)
MEMORY = "in memory"  # where `serialize` says that the tensors of `memory_tensors` lie

_READ_CLOSELY = {"MatMul", "Gemm", "Cast", "Transpose", "Identity"}  # their inputs and attributes are relied upon
_LOW_BIT_OPS = {"MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE"}
_LOW_BIT_TYPES = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.FLOAT4E2M1}


@dataclass
class Model:
    """A model in memory, its large tensors in files.

    Attributes:
        ir: the graph. External tensors have locations relative to `path.parent`.
        path: the real path of the .onnx file.
        files: real paths of every file the weights are read from, `path` first.
    """

    ir: ir.Model
    path: Path
    files: tuple[Path, ...] = ()


def load(path: str | Path) -> Model:
    """Loads the structure of `path`; its large weights stay on disk and are read when asked for.

    Value names are made unique over all subgraphs (inputs and outputs of the model keep theirs), and functions that
    contain a MatMul or Gemm are inlined.

    Raises:
        ModelError: the file cannot be used; the message says what to do.
    """
    named = Path(path)
    real = files.real_path(named)
    proto = _read(named, real)
    _check_opset(named, proto)
    _check_nodes(named, proto)
    model = Model(_to_ir(named, proto), real)
    LiftConstantsToInitializersPass(size_limit=LARGE // 16)(model.ir)  # 16 bytes: the largest element
    model.files = _place_tensors(model.ir, named, real)
    _sort(model.ir.graph)
    share_names(model.ir, _unique_names(model.ir))
    lift_large(model.ir)
    return model


def clone(model: Model) -> Model:
    """A copy of the structure to edit freely; the tensors are shared."""
    copy = model.ir.clone()
    unshare_names(copy)
    return Model(copy, model.path, model.files)


def serialize(model: Model) -> bytes:
    """The structure as .onnx bytes for a session, next to no weights in them.

    Large tensors on disk are external, at locations relative to `model.path.parent`; large tensors in memory are
    external at the place `MEMORY`, and `memory_tensors` has them under their names.
    """
    structure = model.ir.clone()
    lift_large(structure)
    for value, tensor in _memory(structure):
        shape = ir.Shape(tensor.shape.numpy())
        place = ir.ExternalTensor(MEMORY, 0, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "")
        value.const_value = place
    return ir.to_proto(structure).SerializeToString()


def memory_tensors(model: Model) -> dict[str, np.ndarray]:
    """The arrays to hand to a session beside `serialize(model)`, by initializer name."""
    return {value.name or "": tensor.numpy() for value, tensor in _memory(model.ir)}


def model_hash(path: str | Path) -> str:
    """A hash of the contents of the .onnx file and of its external data files, whatever they are called."""
    digest = hashlib.blake2b(digest_size=16)
    for file in load(path).files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def file_bytes(model: Model) -> int:
    """Bytes of the .onnx file and its data files on disk."""
    return sum(file.stat().st_size for file in model.files)


def low_bit_nodes(model: Model) -> int:
    """How many nodes already carry weights below 8 bits or in a blockwise format."""
    return sum(map(_is_low_bit, all_nodes(model.ir)))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the graph, its subgraphs and its functions; an outer node comes before its bodies."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _is_low_bit(node: ir.Node) -> bool:
    if node.op_type in _LOW_BIT_OPS:
        return True
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return False
    return any(v is not None and v.dtype in _LOW_BIT_TYPES for v in (*node.inputs, *node.outputs))


def _read(named: Path, real: Path) -> onnx.ModelProto:
    """The structure of a file that is an ONNX model, or a ModelError that says what it is instead."""
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
    if proto.graph.sparse_initializer:
        raise ModelError(f"{named} has sparse initializers, which are not supported: export it with dense weights")
    return proto


def _check_opset(named: Path, proto: onnx.ModelProto) -> None:
    version = _default_version(proto)
    if version is None:
        raise ModelError(f"{named} does not say which version of the ONNX operators it uses: export it again")
    if version < OPSETS[0]:
        raise ModelError(
            f"{named} uses opset {version}, older than {OPSETS[0]}: export it with a newer opset, "
            "or convert it with onnx.version_converter"
        )
    if version > OPSETS[-1]:
        raise ModelError(f"{named} uses opset {version}, newer than {OPSETS[-1]}: export it with opset {OPSETS[-1]}")


def _check_nodes(named: Path, proto: onnx.ModelProto) -> None:
    """Refuses nodes without the inputs and attributes that the rest of this package takes for granted."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    pending = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    context.opset_imports = {o.domain: o.version for o in proto.opset_import} | {"": _default_version(proto) or 0}
    while pending:
        node = pending.pop()
        pending += [inner for attribute in node.attribute for inner in attribute.g.node]
        if node.op_type not in _READ_CLOSELY or node.domain not in ("", "ai.onnx"):
            continue
        try:
            onnx.checker.check_node(node, context)
        except (onnx.checker.ValidationError, ValueError) as error:  # ValueError: a message that is not UTF-8
            raise ModelError(f"{named} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def _default_version(proto: onnx.ModelProto) -> int | None:
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)


def _to_ir(named: Path, proto: onnx.ModelProto) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir wraps whatever it meets
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        raise ModelError(f"{named} is not a valid ONNX model: {cause}") from error
    heavy = _heavy_functions(model)
    if not heavy:
        return model
    try:
        InlinePass(lambda function: function.identifier() in heavy)(model)
    except Exception as error:  # the pass raises ValueError or its own; it may stop half way, so start over
        logger.warning("the functions of %s cannot be inlined (%s); the MatMuls inside them stay float", named, error)
        return ir.from_proto(proto)
    return model


def _heavy_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that contain a MatMul or Gemm, directly or through functions they call."""
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


def _place_tensors(model: ir.Model, named: Path, real: Path) -> tuple[Path, ...]:
    """Checks every external tensor and points it at its real file; returns the files, `real` first."""
    targets: dict[str, Path] = {real.name: real}
    folder = real.parent

    def place(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        location = str(tensor.location)
        if location not in targets:
            targets[location] = files.data_file(location, named, real)
        return files.placed(tensor, targets[location], folder)

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = place(value.const_value)
            elif value.const_value is not None:
                value.const_value = _unpacked(named, value.const_value)
    for node in all_nodes(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                # Only initializers may be external in every runtime version.
                loaded = ir.Tensor(place(attribute.value).numpy().copy(), name=attribute.value.name)
                node.attributes[name] = ir.AttrTensor(name, loaded)
    return tuple(dict.fromkeys(targets.values()))


def _unpacked(named: Path, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor of the structure; a large one (stored as a list of numbers) as one array, which sessions may point at.

    Refuses a tensor whose data is missing before anything allocates what its dimensions claim.
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
    """Puts nodes behind the nodes they read, where an exporter did not."""
    seen: set[ir.Node | None] = {None}
    for node in graph:
        if not all(v is None or v.producer() in seen or v.graph is not graph for v in node.inputs):
            graph.sort()
            return
        seen.add(node)


def _unique_names(model: ir.Model) -> set[str]:
    """Gives values in subgraphs names that no other value has, and returns all names."""
    used: set[str] = set()
    for graph in model.graphs():  # the main graph comes first, and keeps its names
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in dict.fromkeys(values):
            if not value.name:
                continue
            name, count = value.name, 1
            while name in used:
                count += 1
                name = f"{value.name}_{count}"
            used.add(name)
            value.name = name
    return used


def _memory(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Large tensors that no file has, as far as `lift_large` can bring them into the main graph."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            movable = graph is model.graph or is_movable(value)
            if tensor is not None and movable and is_large(tensor) and not isinstance(tensor, ir.ExternalTensor):
                yield value, tensor
