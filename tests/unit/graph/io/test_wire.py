"""The structure of a file is the file without its large tensors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq.graph.io import wire
from tests.zoo.nodes import BOOL, graph, node, random, value, write


def model(path):
    """Large and small tensors as initializers, constants and in bodies."""
    big, small = random(40, 40), random(4)
    constant = node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(big + 1))
    branch = graph([constant, node("MatMul", ["x", "c"], ["a"])], [], [value("a")], {"inner": big + 2}, name="a")
    other = graph([node("Identity", ["x"], ["b"])], [], [value("b")], name="b")
    told = onnx.numpy_helper.from_array(big + 3, "told")
    told.data_location = onnx.TensorProto.DEFAULT
    floats = onnx.helper.make_tensor("floats", 1, (40, 40), big.ravel())
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=branch, else_branch=other)],
        [value("flag", (), BOOL), value("x", (3, 40))],
        [value("y", (3, 40))],
        {
            "big": big,
            "small": small,
            "told": told,
            "floats": floats,
        },
    )
    return write(path, main)


def filled(proto, data):
    """Puts the referenced bytes back."""
    for tensor in tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in tensor.external_data}
            assert entries["location"] == "m.onnx"
            start, length = int(entries["offset"]), int(entries["length"])
            assert length > wire.LARGE
            tensor.raw_data = data[start : start + length]
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return proto


def tensors(main):
    yield from main.initializer
    for n in main.node:
        for a in n.attribute:
            if a.HasField("t"):
                yield a.t
            if a.HasField("g"):
                yield from tensors(a.g)


def test_structure_and_file_are_the_same_model(tmp_path):
    path = model(tmp_path / "m.onnx")
    structure = wire.read_structure(path)
    external = [t.name for t in tensors(structure.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) == 4, (
        "big, told, inner and the constant; not small, and not the one stored as a list of floats"
    )
    whole = onnx.load(path)
    for tensor in tensors(whole.graph):
        tensor.ClearField("data_location")  # its default is spelled out in one of them
    assert filled(structure, path.read_bytes()) == whole


def test_every_truncation_is_refused_or_still_a_message(tmp_path):
    path = model(tmp_path / "m.onnx")
    data = path.read_bytes()
    cut = tmp_path / "cut.onnx"
    refused = 0
    for length in [*range(0, len(data), 211), len(data) - 1]:
        cut.write_bytes(data[:length])
        try:
            wire.read_structure(cut)
        except wire.WireError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(data), 211))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_refused(tmp_path, seed):
    path = tmp_path / "noise.onnx"
    path.write_bytes(np.random.default_rng(seed).bytes(3000))
    with pytest.raises(wire.WireError):
        wire.read_structure(path)


def test_large_numbers_are_encoded_as_protobuf_does():
    for number in (0, 1, 127, 128, 300, 1 << 31, 1 << 63):
        message = onnx.TensorProto(dims=[number]) if number < 1 << 63 else None
        if message is not None:
            assert message.SerializeToString().endswith(wire._encoded(number))
    assert wire._encoded(300) == b"\xac\x02"
