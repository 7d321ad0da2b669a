"""Reading the structure of an .onnx file without its weights, by walking the protobuf wire format.

A model saved in one piece carries its weights inside the protobuf. Parsing it whole costs two copies of them before the
first node is seen. Walking the wire format (https://protobuf.dev/programming-guides/encoding/) costs a few kilobytes:
every large tensor becomes a reference to its place in the file, as if it had been saved beside the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

from onnx_woq.graph.edit import LARGE

# (message, field number) of onnx.proto -> the message in that field, for all messages on the way to a tensor.
# "constant" is a node known to be a Constant: tensors in attributes of other operators may not be external.
_CHILDREN = {
    ("model", 7): "graph",
    ("graph", 1): "node",
    ("graph", 5): "tensor",
    ("node", 5): "attribute",
    ("constant", 5): "constant attribute",
    ("attribute", 6): "graph",
    ("attribute", 11): "graph",
    ("constant attribute", 5): "tensor",
}
_NODE_OP_TYPE, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 4, 9, 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are not a protobuf message, or end too early."""


def read_structure(path: Path) -> onnx.ModelProto:
    """Returns the model in `path`, its large raw tensors replaced by references to their place in `path` itself.

    Raises:
        WireError: the file is not a protobuf message, or is truncated.
        OSError: the file cannot be read.
    """
    proto = onnx.ModelProto()
    with path.open("rb", buffering=0) as file:
        stripped = _strip(_Bytes(file), 0, path.stat().st_size, "model", path.name)
    if not stripped:
        raise WireError("it is empty")
    try:
        proto.ParseFromString(stripped)
    except Exception as error:  # the class protobuf raises differs between its implementations
        raise WireError(str(error)) from error
    return proto


class _Bytes:
    """Random access to a file through a buffer of `WINDOW` bytes.

    A memory map would count every page it passes as memory of the process.
    """

    WINDOW = 1 << 16

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.start = 0
        self.window = b""

    def byte(self, at: int) -> int:
        """Returns the byte at offset `at`."""
        if not 0 <= at - self.start < len(self.window):
            self.start, self.window = at, self.read(at, at + self.WINDOW)
        return self.window[at - self.start]

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes from offset `start` up to `end`."""
        if self.start <= start and end <= self.start + len(self.window):
            return self.window[start - self.start : end - self.start]
        self.file.seek(start)
        return self.file.read(end - start)


def _varint(data: _Bytes, at: int, end: int) -> tuple[int, int]:
    """Returns the number encoded at offset `at`, and the offset behind it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data.byte(at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("a number is cut off")


def _fields(data: _Bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields each field in `at:end`: its number, and the offsets of its tag, of its value and of its end."""
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        value = at
        if kind == _VARINT:
            at = _varint(data, at, end)[1]
        elif kind == _LENGTH:
            length, value = _varint(data, at, end)
            at = value + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"field type {kind} does not exist")
        if at > end:
            raise WireError(f"it ends {at - end} bytes too early")
        yield tag >> 3, start, value, at


def _strip(data: _Bytes, start: int, end: int, message: str, location: str) -> bytes:
    """Returns the message in `start:end` with references in place of the large raw tensors under it."""
    fields = list(_fields(data, start, end))
    if message == "node" and b"Constant" in [data.read(a, b) for number, _, a, b in fields if number == _NODE_OP_TYPE]:
        message = "constant"
    if message == "tensor":
        return _strip_tensor(data, fields, location)
    pieces = []
    for number, tag, value, stop in fields:
        child = _CHILDREN.get((message, number))
        if child and stop - value > LARGE:
            inner = _strip(data, value, stop, child, location)
            pieces.append(data.read(tag, _varint(data, tag, value)[1]) + _encoded(len(inner)) + inner)
        else:
            pieces.append(data.read(tag, stop))
    return b"".join(pieces)


def _strip_tensor(data: _Bytes, fields: list[tuple[int, int, int, int]], location: str) -> bytes:
    raw = next(((start, end) for number, _, start, end in fields if number == _RAW_DATA), (0, 0))
    if raw[1] - raw[0] <= LARGE:
        return b"".join(data.read(tag, end) for _, tag, _, end in fields)
    # A tensor may say explicitly that its data is inside. That field is dropped, or it would contradict the reference.
    dropped = (_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION)
    kept = [data.read(tag, end) for number, tag, _, end in fields if number not in dropped]
    return b"".join(kept) + _reference(location, raw[0], raw[1] - raw[0])


def _reference(location: str, offset: int, length: int) -> bytes:
    """Returns the fields of a TensorProto that say its data lies in the file `location`; offset and length in bytes."""
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor.SerializeToString()


def _encoded(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
