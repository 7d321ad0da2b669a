"""Saving a model as an .onnx file and one data file: streamed, both files or none, never over the model being read."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
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

_PAGE = 4096  # bytes; big tensors start on a page, so that every runtime can map them
_LINE = 64  # bytes; the others start on a cache line, so that no float is misaligned


def data_path(out: Path) -> Path:
    """Returns the path of the data file that `save` writes for the model file `out`: `<out>.data`."""
    return out.with_name(out.name + ".data")


def check_output(model: Model, out: str | Path) -> Path:
    """Returns `out` as a path if the model may be written there, to be asked before hours of work.

    Raises:
        OutputError: `out` is a folder, lies in a folder that is missing or not writable, or is a file of the model
            being read.
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
    """A data file that already holds some tensors of the result and becomes its data file.

    Attributes:
        folder: a private folder on the disk of the result; it holds the file under the name that `data_path` gives.
        places: `id` of an array in the model -> its offset in the file, in bytes. The caller keeps the arrays alive.
        end: number of bytes that are valid; what lies behind them is dropped.
    """

    folder: Path
    places: Mapping[int, int]
    end: int


@no_garbage_search()
def save(
    model: Model,
    out: str | Path,
    *,
    metadata: Mapping[str, str],
    stored: Stored | None = None,
    check: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Writes the model to `out` and its large tensors to one file `<out>.data` beside it.

    Both files are written under temporary names in the same folder and then renamed, so a failure or an interrupt
    leaves the folder as it was. Tensors pass through memory one at a time. With `stored`, the data file is completed
    and renamed; only if the model no longer uses all of it, it is written anew.

    Args:
        model: stays as it is, except that large constants of bodies move to the main graph.
        out: the .onnx file; an existing one is replaced.
        metadata: properties to add to the model's own.
        stored: a data file with tensors that need not be written any more. The caller removes its folder.
        check: called with the complete .onnx file, its data beside it, before the two are renamed into place; what it
            raises leaves `out` as it was.

    Returns:
        The files written, `out` first.

    Raises:
        OutputError: the model cannot be written there.
        DiskError: the disk is full or fails.
    """
    out = check_output(model, out)
    lift_large(model.ir)
    version = max(model.ir.ir_version, _min_ir_version(model.ir))
    place: AbstractContextManager[str | Path] = (
        nullcontext(stored.folder) if stored else tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    )
    try:
        with place as folder:
            outside, layout = _move_out(model.ir, data_path(out).name, stored)
            home = Path(folder) if layout.keep else Path(folder) / "compact"  # what is stored may still be read
            home.mkdir(exist_ok=True)
            new = home / out.name
            _write_data(layout, data_path(new), out)
            new.write_bytes(_serialized(model.ir, outside, metadata, version))
            if check:
                check(new)
            return _swap_in(new, out)
    except OSError as error:
        raise failure(error, out) from error


@no_garbage_search()
def planned_bytes(model: Model, out: str | Path, *, metadata: Mapping[str, str]) -> int:
    """Returns about how many bytes the files that `save` writes with these arguments will have.

    Only shapes and types count, so the tensors need no content. With `stored`, the true size differs a little, as the
    padding between tensors depends on their order.

    Raises:
        OutputError: the graph is too large to save.
    """
    lift_large(model.ir)
    version = max(model.ir.ir_version, _min_ir_version(model.ir))
    outside, layout = _move_out(model.ir, data_path(Path(out)).name, None)
    end = layout.new[-1][0] + layout.new[-1][1].nbytes if layout.new else 0
    return end + len(_serialized(model.ir, outside, metadata, version))


def next_place(end: int, nbytes: int) -> int:
    """Returns the offset at which a tensor of `nbytes` bytes is appended to a data file of `end` bytes."""
    step = _PAGE if nbytes >= 64 * _PAGE else _LINE
    return -(-end // step) * step


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _min_ir_version(model: ir.Model) -> int:
    """Returns the oldest IR version that may carry the opsets of the model."""
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)


_IN_MEMORY = (ir.Tensor, ir.PackedTensor)


@dataclass(frozen=True)
class _Layout:
    """The contents of a data file.

    Attributes:
        new: offset in bytes and tensor, for every tensor still to be written, in order.
        keep: length in bytes of what is in the file already and stays.
    """

    new: list[tuple[int, ir.TensorProtocol]]
    keep: int


def _move_out(model: ir.Model, location: str, stored: Stored | None) -> tuple[dict[str, ir.TensorProtocol], _Layout]:
    """Plans where initializers go: large ones of the main graph into the data file, all others into the structure.

    Small external tensors of bodies are read into memory, in place.

    Args:
        model: the model, large constants of bodies lifted to the main graph.
        location: name of the data file.
        stored: the data file that already holds some of the tensors.

    Returns:
        By name, the tensors to write for initializers of the main graph instead of their own; and the data file.
    """
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
    """Returns the offset of each tensor in the data file, and the contents of the file.

    Stored tensors keep their place if the model uses all of them. Otherwise the file is laid out anew.
    """
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
    """Returns a key that is equal for tensors of the same bytes read as the same type: they are written once."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    if isinstance(tensor, _IN_MEMORY):
        return (id(tensor.raw), tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


def _write_data(layout: _Layout, path: Path, out: Path) -> None:
    """Writes the new tensors at their offsets; raises a DiskError first if the disk has no room for all."""
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
        if error.errno is None:  # from NumPy, which says how much was written but not why it stopped
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _serialized(
    model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], metadata: Mapping[str, str], version: int
) -> bytes:
    try:
        return to_proto(model, tensors, metadata=metadata, ir_version=version).SerializeToString()
    except (ValueError, MemoryError) as error:  # protobuf ends at 2 GiB; its exception differs between versions
        raise OutputError(f"the graph itself, without its weights, is too large to save: {error}") from error


def _swap_in(new: Path, out: Path) -> list[Path]:
    """Renames the new files over the old ones; puts everything back if it is stopped half way."""
    pairs = [(data_path(new), data_path(out)), (new, out)]  # the .onnx last: it names the other
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
    """Returns the OutputError for what the system reported while `out` was written: the reason, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(
            f"{out} cannot be written, the disk is full or the file too large for it: make room or use another disk"
        )
    if error.errno == errno.EIO:
        return DiskError(f"{out} cannot be written, the disk fails ({error.strerror}): check it or use another one")
    return OutputError(f"{out} cannot be written ({error.strerror or error}): choose another place")
