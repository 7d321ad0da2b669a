"""Write a model: streamed, both files or none, and never over what is being read."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx
import onnx_ir as ir

from onnx_woq.errors import OutputError
from onnx_woq.graph.edit import is_large, lift_large

if TYPE_CHECKING:
    from onnx_woq.graph.model import Model

_PAGE = 4096  # bytes; big tensors start on a page so that every runtime can map them
_LINE = 64  # bytes; small ones on a cache line, so that no float is misaligned


def data_path(out: Path) -> Path:
    """The external data file that belongs to the model file `out`."""
    return out.with_name(out.name + ".data")


def check_output(model: Model, out: str | Path) -> Path:
    """`out` as a path, if the model may be written there. Worth asking before hours of work.

    Raises:
        OutputError: `out` is the model being read or one of its data files, a folder, or in a folder that is missing
            or not writable.
    """
    out = Path(out)
    if out.is_dir():
        raise OutputError(f"{out} is a folder: name a file in it, such as {out / 'model.onnx'}")
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} does not exist: create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {out.parent} is not writable: choose another one")
    for target in (out, data_path(out)):
        if target.is_dir():
            raise OutputError(f"{target} is a folder and in the way: remove it or choose another name")
        if any(_same(target, source) for source in model.files):
            raise OutputError(f"{target} is the model being read: choose another name for the result")
    return out


def save(model: Model, out: str | Path, *, metadata: Mapping[str, str]) -> list[Path]:
    """Writes the model to `out`, its large tensors to one file `<out>.data` beside it.

    Both files are written under temporary names in the same folder and then renamed, so a failure or an interrupt
    leaves the folder as it was. Tensors pass one at a time; those on disk are copied from file to file.

    Args:
        model: left as it is.
        out: the .onnx file; an existing one is replaced.
        metadata: added to the model's own.

    Returns:
        The files written, `out` first.

    Raises:
        OutputError: it cannot be written there.
    """
    out = check_output(model, out)
    structure = model.ir.clone()
    lift_large(structure)
    structure.metadata_props.update(metadata)
    structure.ir_version = max(structure.ir_version, _min_ir_version(structure))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            new = Path(folder) / out.name
            big = _move_out(structure, data_path(out).name)
            if big:
                _write_data(big, data_path(new), out)
            new.write_bytes(_serialized(structure))
            return _swap_in(new, out)
    except OSError as error:
        raise OutputError(_explain(error, out)) from error


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _min_ir_version(model: ir.Model) -> int:
    """The oldest IR version that may carry these opsets."""
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)


def _move_out(model: ir.Model, location: str) -> list[tuple[int, ir.TensorProtocol]]:
    """Makes every large initializer external in the file `location`; returns the tensors with their offsets there."""
    placed: dict[object, ir.ExternalTensor] = {}
    order: list[tuple[int, ir.TensorProtocol]] = []
    end = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if graph is not model.graph or not is_large(tensor):
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
                continue
            key = _identity(tensor)
            if key not in placed:
                step = _PAGE if tensor.nbytes >= 64 * _PAGE else _LINE
                offset = -(-end // step) * step
                end = offset + tensor.nbytes
                shape = ir.Shape(tensor.shape.numpy())
                placed[key] = ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name="")
                order.append((offset, tensor))
            there = placed[key]
            value.const_value = ir.ExternalTensor(
                location, there.offset, there.length, there.dtype, shape=there.shape, name=value.name or ""
            )
    return order


def _identity(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors that are the same bytes read as the same type, which are then written once."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


def _write_data(tensors: list[tuple[int, ir.TensorProtocol]], path: Path, out: Path) -> None:
    """Writes each tensor at its offset, after asking whether the disk has room for all."""
    last, tensor = tensors[-1]
    needed, free = last + tensor.nbytes, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{out} needs {needed:,} bytes, its disk has {free:,} free: make room or choose another disk")
    with path.open("wb") as file:
        for offset, tensor in tensors:
            file.seek(offset)
            _write(tensor, file)


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())


def _serialized(model: ir.Model) -> bytes:
    try:
        return ir.to_proto(model).SerializeToString()
    except (ValueError, MemoryError) as error:  # protobuf ends at 2 GiB; its exception differs between versions
        raise OutputError(f"the graph itself, without its weights, is too large to save: {error}") from error


def _swap_in(new: Path, out: Path) -> list[Path]:
    """Renames the new files over the old ones; if anything stops it half way, the old pair is put back."""
    pairs = [(data_path(new), data_path(out)), (new, out)]  # the .onnx last: it names the other
    backup = new.with_name("old.data")
    kept = False
    written = []
    try:
        for source, target in pairs:
            if not source.exists():
                continue
            if target != out and os.path.lexists(target):
                os.replace(target, backup)
                kept = True
            os.replace(source, target)
            written.append(target)
    except BaseException:
        if kept:
            os.replace(backup, data_path(out))
        elif data_path(out) in written:
            data_path(out).unlink()
        raise
    return written[::-1]


def _explain(error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{out} cannot be written, the disk is full or the file too large for it: make room or use another disk"
    return f"{out} cannot be written ({error.strerror or error}): choose another place"
