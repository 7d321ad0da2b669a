"""Codes of odd widths and float16 scales: small in the file, and the same numbers wherever the file is run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.solve import solve_task, task_of
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import clone, load
from onnx_woq.graph.io.save import save
from onnx_woq.graph.rewrite.fold_scale import divide_input
from onnx_woq.recipe import Recipe
from onnx_woq.targets.base import Storage, stored_bytes
from onnx_woq.targets.bitplanes import FORMS, OPSET, codes_of, layout_of, planes_of
from onnx_woq.targets.constant_fold import fold_constants
from onnx_woq.targets.matmulnbits import pack, packed_from, shapes
from onnx_woq.targets.registry import required_runtime
from tests.support.runtimes import need_opset
from tests.zoo.nodes import (
    BFLOAT16,
    BOOL,
    FLOAT,
    FLOAT16,
    graph,
    linear,
    lower_group,
    node,
    pack_group,
    random,
    rtn,
    run,
    value,
    write,
)

GROUPS = (16, 32, 64, 128, 256, 48, 512, -1)
LEVELS = (0, 4)
PROTO = {np.float32: FLOAT, np.float16: FLOAT16}
OFF = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def quantized(path, recipe, level, out, *, dense=True):
    """The model lowered by rounding and saved; `dense=False` stores what the kernel reads, as older opsets do."""
    model = load(path)
    groups, skipped = find_linear_groups(model, recipe)
    assert groups, skipped
    half, opset = recipe.half_scales, None if dense else 17
    for group in groups:
        lower_group(model, group, rtn(group, half=half), accuracy_level=level, half=half, opset=opset)
    save(model, out, metadata={})
    onnx.checker.check_model(out, full_check=True)
    return out


def run_with(path, feeds, level, optimized=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.graph_optimization_level = 1, 3, level
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options).run(None, feeds)


def close(got, want, bound):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def many(path, dtype, k, specs, opset):
    weights = {f"W{i}": random(k, 7, seed=i, dtype=dtype) * dtype(0.1) for i in range(len(specs))}
    nodes = [node("MatMul", ["x", f"W{i}"], [f"y{i}"], name=f"mm{i}") for i in range(len(specs))]
    outputs = [value(f"y{i}", ["m", 7], PROTO[dtype]) for i in range(len(specs))]
    return write(path, graph(nodes, [value("x", ["m", k], PROTO[dtype])], outputs, weights), opset=opset)


def by_node(specs, **more):
    return Recipe(overrides={f"^mm{i}$": spec for i, spec in enumerate(specs)}, **more)


def branches(path, opset=21):
    """An If with a weight of its own in one branch and, in both, one of the main graph."""
    bodies = [
        graph([node("MatMul", ["x", "W"], [f"h{i}"]), node("MatMul", [f"h{i}", f"V{i}"], [f"o{i}"])], [],
              [value(f"o{i}")], {f"V{i}": random(64, 9, seed=i)}, name=f"branch{i}")
        for i in range(2)
    ]  # fmt: skip
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])],
        [value("flag", (), BOOL), value("x", (3, 64))],
        [value("y", (3, 9))],
        {"W": random(64, 64, seed=5)},
    )
    return write(path, main, opset=opset)


codes = st.integers(1, 5).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, 4), st.sampled_from([8, 16, 32, 64, 128]), st.integers(0, 2**32 - 1))
)


@settings(deadline=None)
@given(codes)
def test_planes_hold_the_bits_of_each_code_and_give_them_back(case):
    n, blocks, width, seed = case
    for bits in FORMS:
        container = next(c for c in (2, 4, 8) if c > bits)
        codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, blocks, width, 8 // container), np.uint8)
        for symmetric in (False, True):
            moved = codes << (container - bits if symmetric else 0)
            packed = np.bitwise_or.reduce(moved << np.arange(0, 8, container, dtype=np.uint8), axis=-1)
            layout = layout_of(bits, symmetric=symmetric)
            planes = planes_of(packed, layout)
            assert 8 * sum(p.nbytes for p in planes) == bits * codes.size
            np.testing.assert_array_equal(codes_of(planes, layout), packed)


def test_every_tile_of_a_large_weight_is_packed():
    for bits in FORMS:
        layout = layout_of(bits, symmetric=False)
        bytes_ = np.random.default_rng(0).integers(0, 256, (3000, 3, 128), np.uint8) & np.uint8(layout.mask)
        np.testing.assert_array_equal(codes_of(planes_of(bytes_, layout), layout), bytes_)


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("k", [200, 1024])
@pytest.mark.parametrize("level", LEVELS)
def test_dense_files_compute_bit_for_bit_what_those_of_the_kernel_do(tmp_path, bits, dtype, k, level):
    specs = [Spec(bits, g, s) for g, s in itertools.product(GROUPS, (False, True))]
    path, recipe = many(tmp_path / "m.onnx", dtype, k, specs, 18), by_node(specs)
    dense, wide = (quantized(path, recipe, level, tmp_path / f"{d}.onnx", dense=d) for d in (True, False))
    for rows in (1, 5):
        x = random(rows, k, seed=99, dtype=dtype)
        for spec, got, want in zip(specs, run(dense, {"x": x}), run(wide, {"x": x}), strict=True):
            assert_same(got, want, rounded=spec.symmetric and level == 4)


def assert_same(got, want, *, rounded):
    """Bit for bit; symmetric codes are doubled, and where the int8 kernel sums up floats these round otherwise."""
    if rounded:
        assert close(got, want, 1e-5 if got.dtype == np.float32 else 2e-3)
    else:
        np.testing.assert_array_equal(got, want)


def nodes_of(path):
    found = []
    pending = [onnx.load(path).graph]
    while pending:
        one = pending.pop()
        found += one.node
        pending += [a.g for n in one.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


@pytest.mark.parametrize("opset", [18, 21, 22, 23, 24, 25])
@pytest.mark.parametrize("optimization", ["ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize(
    "spec", [Spec(3, 32), Spec(3, 32, True), Spec(5, 32, True), Spec(6, 16), Spec(4, 32), Spec(8, 64, True)]
)
@pytest.mark.parametrize("half", [False, True])
def test_sessions_fold_everything_so_that_kernels_see_constants(tmp_path, opset, optimization, spec, half):
    need_opset(opset)
    path, out, optimized = (tmp_path / name for name in ("m.onnx", "q.onnx", "o.onnx"))
    quantized(branches(path, opset), Recipe(spec=spec, half_scales=half), 4, out)
    x = random(3, 64)
    for flag in (True, False):
        run_with(out, {"x": x, "flag": np.array(flag)}, getattr(ort.GraphOptimizationLevel, optimization), optimized)
        assert {n.op_type for n in nodes_of(optimized)} == {"If", "MatMulNBits"}
        main = onnx.load(optimized).graph
        kinds = {t.name: t.data_type for t in main.initializer}
        for n in nodes_of(optimized):
            if n.op_type == "MatMulNBits":
                assert kinds[n.input[1]] == onnx.TensorProto.UINT8
                assert kinds[n.input[2]] == FLOAT


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("half", [False, True])
def test_without_any_optimization_the_numbers_are_right_too(tmp_path, level, dtype, half):
    """Scales that are computed beside constant codes are garbage at level 4: see docs/storage.md."""
    specs = [Spec(b, g, s) for b, g, s in itertools.product((3, 4, 5, 6, 8), (16, 32, 128, -1), (False, True))]
    path, recipe = many(tmp_path / "m.onnx", dtype, 200, specs, 21), by_node(specs, half_scales=half)
    out = quantized(path, recipe, level, tmp_path / "q.onnx")
    groups, _ = find_linear_groups(load(path), recipe)
    want = {
        linear.name: rtn(group, half=half).columns(columns).dequantize()
        for group in groups
        for linear, columns in group.slices()
    }
    x = random(4, 200, seed=3, dtype=dtype)
    bound = 0.02 if level or dtype is np.float16 else 1e-5
    for i, got in enumerate(run_with(out, {"x": x}, OFF)):
        assert close(got, x.astype(np.float32) @ want[f"y{i}"], bound), specs[i]


@pytest.mark.parametrize("spec", [Spec(3, 32), Spec(3, 32, True), Spec(5, 64), Spec(6, 32, True), Spec(4, 32)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_readers_in_bodies_and_shared_weights(tmp_path, spec, half, level):
    path = branches(tmp_path / "m.onnx")
    recipe = Recipe(spec=spec, half_scales=half)
    out, wide = (quantized(path, recipe, level, tmp_path / f"{d}.onnx", dense=d) for d in (True, False))
    stored = onnx.load(out).graph
    assert all(not n.input or n.op_type == "If" or n.output[0].startswith(("W_Q", "V")) for n in stored.node)
    planes = FORMS[spec.bits].planes if spec.bits in FORMS else 0
    assert sum(t.name.startswith(f"W_Q{spec.bits}_plane") for t in stored.initializer) == planes
    for flag in (True, False):
        feeds = {"x": random(3, 64), "flag": np.array(flag)}
        (want,), (got,), (plain,) = run(wide, feeds), run(out, feeds), run_with(out, feeds, OFF)
        assert_same(got, want, rounded=spec.symmetric and level == 4)
        assert close(plain, want, 0.03)


@pytest.mark.parametrize("half", [False, True])
def test_bfloat16_is_computed_in_float32(tmp_path, half):
    weight = random(64, 9).astype(ml_dtypes.bfloat16)
    main = graph(
        [node("Cast", ["x"], ["xb"], to=BFLOAT16), node("MatMul", ["xb", "W"], ["yb"]),
         node("Cast", ["yb"], ["y"], to=FLOAT)],
        [value("x", (2, 64))],
        [value("y", (2, 9))],
        {"W": onnx.helper.make_tensor("W", BFLOAT16, (64, 9), weight.tobytes(), raw=True)},
    )  # fmt: skip
    path, recipe = write(tmp_path / "m.onnx", main), Recipe(spec=Spec(3, 32), half_scales=half)
    out = quantized(path, recipe, 0, tmp_path / "q.onnx")
    (group,), _ = find_linear_groups(load(path), recipe)
    x = random(2, 64)
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32) @ rtn(group, half=half).dequantize()
    for got in (run(out, {"x": x})[0], run_with(out, {"x": x}, OFF)[0]):
        assert close(got, want, 2**-7)


@pytest.mark.parametrize(("opset", "dense"), [(13, False), (17, False), (18, True), (25, True)])
def test_opsets_without_bitwise_operators_keep_four_bits(tmp_path, opset, dense):
    need_opset(opset)
    path = linear(tmp_path / "m.onnx", random(256, 64), opset=opset)
    model = load(path)
    (planned,) = make_plan(model, Recipe(spec=Spec(3, 64))).groups
    group, before = planned.source, planned.bytes
    q = rtn(group)
    lower_group(model, group, q, accuracy_level=0)
    assert model.ir.opset_imports[""] == opset
    assert ("BitwiseAnd" in {n.op_type for n in model.ir.graph}) == dense
    stored = sum(v.const_value.nbytes for v in model.ir.graph.initializers.values() if "uint8" not in v.name)
    assert stored == before == stored_bytes(shapes(256, 64, group.spec, Storage(np.float32, 18 if dense else 17)))
    assert stored == (256 * 64 * (3 if dense else 4) + 4 * 64 * (32 + 4)) // 8
    x = random(3, 256)
    assert close(run(model, {"x": x})[0], x @ q.dequantize(), 1e-5)


def test_a_name_that_is_taken_is_left_alone(tmp_path):
    """A model may have initializers of the names that all weights share."""
    main = graph(
        [node("MatMul", ["x", "W"], ["h"]), node("Add", ["h", "onnx_woq.uint8_1"], ["y"])],
        [value("x", (3, 64))],
        [value("y", (3, 9))],
        {"W": random(64, 9), "onnx_woq.uint8_1": np.float32(7)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    (group,), _ = find_linear_groups(model, Recipe(spec=Spec(3, 32)))
    q = rtn(group)
    lower_group(model, group, q, accuracy_level=0)
    x = random(3, 64)
    assert close(run(model, {"x": x})[0], x @ q.dequantize() + 7, 1e-5)


@pytest.mark.parametrize("spec", [Spec(3, 32), Spec(3, 32, True), Spec(5, 64), Spec(6, 32, True), Spec(4, 32)])
@pytest.mark.parametrize("half", [False, True])
def test_own_sessions_get_constants_and_nothing_else(tmp_path, spec, half):
    """What calibration does to its part of a model that is quantized already."""
    model = load(branches(tmp_path / "m.onnx"))
    recipe = Recipe(spec=spec, half_scales=half)
    for group in find_linear_groups(model, recipe)[0]:
        lower_group(model, group, rtn(group, half=half), accuracy_level=4, half=half)
    feeds = {"x": random(3, 64), "flag": np.array(True)}
    want = run(model, feeds)
    part = clone(model)
    fold_constants(part)
    assert [n.op_type for n in part.ir.graph] == ["If"]
    assert all(v.uses() for v in part.ir.graph.initializers.values())
    np.testing.assert_array_equal(run(part, feeds)[0], want[0])
    assert [n.op_type for n in model.ir.graph] != ["If"] or not (half or spec.bits in FORMS), "the model itself is kept"


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_dividing_what_a_quantized_layer_makes_keeps_its_scales_in_float16(tmp_path, bits):
    main = graph(
        [node("MatMul", ["x", "W"], ["h"], name="first"), node("MatMul", ["h", "V"], ["y"], name="second")],
        [value("x", (3, 64))],
        [value("y", (3, 9))],
        {"W": random(64, 48), "V": random(48, 9, seed=1)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    (first, second), _ = find_linear_groups(model, Recipe(spec=Spec(bits, 16), half_scales=True))
    lower_group(model, first, rtn(first, half=True), accuracy_level=0, half=True)
    x = random(3, 64)
    (want,) = run(model, {"x": x})
    scale = np.exp2(np.arange(48) % 5 - 2).astype(np.float32)
    assert divide_input(second, scale, allow_mul=False) == "linear"
    weight = second.linears[0].constant().array()
    model.ir.graph.initializers["V"].const_value = ir.Tensor(weight * scale[:, None])
    assert close(run(model, {"x": x})[0], want, 1e-6)
    kinds = {v.dtype.numpy() for v in model.ir.graph.initializers.values() if "scales" in v.name}
    assert kinds == {np.dtype(np.float16)}


def test_half_scales_take_half_and_are_rounded_before_codes_are_chosen(tmp_path):
    path = linear(tmp_path / "m.onnx", random(256, 64))
    (whole,) = make_plan(load(path), Recipe(spec=Spec(4, 32))).groups
    (half,) = make_plan(load(path), Recipe(spec=Spec(4, 32), half_scales=True)).groups
    assert 8 * whole.bytes == 256 * 64 * 5.125
    assert 8 * half.bytes == 256 * 64 * 4.625
    (packed,) = solve_task(task_of(Recipe(spec=Spec(4, 32), half_scales=True), half, None)).packed
    assert packed.scales.dtype == np.float16
    q = rtn(half.source, half=True)
    np.testing.assert_array_equal(q.scales, q.scales.astype(np.float16).astype(np.float32))
    again = pack(q, half.storage)
    for one, other in zip(again.arrays, packed.arrays, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_runtime_that_half_scales_need_is_that_of_float32(tmp_path, bits):
    """Also when the file is read again, where nothing says the type of what is computed."""
    path = linear(tmp_path / "m.onnx", random(256, 64))
    plain, half = (Recipe(spec=Spec(bits, 32), half_scales=h) for h in (False, True))
    outs = [quantized(path, recipe, 4, tmp_path / f"{i}.onnx") for i, recipe in enumerate((plain, half))]
    proto = onnx.load(outs[1])
    del proto.graph.value_info[:]
    onnx.save(proto, outs[1])
    assert required_runtime(load(outs[0])) == required_runtime(load(outs[1]))


def test_packed_arrays_can_be_exchanged(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(256, 64)))
    (group,), _ = find_linear_groups(model, Recipe(spec=Spec(3, 32)))
    (packed,) = pack_group(model, group, rtn(group))
    again = packed.with_arrays([array.copy() for array in packed.arrays])
    assert len(again.codes) == 3
    for one, other in zip(packed.arrays, again.arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    assert replace(again, codes=packed.codes, scales=packed.scales, zeros=packed.zeros) == packed


def test_only_codes_that_leave_gaps_are_dense(tmp_path):
    """Whatever a weight was planned with: a mix gives it another spec afterwards."""
    (group,) = make_plan(load(linear(tmp_path / "m.onnx", random(256, 64))), Recipe(spec=Spec(3, 32))).groups
    assert group.storage.opset >= OPSET

    def is_dense(one):
        """Tells it of what is packed, and of the arrays that are promised before it is."""
        packed = pack(rtn(one.source), one.storage)
        assert tuple((array.shape, array.dtype) for array in packed.arrays) == one.shapes()[0]
        assert packed_from(packed.arrays, one.k, one.n, one.spec, one.storage) == packed
        return packed.dense

    assert is_dense(group)
    other = group.on(Spec(4, 32))
    assert not is_dense(other)
    assert is_dense(other.on(Spec(3, 64)))
    assert not is_dense(replace(group, storage=replace(group.storage, opset=OPSET - 1)))
