"""External data: finding the files that a model keeps its tensors in, and refusing those that are unsafe to read.

A model names its data files itself, so a hostile model could name any file on the machine and have it copied into the
result. The rule: a data file is read only if its real path lies under the folder that the real .onnx file lies in.
Links are followed from the path that the user named, never from a path that the model names:

* the Hugging Face cache: `snapshots/x/model.onnx` and `snapshots/x/model.onnx_data` are links into one `blobs/` folder.
  The .onnx the user named is a link, its real folder is `blobs/`, and the data file's real path lies there too;
* a link to a model elsewhere: data missing beside the link is looked for beside the link's target;
* hard links (`cp -al`, deduplicated stores) show no target to check, and an archive can contain them. A data file with
  several names is therefore read only if the .onnx is linked in the same way and the data lies directly beside it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import onnx_ir as ir

from onnx_woq.errors import InputChanged, ModelError

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and time of the last change of a file, which show that it was changed or replaced."""


class LinkedTensor(ir.ExternalTensor):
    """An external tensor in a hard-linked file that `find_data_file` has accepted; onnx_ir alone would refuse it."""

    __slots__ = ()

    def _check_path_containment(self) -> None:
        """Does nothing: the file was checked when the model was loaded.

        If onnx_ir renames its check, reading is refused again: the safe side.
        """


@dataclass(frozen=True)
class Source:
    """A file that holds tensors: the .onnx file itself, or a data file.

    Attributes:
        path: its real path, below `folder`.
        folder: the folder of the model.
        location: its path relative to `folder`, as models write it.
        size: its length in bytes.
        linked: whether it has several names on disk (hard links).
        stamp: its `Stamp` before anything was read from it.
    """

    path: Path
    folder: Path
    location: str
    size: int
    linked: bool
    stamp: Stamp


def describe_source(path: Path, folder: Path) -> Source:
    """Returns the `Source` of `path`: the model file itself, or a file that `find_data_file` accepted."""
    status = path.stat()
    location = path.relative_to(folder).as_posix()
    return Source(path, folder, location, status.st_size, status.st_nlink > 1, _stamp(status))


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Checks that files still are the ones that were stamped.

    Raises:
        InputChanged: a file was changed, replaced or removed since.
    """
    for path, stamp in stamps.items():
        try:
            same = _stamp(path.stat()) == stamp
        except OSError:
            same = False
        if not same:
            raise InputChanged(
                f"{path} was changed, replaced or removed while it was being read, so nothing was written: "
                "start again when nobody writes to it"
            )


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def real_path(named: Path) -> Path:
    """Returns the real path of the model file that the user named.

    Raises:
        ModelError: nothing is there, or a folder, or something else that is not a regular file.
    """
    try:
        real = named.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, on Python 3.12 and older
        what = "is a broken link" if named.is_symlink() else "does not exist"
        raise ModelError(f"{named} {what}: check the path") from error
    if stat.S_ISDIR(mode):
        inside = sorted(p.relative_to(named).as_posix() for p in named.glob("**/*.onnx"))[:3]
        hint = f"name the .onnx file in it: {', '.join(inside)}" if inside else "and there is no .onnx file in it"
        raise ModelError(f"{named} is a folder: {hint}")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{named} is not a regular file: copy the model to one first")
    return real


def find_data_file(location: str, named: Path, real: Path) -> Path:
    """Returns the real path, below `real.parent`, of the data file that a model calls `location`.

    Args:
        location: the relative path that the model writes.
        named: the path of the .onnx file as the user gave it.
        real: the real path of the .onnx file, see `real_path`.

    Raises:
        ModelError: the file is missing, or may not be read under the rule at the top of this file.
    """
    parts = re.split(r"[/\\]", location)
    if not location or "\0" in location or ".." in parts or os.path.isabs(location) or PureWindowsPath(location).drive:
        raise ModelError(f"{named} wants its weights from {location!r}, outside its own folder; refused as unsafe")
    candidates = [named.parent / location, real.parent / location]
    found = next((c for c in candidates if os.path.lexists(c)), None)
    if found is None:
        raise ModelError(
            f"{named} needs its weights from {location!r}, which is not beside it: "
            f"put the file into {named.parent.resolve()}"
        )
    target = Path(os.path.realpath(found))
    if not target.is_relative_to(real.parent):
        raise ModelError(
            f"{found} is a link to {target}, outside the model's folder {real.parent}; refused as unsafe: "
            "copy the data file beside the model"
        )
    try:
        status = target.stat()
    except OSError as error:
        raise ModelError(f"{found} cannot be read ({error.strerror}): fetch the model's data file again") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{found} is not a regular file: put the model's data file there")
    if status.st_nlink > 1 and not _linked_alike(location, named, real):
        raise ModelError(
            f"{found} has {status.st_nlink} hard links while {named.name} is an ordinary file; refused as unsafe: "
            "replace the data file by a copy of itself"
        )
    return target


def _linked_alike(location: str, named: Path, real: Path) -> bool:
    """Tells whether a hard-linked data file lies directly beside an .onnx file that is a link as well."""
    return (named.is_symlink() or real.stat().st_nlink > 1) and location == os.path.basename(location)


def leads_out(file: Path, named: Path) -> bool:
    """Tells whether a file beside a model is a link that leads out of the folders that the model may be read from.

    These are the file's own folder, and the one that the real .onnx file lies in: all links of the Hugging Face cache
    lead to that. Hard links are taken for links unless the .onnx is one itself.

    Args:
        file: the file.
        named: the path of the .onnx file as the user gave it.
    """
    target, real = Path(os.path.realpath(file)), Path(os.path.realpath(named))
    if not any(target.is_relative_to(folder) for folder in (file.parent.resolve(), real.parent)):
        return True
    return target.stat().st_nlink > 1 and not _linked_alike(file.name, named, real)


def place_tensor(tensor: ir.ExternalTensor, source: Source) -> ir.ExternalTensor:
    """Returns `tensor` as one whose data lies in the file `source`, at the offset that the model says.

    Raises:
        ModelError: the file is too short, or offset, length and dimensions contradict each other.
    """
    dims = tensor.shape.numpy()
    try:
        size, offset = tensor.nbytes, tensor.offset or 0
    except TypeError as error:  # strings, and types that do not exist, have no size
        raise ModelError(
            f"tensor {tensor.name!r} has a type that cannot be stored in {source.path}: export it again"
        ) from error
    if any(d < 0 for d in dims) or offset < 0 or tensor.length not in (None, 0, size):
        raise ModelError(
            f"tensor {tensor.name!r} with dimensions {list(dims)} needs {size} bytes, but the model says offset "
            f"{offset}, length {tensor.length}: the model is damaged, fetch it again"
        )
    if offset + size > source.size:
        raise ModelError(
            f"{source.path} is too short: tensor {tensor.name!r} needs bytes {offset} to {offset + size}, "
            f"the file has {source.size}: fetch it again"
        )
    kind = LinkedTensor if source.linked else ir.ExternalTensor
    return kind(
        source.location,
        offset,
        size,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir=source.folder,
    )
