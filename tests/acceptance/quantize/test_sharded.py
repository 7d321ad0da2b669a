"""Weights in several files, models larger than what may be held, and models of many layers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_woq.errors import ModelError
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import clone, file_bytes, load, memory_tensors, model_hash, serialize
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import BFLOAT16, FLOAT, FLOAT16, graph, node, random, run, value, write

TYPES = {FLOAT: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
STATUS = Path("/proc/self/status")


def reference(name, kind, shape, location, offset):
    """A tensor whose data lies in the file `location`."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    length = int(np.prod(shape)) * np.dtype(TYPES[kind]).itemsize
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def sharded(folder, *, k=64, layers=6, shards=3, kind=FLOAT, fill=True):
    """A chain of `layers` square products, layer i in the shard `model-0000{i % shards + 1}.data` behind the others.

    Without `fill` all rows of a weight are the same, which is quicker to write.
    """
    tensors, ends = {}, [0] * shards
    for layer in range(layers):
        shard = layer % shards
        location = f"parts/model-{shard + 1:05}.data"
        tensors[f"W{layer}"] = reference(f"W{layer}", kind, (k, k), location, ends[shard])
        file = folder / location
        file.parent.mkdir(exist_ok=True)
        weight = random(k if fill else 1, k, seed=layer) / np.sqrt(k)
        with file.open("ab") as stream:
            stream.write(weight.astype(TYPES[kind]).tobytes() * (1 if fill else k))
        ends[shard] += k * k * np.dtype(TYPES[kind]).itemsize
    nodes = [node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"], name=f"layer{i}") for i in range(layers)]
    main = graph(nodes, [value("x0", ("m", k), kind)], [value(f"x{layers}", ("m", k), kind)], tensors)
    imports = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(main, opset_imports=imports, ir_version=10)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def product(layers, x, k=64):
    for layer in range(layers):
        x = x @ (random(k, k, seed=layer) / np.sqrt(k))
    return x


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_shard_is_found_and_read(tmp_path, kind):
    model = load(sharded(tmp_path, kind=kind))
    shards = [tmp_path / "parts" / f"model-0000{i}.data" for i in (1, 2, 3)]
    assert model.files == (tmp_path / "model.onnx", *shards)
    assert file_bytes(model) == sum(f.stat().st_size for f in (tmp_path / "model.onnx", *shards))
    groups, skipped = find_linear_groups(model, Recipe())
    assert [group.name for group in groups] == [f"x{i}" for i in range(1, 7)]
    assert skipped == []
    for layer, group in enumerate(groups):
        expected = (random(64, 64, seed=layer) / np.sqrt(64)).astype(TYPES[kind])
        assert group.weight_bytes == expected.nbytes
        np.testing.assert_array_equal(group.weight_sources()[0].read(), expected)


def test_a_session_reads_every_shard(tmp_path):
    model = load(sharded(tmp_path))
    assert memory_tensors(model) == {}
    assert len(serialize(model)) < 3000
    x = random(3, 64, seed=9)
    expected = product(6, x)
    np.testing.assert_allclose(run(model, {"x0": x})[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(clone(model), {"x0": x})[0], expected, rtol=1e-4, atol=1e-5)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out / "one.onnx", metadata={})
    assert sorted(f.name for f in out.iterdir()) == ["one.onnx", "one.onnx.data"]
    np.testing.assert_allclose(run(out / "one.onnx", {"x0": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["model.onnx", *(f"parts/model-0000{i}.data" for i in (1, 2, 3))])
def test_the_hash_depends_on_every_file(tmp_path, changed):
    model = load(sharded(tmp_path))
    before = model_hash(model)
    assert model_hash(load(tmp_path / "model.onnx")) == before
    file = tmp_path / changed
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_hash(model) != before
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_hash(model) == before


def test_the_hash_depends_on_where_a_file_ends(tmp_path):
    model = load(sharded(tmp_path))
    before = model_hash(model)
    first, second = (tmp_path / "parts" / f"model-0000{i}.data" for i in (1, 2))
    content = first.read_bytes()
    first.write_bytes(content[:-7])
    second.write_bytes(content[-7:] + second.read_bytes())
    assert model_hash(model) != before


def test_the_hash_of_a_file_that_went_away(tmp_path):
    model = load(sharded(tmp_path))
    (tmp_path / "parts" / "model-00002.data").unlink()
    with pytest.raises(ModelError, match=r"model-00002\.data cannot be read"):
        model_hash(model)


@pytest.mark.parametrize(
    ("how", "message"), [("missing", "not beside it"), ("short", "too short"), ("elsewhere", "unsafe")]
)
def test_a_shard_that_cannot_be_used_is_named(tmp_path, how, message):
    folder = tmp_path / "model"
    folder.mkdir()
    path = sharded(folder)
    shard = folder / "parts" / "model-00003.data"
    if how == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.rename(tmp_path / "gone.data")
    if how == "elsewhere":
        shard.symlink_to(tmp_path / "gone.data")
    with pytest.raises(ModelError, match=rf"model-00003\.data.*{message}"):
        load(path)


LIMITED = """
import resource, sys
from onnx_woq.graph.rewrite.fold_scale import can_fold
from onnx_woq.graph.io.model import clone, load, model_hash, serialize
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.recipe import Recipe
status = open("/proc/self/status").read()
private = int(status.split("VmData:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, [private + int(sys.argv[2])] * 2)
model = load(sys.argv[1])
groups, _ = find_linear_groups(model, Recipe())
model_hash(model)
float_copy_bytes(model, groups)
serialize(clone(model))
views = [part.read() for group in groups for part in group.weight_sources()]  # all at once: no more than a map each
assert all(float(view[::64].max()) < 1 for view in views)
assert not any(can_fold(group) for group in groups)
for group in groups:
    group.check()
print(sum(view.nbytes for view in views) >> 20)
del views
groups[0].weight()
"""


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's limit on private memory")
@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
@pytest.mark.slow
def test_a_large_model_of_half_precision_takes_next_to_no_memory(tmp_path, kind):
    """20 MB are less than one of the weights in float32, which 60 MB hold."""
    path = sharded(tmp_path, k=2560, layers=16, shards=4, kind=kind, fill=False)
    for megabytes, code in ((60, 0), (20, 1)):
        command = [sys.executable, "-c", LIMITED, str(path), str(megabytes << 20)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.stdout == "200\n", result.stderr
        assert result.returncode == code, result.stderr
        assert ("MemoryError" in result.stderr) is bool(code), "of `weight`, once everything else is done"


def layered(path, layers, k=32):
    """Norm, three products of one activation, a product of its own, a residual: `layers` times; constants as nodes."""
    nodes, weights, x = [], {}, "x"
    for i in range(layers):
        names = [f"{letter}{i}" for letter in "qkvo"]
        weights |= {f"W{name}": np.full((k, k), 0.1, np.float32) for name in names} | {f"s{i}": np.ones(k, np.float32)}
        one = onnx.numpy_helper.from_array(np.float32(1))
        nodes += [node("Constant", [], [f"one{i}"], value=one), node("Mul", [x, f"s{i}"], [f"n{i}"])]
        nodes += [node("MatMul", [f"n{i}", f"W{name}"], [name], name=name) for name in names[:3]]
        nodes += [node("Add", names[:2], [f"qk{i}"]), node("Mul", [f"qk{i}", names[2]], [f"m{i}"])]
        nodes += [node("MatMul", [f"m{i}", f"Wo{i}"], [f"o{i}"], name=names[3]), node("Add", [x, f"o{i}"], [f"a{i}"])]
        nodes += [node("Add", [f"a{i}", f"one{i}"], [f"x{i}"])]
        x = f"x{i}"
    return write(path, graph(nodes, [value("x", ("m", k))], [value(x, ("m", k))], weights))


def structure_work(path):
    """Everything that is done to a model beside numbers."""
    model = load(path)
    groups, _ = find_linear_groups(model, Recipe(lm_head=True))
    assert len(groups) * 2 == len([t for t in model.ir.graph.initializers if t.startswith("W")])
    float_copy_bytes(model, groups)
    serialize(clone(model))


def calls(path):
    """Function calls that `structure_work` makes: the same number every time."""
    count = 0

    def profile(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        structure_work(path)
    finally:
        sys.setprofile(None)
    return count


def seconds(path):
    start = time.process_time()
    structure_work(path)
    return time.process_time() - start


def test_work_grows_with_the_layers_and_no_faster(tmp_path):
    few, many = layered(tmp_path / "few.onnx", 8), layered(tmp_path / "many.onnx", 64)
    structure_work(few)
    assert calls(many) < 8 * 1.1 * calls(few)
    best = min(seconds(many) for _ in range(3)) / min(seconds(few) for _ in range(3))
    assert best < 8 * 2, "CPU time also counts what a single call does"


def test_bodies_that_use_the_same_names_by_the_hundred(tmp_path):
    """Each wants the same names, and looking for free ones must not start over each time."""

    def main(ifs):
        nodes = []
        for i in range(ifs):
            branches = {
                f"{name}_branch": graph([node("Neg", ["x"], ["inner"])], [], [value("inner")], name=name)
                for name in ("then", "else")
            }
            nodes.append(node("If", ["flag"], [f"y{i}"], **branches))
        inputs = [value("flag", (), onnx.TensorProto.BOOL), value("x", (3,))]
        proto = onnx.helper.make_model(
            graph(nodes, inputs, [value("y0")]), opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
        )
        path = tmp_path / f"{ifs}.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    few, many = main(250), main(2000)
    names = [v.name for n in load(few).ir.graph.all_nodes() for v in n.outputs]
    assert len(set(names)) == len(names) == 750

    def cpu(path):
        start = time.process_time()
        load(path)
        return time.process_time() - start

    cpu(few)
    assert min(cpu(many) for _ in range(2)) / min(cpu(few) for _ in range(3)) < 8 * 2
