"""Saving: both files or none, and nothing else touched."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.errors import OutputError
from onnx_woq.graph.io import save as saving
from onnx_woq.graph.io.model import load, model_hash, serialize
from onnx_woq.graph.io.save import check_output, save
from tests.zoo.nodes import BOOL, graph, linear, lower, node, random, run, value, write

W = random(300, 200)
X = random(3, 300, seed=1)


def listing(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("external", [False, True])
def test_saved_models_compute_the_same_and_carry_their_metadata(tmp_path, external):
    path = linear(tmp_path / "m.onnx", W, external=external)
    proto = onnx.load(path, load_external_data=False)
    proto.metadata_props.add(key="author", value="me")
    onnx.save(proto, path)
    before = listing(tmp_path)
    model = load(path)
    out = tmp_path / "out.onnx"
    assert save(model, out, metadata={"onnx_woq.version": "1"}) == [out, tmp_path / "out.onnx.data"]
    assert {name: b for name, b in listing(tmp_path).items() if not name.startswith("out")} == before
    assert {p.key: p.value for p in onnx.load(out).metadata_props} == {"author": "me", "onnx_woq.version": "1"}
    assert model.ir.metadata_props == {"author": "me"}
    onnx.checker.check_model(out)
    np.testing.assert_array_equal(run(out, {"x": X})[0], run(path, {"x": X})[0])


def test_small_tensors_are_embedded_and_shared_ones_written_once(tmp_path):
    shared = random(40, 40)
    main = graph(
        [node("MatMul", ["x", "A"], ["h"]), node("Add", ["h", "b"], ["g"]), node("MatMul", ["g", "B"], ["y"])],
        [value("x", (3, 40))],
        [value("y")],
        {"A": shared, "B": shared, "b": random(40)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    a, b = (model.ir.graph.initializers[n] for n in "AB")
    b.const_value = a.const_value
    assert save(model, tmp_path / "o.onnx", metadata={})[1].stat().st_size == shared.nbytes
    tensors = {t.name: t for t in onnx.load(tmp_path / "o.onnx", load_external_data=False).graph.initializer}
    assert tensors["b"].raw_data
    assert [e.value for e in tensors["A"].external_data] == [e.value for e in tensors["B"].external_data]
    x = random(2, 40)[:1].repeat(3, axis=0)
    want = (x @ shared + random(40)) @ shared
    np.testing.assert_allclose(run(tmp_path / "o.onnx", {"x": x})[0], want, rtol=1e-3, atol=1e-4)


def test_a_model_of_small_tensors_has_no_data_file(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(4, 4)))
    assert save(model, tmp_path / "o.onnx", metadata={}) == [tmp_path / "o.onnx"]
    assert not (tmp_path / "o.onnx.data").exists()


def test_tensors_start_where_every_type_is_aligned_and_maps_begin(tmp_path):
    main = graph(
        [node("MatMul", ["x", f"W{i}"], [f"y{i}"]) for i in range(3)],
        [value("x", (3, 303))],
        [value(f"y{i}") for i in range(3)],
        {"W0": random(303, 5), "W1": random(303, 401), "W2": random(303, 7)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    save(model, tmp_path / "o.onnx", metadata={})
    placed = {n: v.const_value for n, v in load(tmp_path / "o.onnx").ir.graph.initializers.items()}
    assert all(t.offset % 64 == 0 for t in placed.values())
    assert placed["W1"].offset % 4096 == 0


def test_constants_of_bodies_are_written_where_runtimes_find_them(tmp_path):
    branch = graph([node("MatMul", ["x", "V"], ["a"])], [], [value("a")], {"V": random(40, 40)}, name="a")
    constant = graph(
        [node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(random(30, 40)))], [], [value("c")]
    )
    main = graph(
        [
            node("If", ["flag"], ["y"], then_branch=branch, else_branch=constant),
            node("MatMul", ["x", "W"], ["z"]),
        ],
        [value("flag", (), BOOL), value("x", (30, 40))],
        [value("y", (30, 40)), value("z")],
        {"W": random(40, 9)},
    )
    path = write(tmp_path / "m.onnx", main)
    model = load(path)
    lower(model)
    save(model, tmp_path / "o.onnx", metadata={})
    x = random(30, 40)
    for flag in (True, False):
        feeds = {"flag": np.array(flag), "x": x}
        np.testing.assert_allclose(run(tmp_path / "o.onnx", feeds)[0], run(model, feeds)[0], rtol=1e-6)


def test_the_ir_version_is_raised_to_what_the_operators_need(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    proto = onnx.load(path)
    proto.ir_version = 7
    path.write_bytes(proto.SerializeToString())
    save(load(path), tmp_path / "o.onnx", metadata={})
    assert onnx.load(tmp_path / "o.onnx").ir_version == 10
    proto.ir_version = 11
    path.write_bytes(proto.SerializeToString())
    save(load(path), tmp_path / "o.onnx", metadata={})
    assert onnx.load(tmp_path / "o.onnx").ir_version == 11


@pytest.mark.parametrize("external", [False, True])
def test_the_files_being_read_are_never_written(tmp_path, external):
    path = linear(tmp_path / "m.onnx", W, external=external)
    os.link(path, tmp_path / "hard.onnx")
    (tmp_path / "soft.onnx").symlink_to("m.onnx")
    (tmp_path / "folder").symlink_to(tmp_path)
    names = ["m.onnx", "hard.onnx", "soft.onnx", "folder/m.onnx"] + ["m.onnx.data"] * external
    before = listing(tmp_path)
    for name in names:
        with pytest.raises(OutputError, match="being read"):
            save(load(path), tmp_path / name, metadata={})
    assert listing(tmp_path) == before


def test_the_data_file_of_the_result_may_not_be_the_one_being_read(tmp_path):
    path = linear(tmp_path / "m.onnx", W, external=True)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "o.onnx.data"
    onnx.save(proto, path)
    (tmp_path / "m.onnx.data").rename(tmp_path / "o.onnx.data")
    with pytest.raises(OutputError, match=r"o.onnx.data is the model being read"):
        check_output(load(path), tmp_path / "o.onnx")


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    model = load(linear(tmp_path / "m.onnx", W))
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.onnx.data").mkdir()
    for out, message in (
        ("folder", "name a file in it"),
        ("no/such/m.onnx", "create it first"),
        ("taken.onnx", "in the way"),
        ("m.onnx/o.onnx", "create it first"),
    ):
        with pytest.raises(OutputError, match=message):
            save(model, tmp_path / out, metadata={})
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        save(model, tmp_path / "o.onnx", metadata={})
    assert sorted(listing(tmp_path)) == ["m.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="not writable"):
        save(model, folder / "o.onnx", metadata={})


def test_a_relative_name(tmp_path, monkeypatch):
    model = load(linear(tmp_path / "m.onnx", W))
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in save(model, "o.onnx", metadata={})] == ["o.onnx", "o.onnx.data"]


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=["full disk", "broken disk", "interrupt"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch, failure, existing):
    path = linear(tmp_path / "m.onnx", W)
    model = load(path)
    lower(model)
    if existing:
        save(load(path), tmp_path / "o.onnx", metadata={})
    before, count = listing(tmp_path), []

    def failing(tensor, file):
        count.append(tensor)
        if len(count) == 2:
            raise failure
        file.write(tensor.tobytes())

    monkeypatch.setattr(saving, "_write", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OutputError) as error:
        save(model, tmp_path / "o.onnx", metadata={})
    if isinstance(failure, OSError):
        assert ("make room" if failure.errno == errno.ENOSPC else "Input/output error") in str(error.value)
    assert listing(tmp_path) == before
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_failed_rename_puts_the_old_pair_back(tmp_path, monkeypatch, existing, place):
    path = linear(tmp_path / "m.onnx", W)
    model = load(path)
    lower(model)
    if existing:
        save(load(path), tmp_path / "o.onnx", metadata={})
    before, count, replace = listing(tmp_path), [], os.replace

    def failing(source, target):
        count.append(source)
        if len(count) == place:
            raise OSError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    if place == 3 and not existing:
        save(model, tmp_path / "o.onnx", metadata={})  # only two renames are needed
        return
    with pytest.raises(OutputError, match="Permission denied"):
        save(model, tmp_path / "o.onnx", metadata={})
    assert listing(tmp_path) == before


def test_a_file_size_limit(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match="make room"):
            save(model, tmp_path / "o.onnx", metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_too_little_room_is_noticed_before_writing(tmp_path, monkeypatch):
    model = load(linear(tmp_path / "m.onnx", W))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"needs 240,000 bytes, its disk has 1,000 free"):
        save(model, tmp_path / "o.onnx", metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_an_existing_result_is_replaced(tmp_path):
    path = linear(tmp_path / "m.onnx", W)
    out = tmp_path / "o.onnx"
    save(load(path), out, metadata={})
    first = model_hash(load(out))
    reader = load(out)
    model = load(path)
    lower(model)
    save(model, out, metadata={})
    assert model_hash(load(out)) != first
    np.testing.assert_array_equal(run(out, {"x": X})[0], run(model, {"x": X})[0])
    assert reader.ir.graph.initializers["W"].name == "W"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "o.onnx", "o.onnx.data"]


def test_a_link_in_the_place_of_the_result_is_replaced_not_followed(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    (tmp_path / "precious").write_text("data")
    for name in ("o.onnx", "o.onnx.data"):
        (tmp_path / name).symlink_to("precious")
    save(model, tmp_path / "o.onnx", metadata={})
    assert (tmp_path / "precious").read_text() == "data"
    np.testing.assert_array_equal(run(tmp_path / "o.onnx", {"x": X})[0], run(model, {"x": X})[0])


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = load(linear(tmp_path / "m.onnx", W))
    lower(model)
    before = serialize(model)
    tensors = [v.const_value for v in model.ir.graph.initializers.values()]
    save(model, tmp_path / "o.onnx", metadata={"a": "b"})
    assert serialize(model) == before
    assert all(a is v.const_value for a, v in zip(tensors, model.ir.graph.initializers.values(), strict=True))
    assert not any(isinstance(t, ir.ExternalTensor) for t in tensors)


class Refused(Exception):
    pass


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("refuses", [False, True])
def test_the_complete_pair_is_checked_before_it_is_renamed(tmp_path, kept, refuses):
    """Also where a stored data file has more than the model uses, so that a new one is written beside it."""
    model, out = load(linear(tmp_path / "m.onnx", W)), tmp_path / "o.onnx"
    save(load(tmp_path / "m.onnx"), out, metadata={})
    before, wanted = listing(tmp_path), out.with_name("o.onnx.data").read_bytes()
    stored = None
    if kept != "none":
        private = tmp_path / "private"
        private.mkdir()
        model.ir.graph.initializers["W"].const_value = ir.Tensor(W, name="W")
        content = W.tobytes() + bytes(0 if kept == "all" else 8192)
        (private / "o.onnx.data").write_bytes(content)
        places = {id(model.ir.graph.initializers["W"].const_value.raw): 0} | ({} if kept == "all" else {7: W.nbytes})
        stored = saving.Stored(private, places, len(content))
    seen = []

    def check(new):
        assert listing(tmp_path) == before
        seen.append(onnx.load(new))
        assert (new.parent / "o.onnx.data").read_bytes()[: len(wanted)] == wanted
        if refuses:
            raise Refused

    if refuses:
        with pytest.raises(Refused):
            save(model, out, metadata={}, stored=stored, check=check)
        assert listing(tmp_path) == before
    else:
        save(model, out, metadata={"a": "b"}, stored=stored, check=check)
        assert onnx.load(out) == seen[0]
    assert len(seen) == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "private"] == []
