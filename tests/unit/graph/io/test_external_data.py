"""Which files a model may have its weights read from, and what is said about the others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq.errors import InputChanged, ModelError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.external_data import check_unchanged, describe_source
from onnx_woq.graph.io.model import load, model_hash
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import BOOL, graph, linear, node, random, run, value, write

W = random(40, 9)


def weight(path) -> np.ndarray:
    """The weight of the only site, read through everything a run goes through."""
    (group,), _ = find_linear_groups(load(path), Recipe())
    return group.weight()


def referring(folder: Path, location: str, *, offset: int = 0, length: int | None = 1440, dims=(40, 9)) -> Path:
    """A model whose weight claims to lie at `location`."""
    path = linear(folder / "m.onnx", W)
    proto = onnx.load(path)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        if entry is not None:
            tensor.external_data.add(key=key, value=str(entry))
    onnx.save(proto, path)
    return path


def test_data_beside_the_model_and_in_a_folder_under_it(tmp_path):
    np.testing.assert_array_equal(weight(linear(tmp_path / "e.onnx", W, external=True)), W)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "w.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(weight(referring(tmp_path, "parts/w.bin")), W)
    np.testing.assert_array_equal(weight(referring(tmp_path, "parts/w.bin", length=None)), W)


@pytest.mark.parametrize(
    "location", ["../secret", "parts/../../secret", "..\\secret", "C:secret", "C:\\secret", "/secret", "", "a\0b"]
)
def test_a_location_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(W.tobytes())
    if location == "/secret":
        location = str(tmp_path / "secret")
    with pytest.raises(ModelError, match="refused as unsafe"):
        load(referring(folder, location))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, kind):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(W.tobytes())
    if kind == "file":
        (folder / "link").symlink_to(outside / "secret")
    else:
        (folder / "parts").symlink_to(outside)
    with pytest.raises(ModelError, match=r"outside the model's folder.*copy the data file"):
        load(referring(folder, "link" if kind == "file" else "parts/secret"))


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "link").symlink_to("w.bin")
    np.testing.assert_array_equal(weight(referring(tmp_path, "link")), W)


def hugging_face_cache(root: Path) -> Path:
    """The cache layout: blobs named by hash, a snapshot of links into them."""
    blobs, snapshot = root / "models--x" / "blobs", root / "models--x" / "snapshots" / "abc" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    linear(root / "model.onnx", W, external=True)
    (root / "model.onnx").rename(blobs / "1111")
    (root / "model.onnx.data").rename(blobs / "2222")
    (snapshot / "model.onnx").symlink_to("../../../blobs/1111")
    (snapshot / "model.onnx.data").symlink_to("../../../blobs/2222")
    return snapshot / "model.onnx"


def test_the_hugging_face_cache(tmp_path):
    path = hugging_face_cache(tmp_path)
    model = load(path)
    assert [f.name for f in model.files] == ["1111", "2222"]
    np.testing.assert_array_equal(weight(path), W)
    x = random(3, 40)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ W, rtol=1e-4)
    save(model, tmp_path / "copy.onnx", metadata={})
    np.testing.assert_allclose(run(tmp_path / "copy.onnx", {"x": x})[0], x @ W, rtol=1e-4)


def test_in_the_cache_too_only_the_folder_of_the_real_model_counts(tmp_path):
    path = hugging_face_cache(tmp_path)
    data = path.with_name("model.onnx.data")
    data.unlink()
    (tmp_path / "secret").write_bytes(W.tobytes())
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="refused as unsafe"):
        load(path)


def test_a_link_to_a_model_elsewhere_finds_its_data_there(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    real = linear(store / "real.onnx", W, external=True)
    (tmp_path / "named.onnx").symlink_to(real)
    np.testing.assert_array_equal(weight(tmp_path / "named.onnx"), W)


def test_a_hard_linked_data_file_needs_a_linked_model(tmp_path):
    path = linear(tmp_path / "m.onnx", W, external=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    os.link(path.with_name("m.onnx.data"), copy / "m.onnx.data")
    with pytest.raises(ModelError, match="hard links"):
        load(path)
    os.link(path, copy / "m.onnx")
    x = random(3, 40)
    for named in (path, copy / "m.onnx"):
        np.testing.assert_array_equal(weight(named), W)
        model = load(named)
        np.testing.assert_allclose(run(model, {"x": x})[0], x @ W, rtol=1e-4)
        save(model, tmp_path / "out.onnx", metadata={})
        np.testing.assert_array_equal(weight(tmp_path / "out.onnx"), W)


def test_a_hard_linked_model_in_one_piece(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    os.link(path, tmp_path / "other.onnx")
    np.testing.assert_array_equal(weight(path), W)


def test_missing_data_says_where_it_belongs(tmp_path):
    path = linear(tmp_path / "m.onnx", W, external=True)
    path.with_name("m.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"needs its weights from 'm.onnx.data'.*put the file into"):
        load(path)


def test_a_broken_link_to_the_data(tmp_path):
    (tmp_path / "w.bin").symlink_to("gone")
    with pytest.raises(ModelError, match="cannot be read"):
        load(referring(tmp_path, "w.bin"))


def test_a_folder_in_place_of_the_data(tmp_path):
    (tmp_path / "w.bin").mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        load(referring(tmp_path, "w.bin"))


def test_short_data_is_noticed_before_it_is_read(tmp_path):
    path = linear(tmp_path / "m.onnx", W, external=True)
    data = path.with_name("m.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"too short.*'W' needs bytes 0 to 1440, the file has 1439"):
        load(path)


@pytest.mark.parametrize(
    ("offset", "length", "dims"),
    [(4, 1440, (40, 9)), (0, 1440, (1 << 40, 1 << 20)), (-4, 1440, (40, 9)), (0, 1436, (40, 9)), (0, 1440, (-40, -9))],
)
def test_contradicting_sizes_allocate_nothing(tmp_path, offset, length, dims):
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    with pytest.raises(ModelError, match=r"too short|damaged|not a valid"):
        load(referring(tmp_path, "w.bin", offset=offset, length=length, dims=dims))


def test_the_hash_covers_model_and_data_and_not_their_names(tmp_path):
    first = linear(tmp_path / "m.onnx", W, external=True)
    before = model_hash(load(first))
    assert len(before) == 32
    assert before == model_hash(load(first))
    data = first.with_name("m.onnx.data")
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\0")
    assert model_hash(load(first)) != before
    one = linear(tmp_path / "one.onnx", W)
    (tmp_path / "two.onnx").write_bytes(one.read_bytes())
    assert model_hash(load(one)) == model_hash(load(tmp_path / "two.onnx")) != before


def test_constant_nodes_may_have_external_data(tmp_path):
    tensor = onnx.numpy_helper.from_array(W, "c")
    nodes = [node("Constant", [], ["c"], value=tensor), node("MatMul", ["x", "c"], ["y"])]
    main = graph(nodes, [value("x", (3, 40))], [value("y")])
    path = write(tmp_path / "m.onnx", main)
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
    assert (tmp_path / "w.bin").stat().st_size == W.nbytes
    np.testing.assert_array_equal(weight(path), W)


def test_changed_files_are_noticed(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"12345")
    stamps = {tmp_path / name: describe_source(tmp_path / name, tmp_path).stamp for name in "ab"}
    check_unchanged(stamps)
    check_unchanged({})
    times = (tmp_path / "b").stat()
    (tmp_path / "b").write_bytes(b"123456")
    os.utime(tmp_path / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputChanged, match="b was changed, replaced or removed"):
        check_unchanged(stamps)
    (tmp_path / "b").unlink()
    with pytest.raises(InputChanged, match="b was changed, replaced or removed"):
        check_unchanged(stamps)


def outside(folder, place):
    """A model with an external tensor that claims to lie outside of the folder, at a place where few look."""
    tensor = onnx.TensorProto(name="secret", dims=[3], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in {"location": "../secret", "offset": "0", "length": "12"}.items():
        tensor.external_data.add(key=key, value=entry)
    odd, body, functions = node("Odd", ["x"], ["y"], domain="elsewhere"), graph([], [], []), []
    if place == "attribute":
        odd.attribute.add(name="t", type=onnx.AttributeProto.TENSOR, t=tensor)
    elif place == "list in an attribute":
        odd.attribute.add(name="t", type=onnx.AttributeProto.TENSORS, tensors=[tensor])
    elif place == "constant":
        odd = node("Constant", [], ["y"], value=tensor)
    else:
        body = graph([node("Identity", ["secret"], ["b"])], [], [value("b")], {"secret": tensor})
        inner = node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        if place == "body":
            odd = node("If", ["flag"], ["y"], then_branch=body, else_branch=body)
        else:
            imports = [onnx.helper.make_opsetid("", 21)]
            functions = [onnx.helper.make_function("elsewhere", "Odd", ["c"], ["y"], [inner], imports)]
    nodes = [node("MatMul", ["x", "W"], ["h"]), odd]
    main = graph(nodes, [value("x", (3, 40)), value("flag", [], BOOL)], [value("h"), value("y")], {"W": random(40, 9)})
    return write(folder / "m.onnx", main, functions=functions, domains={"elsewhere": 1})


@pytest.mark.parametrize("place", ["attribute", "list in an attribute", "constant", "body", "body in a function"])
def test_external_tensors_are_checked_wherever_they_are(place, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(12))
    with pytest.raises(ModelError, match=r"'\.\./secret', outside its own folder"):
        load(outside(tmp_path / "in", place))


def test_lists_of_external_tensors_in_attributes_are_read_into_memory(tmp_path):
    path = outside(tmp_path, "list in an attribute")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.node[1].attribute[0].tensors[0].external_data[0].value = "beside"
    onnx.save(proto, path)
    (tmp_path / "beside").write_bytes(np.array([1, 2, 3], np.float32).tobytes())
    (tmp_path / "out").mkdir()
    save(load(path), tmp_path / "out" / "o.onnx", metadata={})
    (tensor,) = onnx.load(tmp_path / "out" / "o.onnx").graph.node[1].attribute[0].tensors
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), [1, 2, 3])
