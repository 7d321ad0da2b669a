"""Write a model: streamed, both files or none, and never over what is being read."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnx_woq.core.cpu import no_garbage_search
from onnx_woq.errors import DiskError, OutputError
from onnx_woq.graph.edit import is_large, lift_large
from onnx_woq.graph.io.model import Model
from onnx_woq.graph.io.proto import to_proto

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


@dataclass(frozen=True)
class Stored:
    """Tensors that lie in a data file already, which becomes that of the result.

    Attributes:
        folder: private, on the disk of the result; holds the file under the name `data_path` gives it.
        places: `id` of an array in the model -> its offset in the file; the arrays are kept alive elsewhere.
        end: bytes of the file that count.
    """

    folder: Path
    places: Mapping[int, int]
    end: int


@no_garbage_search()
def save(model: Model, out: str | Path, *, metadata: Mapping[str, str], stored: Stored | None = None) -> list[Path]:
    """Writes the model to `out`, its large tensors to one file `<out>.data` beside it.

    Both files are written under temporary names in the same folder and then renamed, so a failure or an interrupt
    leaves the folder as it was. Tensors pass one at a time; those on disk are copied from file to file. A data file
    that is there already is completed and renamed; only if the model no longer uses all of it, it is written anew.

    Args:
        model: left as it is, but for large constants of bodies, which move to the main graph.
        out: the .onnx file; an existing one is replaced.
        metadata: added to the model's own.
        stored: the tensors that need not be written any more. Its folder is left to the caller.

    Returns:
        The files written, `out` first.

    Raises:
        OutputError: it cannot be written there; a DiskError where the disk is full or fails.
    """
    out = check_output(model, out)
    lift_large(model.ir)
    version = max(model.ir.ir_version, _min_ir_version(model.ir))
    place: AbstractContextManager[str | Path] = (
        nullcontext(stored.folder) if stored else tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    )
    try:
        with place as folder:
            new = Path(folder) / out.name
            outside, layout = _move_out(model.ir, data_path(out).name, stored)
            data = data_path(new) if layout.keep else new.with_name("compact.data")
            _write_data(layout, data, out)
            new.write_bytes(_serialized(model.ir, outside, metadata, version))
            return _swap_in(new, data, out)
    except OSError as error:
        raise failure(error, out) from error


@no_garbage_search()
def planned_bytes(model: Model, out: str | Path, *, metadata: Mapping[str, str]) -> int:
    """About the bytes of the files that `save` would write with these arguments; tensors need no content for that.

    The data of tensors that are stored before the rest is padded a little differently.

    Raises:
        OutputError: the graph is too large to save.
    """
    lift_large(model.ir)
    version = max(model.ir.ir_version, _min_ir_version(model.ir))
    outside, layout = _move_out(model.ir, data_path(Path(out)).name, None)
    end = layout.new[-1][0] + layout.new[-1][1].nbytes if layout.new else 0
    return end + len(_serialized(model.ir, outside, metadata, version))


def next_place(end: int, nbytes: int) -> int:
    """Where a tensor of `nbytes` bytes starts in a data file that is `end` bytes long."""
    step = _PAGE if nbytes >= 64 * _PAGE else _LINE
    return -(-end // step) * step


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _min_ir_version(model: ir.Model) -> int:
    """The oldest IR version that may carry these opsets."""
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)


_IN_MEMORY = (ir.Tensor, ir.PackedTensor)


@dataclass(frozen=True)
class _Layout:
    """What goes into a data file: `new` tensors at their offsets, behind the first `keep` bytes of what is there."""

    new: list[tuple[int, ir.TensorProtocol]]
    keep: int


def _move_out(model: ir.Model, location: str, stored: Stored | None) -> tuple[dict[str, ir.TensorProtocol], _Layout]:
    """What the initializers of the main graph are in the written model: large ones lie in the file `location`, small
    ones in the structure; and what has to be written to that file."""
    outside: dict[object, ir.TensorProtocol] = {}
    written: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if graph is model.graph and tensor is not None and is_large(tensor):
                outside.setdefault(_identity(tensor), tensor)
            elif isinstance(tensor, ir.ExternalTensor):
                embedded = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
                if graph is model.graph:
                    written[name] = embedded
                else:
                    value.const_value = embedded
    offsets, layout = _laid_out(outside, stored)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and is_large(tensor):
            shape, offset = ir.Shape(tensor.shape.numpy()), offsets[_identity(tensor)]
            written[name] = ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return written, layout


def _laid_out(tensors: Mapping[object, ir.TensorProtocol], stored: Stored | None) -> tuple[dict[object, int], _Layout]:
    """The offset of each tensor: where it is stored, if all that is stored is used; else one after the other."""
    places = stored.places if stored else {}
    offsets = {
        key: places[id(t.raw)] for key, t in tensors.items() if isinstance(t, _IN_MEMORY) and id(t.raw) in places
    }
    end = stored.end if stored else 0
    if len(set(offsets.values())) < len(places):
        offsets, end = {}, 0
    layout = _Layout([], end)
    for key, tensor in tensors.items():
        if key not in offsets:
            offsets[key] = next_place(end, tensor.nbytes)
            end = offsets[key] + tensor.nbytes
            layout.new.append((offsets[key], tensor))
    return offsets, layout


def _identity(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors that are the same bytes read as the same type, which are then written once."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    if isinstance(tensor, _IN_MEMORY):
        return (id(tensor.raw), tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


def _write_data(layout: _Layout, path: Path, out: Path) -> None:
    """Writes each new tensor at its offset, after asking whether the disk has room for all."""
    if not layout.new and not layout.keep:
        path.unlink(missing_ok=True)
        return
    last = layout.new[-1] if layout.new else None
    needed = last[0] + last[1].nbytes - layout.keep if last else 0
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DiskError(f"{out} needs {needed:,} bytes, its disk has {free:,} free: make room or choose another disk")
    with path.open("r+b" if layout.keep else "wb") as file:
        file.truncate(layout.keep)
        for offset, tensor in layout.new:
            file.seek(offset)
            _write(tensor, file)


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    try:
        if hasattr(tensor, "tofile"):
            tensor.tofile(file)
        else:
            file.write(tensor.tobytes())
    except OSError as error:
        if error.errno is None:  # numpy, which says how much was written and not why no more
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _serialized(
    model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], metadata: Mapping[str, str], version: int
) -> bytes:
    try:
        return to_proto(model, tensors, metadata=metadata, ir_version=version).SerializeToString()
    except (ValueError, MemoryError) as error:  # protobuf ends at 2 GiB; its exception differs between versions
        raise OutputError(f"the graph itself, without its weights, is too large to save: {error}") from error


def _swap_in(new: Path, data: Path, out: Path) -> list[Path]:
    """Renames the new files over the old ones; if anything stops it half way, everything is put back."""
    pairs = [(data, data_path(out)), (new, out)]  # the .onnx last: it names the other
    backup = new.with_name("old.data")
    undo: list[tuple[Path, Path]] = []
    written = []
    try:
        for source, target in pairs:
            if not source.exists():
                continue
            if target != out and os.path.lexists(target):
                os.replace(target, backup)
                undo.append((backup, target))
            os.replace(source, target)
            undo.append((target, source))
            written.append(target)
    except BaseException:
        for source, target in reversed(undo):
            os.replace(source, target)
        raise
    return written[::-1]


def failure(error: OSError, out: Path) -> OutputError:
    """What the system says while `out` is written, as an error that says why it cannot be and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            f"{out} cannot be written, the disk is full or the file too large for it: make room or use another disk"
        )
    if error.errno == errno.EIO:
        return DiskError(f"{out} cannot be written, the disk fails ({error.strerror}): check it or use another one")
    return OutputError(f"{out} cannot be written ({error.strerror or error}): choose another place")
