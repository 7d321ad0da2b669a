"""Rows read from low-bit tables are the rows that the codes stand for; what stays float says why."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from onnx_woq.core.grids import integer as grid
from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.find.embeddings import SMALLEST_TABLE, find_embeddings
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from onnx_woq.targets.base import Storage
from onnx_woq.targets.bitplanes import FORMS
from onnx_woq.targets.gather_block_quantized import lower, pack, share
from onnx_woq.targets.registry import required_runtime
from tests.support.runtimes import need, need_opset
from tests.zoo.nodes import BFLOAT16, BOOL, FLOAT, FLOAT16, INT64, graph, lower_group, node, random, run, value, write

ROWS = 2100
PROTO = {np.float32: FLOAT, np.float16: FLOAT16}
IDS = np.array([[0, 5, ROWS - 1], [7, 7, -1]], np.int64)
FOUR = Recipe(embedding=Spec(4, 32))


def tables(path, columns, dtype=np.float32, *, count=1, tied=False, opset=21, index=INT64, rows=ROWS):
    """`count` tables whose rows y0, y1 … are gathered by ids; `tied` multiplies x by the first, transposed."""
    proto = PROTO[dtype]
    weights = {f"T{i}": random(rows, columns, seed=i).astype(dtype) * dtype(0.1) for i in range(count)}
    nodes = [node("Gather", [f"T{i}", "ids"], [f"y{i}"], name=f"gather{i}") for i in range(count)]
    outputs = [value(f"y{i}", [2, 3, columns], proto) for i in range(count)]
    inputs = [value("ids", [2, 3], index)]
    if tied:
        nodes += [node("Transpose", ["T0"], ["turned"]), node("MatMul", ["x", "turned"], ["logits"], name="head")]
        inputs.append(value("x", ["m", columns], proto))
        outputs.append(value("logits", ["m", rows], proto))
    return write(path, graph(nodes, inputs, outputs, weights), opset=opset)


def rounded(weight, spec, dtype):
    """A weight [K, N] rounded to nearest."""
    scales, zeros = grid.fit(weight, spec, scale_dtype=dtype)
    return grid.quantize(np.asarray(weight, np.float32), scales, zeros, spec)


def lowered(path, recipe, *, input_scale=None):
    """The plan of the model, written with everything quantized, and for each table what its codes stand for."""
    model = load(path)
    plan = make_plan(model, recipe)
    meant = {}  # [V, D] float32
    for group in plan.groups:
        scale = 1 if input_scale is None else input_scale[:, None]
        q = rounded(group.source.weight() * scale, group.spec, group.storage.scale_dtype)
        lower_group(model, group.source, q, accuracy_level=0, half=recipe.half_scales)
        for one in plan.borrowers(group):
            share(model, one, input_scale)
            meant[one.name] = q.dequantize().T
    for one in plan.embeddings:
        if one.lender is None:
            q = rounded(one.weight_sources()[0].read(), one.spec, one.storage.scale_dtype)
            lower(model, one.source, pack(q, one.storage))
            meant[one.name] = q.dequantize().T
    out = path.with_name("q.onnx")
    save(model, out, metadata={})
    onnx.checker.check_model(out)
    return out, meant, plan


def table_of(plan):
    """The only table of a plan."""
    (one,) = plan.embeddings
    return one.source


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("half_scales", [False, True])
@pytest.mark.parametrize("columns", [33, 200, 576])
def test_rows_are_those_of_the_codes_bit_for_bit(tmp_path, dtype, columns, half_scales):
    need("1.27", "2-bit tables, and zero points of rows that do not fill bytes")
    specs = [Spec(b, g, s) for b, g, s in itertools.product(range(2, 9), (16, 32, 48, 64, 128, 256, -1), (False, True))]
    overrides = {f"^y{i}$": spec for i, spec in enumerate(specs)}
    recipe = Recipe(overrides=overrides, embedding=Spec(), half_scales=half_scales)
    rows = SMALLEST_TABLE // columns // np.dtype(dtype).itemsize + 1
    ids = np.array([[0, 5, rows - 1], [7, 7, -1]], np.int64)
    path = tables(tmp_path / "m.onnx", columns, dtype, count=len(specs), rows=rows)
    out, meant, plan = lowered(path, recipe)
    found = plan.embeddings
    assert not plan.skipped
    assert [one.spec for one in found] == specs
    for i, (spec, got) in enumerate(zip(specs, run(out, {"ids": ids}), strict=True)):
        assert got.dtype == dtype
        # Symmetric dense codes have their scales divided by `2**gap`: float16 ends at 2**-24.
        divided = spec.bits in FORMS and spec.symmetric and found[i].storage.scale_dtype == np.float16
        close = 2.0 ** (FORMS[spec.bits].gap + spec.bits - 26) if divided else 0.0
        np.testing.assert_allclose(got, meant[f"y{i}"][ids].astype(dtype), rtol=0, atol=close, err_msg=str(spec))
        assert relative(got, table(path, i)[ids]) < 2.0 ** (2 - spec.bits)  # and near the float


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def table(path, i=0):
    return next(onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == f"T{i}")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("columns", [33, 40, 576])
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("half_scales", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (3, True), (4, False), (8, True)])
def test_a_tied_head_and_its_table_are_one_set_of_codes(tmp_path, dtype, columns, bits, symmetric, half_scales, opset):
    need("1.27", "2-bit tables, and zero points of rows that do not fill bytes")
    spec = Spec(bits, 32, symmetric)
    path = tables(tmp_path / "m.onnx", columns, dtype, tied=True, opset=opset)
    out, meant, plan = lowered(path, Recipe(spec=spec, embedding=spec, half_scales=half_scales))
    found = table_of(plan)
    assert (found.shared, found.head.name) == (True, "logits")
    x = random(4, columns, seed=9, dtype=dtype)
    rows, logits = run(out, {"ids": IDS, "x": x})
    np.testing.assert_array_equal(rows, meant["y0"][IDS].astype(dtype))
    assert relative(logits, x.astype(np.float32) @ meant["y0"].T) < (1e-5 if dtype is np.float32 else 2e-3)
    stored = [t for t in load(out).ir.graph.initializers.values() if t.const_value.nbytes > 64]
    codes = 3 if bits == 3 and opset >= 18 else 1  # arrays of them
    assert len(stored) == codes + (1 if symmetric else 2), "codes, scales, zero points: once each"
    assert sum(t.const_value.nbytes for t in stored) == out.with_name("q.onnx.data").stat().st_size - padding(out)


def padding(out):
    """Bytes of the data file between tensors."""
    model = onnx.load(out, load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    ends = sorted((int(p["offset"]), int(p["offset"]) + int(p["length"])) for p in places)
    return sum(max(0, start - end) for (_, end), (start, _) in itertools.pairwise([(0, 0), *ends]))


def test_what_a_table_takes_is_what_is_written(tmp_path):
    path = tables(tmp_path / "m.onnx", 200, tied=True)
    for own, half in itertools.product((Spec(4, 32), Spec(8, 64, True), Spec(4, 128), Spec(3, 32)), (False, True)):
        out, _, plan = lowered(path, Recipe(embedding=own, half_scales=half))
        (group,), (one,) = plan.groups, plan.embeddings
        assert group.bytes == one.on(Spec()).own_bytes, "the same numbers from the other side"
        assert (one.source.shared, one.source.counted) == (own == Spec(), True)
        written = out.with_name("q.onnx.data").stat().st_size - padding(out)
        assert written == group.bytes + one.bytes
        assert one.code_bytes == (0 if own == Spec() else one.own_bytes)
    # A linear group counts the float table among its own.
    assert (one.weight_bytes, one.report().bytes_before, group.report().bytes_before) == (ROWS * 800, 0, ROWS * 800)


def test_a_scaled_head_lends_its_codes_too(tmp_path):
    path = tables(tmp_path / "m.onnx", 64, tied=True)
    scale = np.linspace(0.5, 4, 64).astype(np.float32)
    out, meant, _ = lowered(path, FOUR, input_scale=scale)
    rows, _ = run(out, {"ids": IDS, "x": random(1, 64)})
    np.testing.assert_allclose(rows, meant["y0"][IDS] / scale, rtol=1e-6)
    assert relative(rows, table(path)[IDS]) < 0.15


@pytest.mark.parametrize("way", ["Gemm", "Cast", "Transpose before Gather"])
def test_other_ways_of_being_tied(tmp_path, way):
    stored, ids, x = random(ROWS, 64), value("ids", [2, 3], INT64), value("x", ["m", 64])
    gather = node("Gather", ["T", "ids"], ["rows"])
    weights = {"T": stored}
    if way == "Gemm":
        nodes = [gather, node("Gemm", ["x", "T"], ["logits"], transB=1)]
    elif way == "Cast":
        weights = {"T": stored.astype(np.float16)}
        nodes = [node("Gather", ["T", "ids"], ["half"]), node("Cast", ["half"], ["rows"], to=FLOAT)]
        nodes += [node("Cast", ["T"], ["wide"], to=FLOAT), node("Transpose", ["wide"], ["turned"])]
        nodes += [node("MatMul", ["x", "turned"], ["logits"])]
    else:
        weights = {"T": np.ascontiguousarray(stored.T)}
        nodes = [node("Transpose", ["T"], ["turned"]), node("Gather", ["turned", "ids"], ["rows"])]
        nodes += [node("MatMul", ["x", "T"], ["logits"])]
    outputs = [value("rows", [2, 3, 64]), value("logits", ["m", ROWS])]
    path = write(tmp_path / "m.onnx", graph(nodes, [ids, x], outputs, weights))
    out, meant, plan = lowered(path, FOUR)
    found = table_of(plan)
    assert found.shared
    want = next(iter(meant.values()))[IDS]
    rows, _ = run(out, {"ids": IDS, "x": random(1, 64)})
    np.testing.assert_array_equal(rows, want.astype(np.float16 if way == "Cast" else np.float32))
    assert "T" not in load(out).ir.graph.initializers


def test_a_square_table_read_the_same_way_round_is_no_head_of_it(tmp_path):
    nodes = [node("Gather", ["T", "ids"], ["rows"]), node("MatMul", ["x", "T"], ["y"])]
    inputs, outputs = [value("ids", [2], INT64), value("x", [1, 128])], [value("rows", [2, 128]), value("y", [1, 128])]
    path = write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, {"T": random(128, 128)}))
    out, meant, plan = lowered(path, FOUR)
    found = table_of(plan)
    assert (found.head, found.shared, found.counted) == (None, False, True)
    np.testing.assert_array_equal(run(out, {"ids": IDS[0, :2], "x": random(1, 128)})[0], meant["rows"][IDS[0, :2]])
    assert "T" not in load(out).ir.graph.initializers


def test_a_head_that_rounds_the_table_has_codes_of_its_own(tmp_path):
    nodes = [node("Gather", ["T", "ids"], ["rows"]), node("Cast", ["T"], ["half"], to=FLOAT16)]
    nodes += [node("Transpose", ["half"], ["turned"]), node("MatMul", ["x", "turned"], ["logits"])]
    inputs, outputs = [value("ids", [2, 3], INT64), value("x", ["m", 64], FLOAT16)], [value("rows", [2, 3, 64])]
    outputs.append(value("logits", ["m", ROWS], FLOAT16))
    path = write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, {"T": random(ROWS, 64)}))
    out, meant, plan = lowered(path, FOUR)
    found = table_of(plan)
    assert (found.head, found.shared, found.counted) == (None, False, True)
    rows, _ = run(out, {"ids": IDS, "x": random(1, 64, dtype=np.float16)})
    np.testing.assert_array_equal(rows, meant["rows"][IDS])
    assert "T" not in load(out).ir.graph.initializers


def test_brain_floats_are_read_in_float32_and_rounded(tmp_path):
    stored = onnx.helper.make_tensor("T", BFLOAT16, [ROWS, 64], random(ROWS, 64).ravel().tolist())
    nodes = [node("Gather", ["T", "ids"], ["brain"]), node("Cast", ["brain"], ["rows"], to=FLOAT)]
    main = graph(nodes, [value("ids", [2, 3], INT64)], [value("rows", [2, 3, 64])], {"T": stored})
    out, meant, _ = lowered(write(tmp_path / "m.onnx", main), FOUR)
    np.testing.assert_allclose(run(out, {"ids": IDS})[0], meant["brain"][IDS], rtol=2**-8)
    assert [n.op_type for n in load(out).ir.graph] == ["GatherBlockQuantized", "Cast", "Cast"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_in_both_branches_is_stored_once(tmp_path, tied):
    """As merged decoders have it: the Gathers and the heads lie in the bodies, the table outside."""
    bodies = []
    for name, op in (("yes", "Neg"), ("no", "Abs")):
        nodes = [node("Gather", ["T", "ids"], [f"{name}_rows"]), node(op, [f"{name}_rows"], [f"{name}_h"])]
        if tied:
            nodes += [node("Transpose", ["T"], [f"{name}_t"])]
            nodes += [node("MatMul", [f"{name}_h", f"{name}_t"], [f"{name}_out"])]
        else:
            nodes += [node("Identity", [f"{name}_h"], [f"{name}_out"])]
        bodies.append(graph(nodes, [], [value(f"{name}_out", [2, 3, None])], name=name))
    choice = node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    inputs = [value("ids", [2, 3], INT64), value("flag", [], BOOL)]
    main = graph([choice], inputs, [value("y", [2, 3, None])], {"T": random(ROWS, 64)})
    out, meant, plan = lowered(write(tmp_path / "m.onnx", main), FOUR)
    found = table_of(plan)
    assert (len(found.nodes), found.shared) == (2, tied)
    rows = meant[found.name]
    for flag, sign in ((True, np.negative), (False, np.abs)):
        want = sign(rows[IDS]) @ rows.T if tied else sign(rows[IDS])
        np.testing.assert_allclose(run(out, {"ids": IDS, "flag": np.array(flag)})[0], want, rtol=1e-4, atol=1e-4)
    assert sum(v.const_value.nbytes > 512 for v in load(out).ir.graph.initializers.values()) == 3


@pytest.mark.parametrize("opset", [13, 17, 22, 25])
@pytest.mark.parametrize("index", [INT64, onnx.TensorProto.INT32])
def test_every_opset_and_both_kinds_of_index(tmp_path, opset, index):
    need_opset(opset)
    out, meant, _ = lowered(tables(tmp_path / "m.onnx", 72, opset=opset, index=index), FOUR)
    ids = IDS.astype(np.int32 if index != INT64 else np.int64)
    np.testing.assert_array_equal(run(out, {"ids": ids})[0], meant["y0"][IDS])


def test_several_gathers_read_one_table(tmp_path):
    nodes = [node("Gather", ["T", name], [f"y_{name}"]) for name in ("a", "b")]
    inputs = [value("a", [2], INT64), value("b", [3, 1], INT64)]
    outputs = [value("y_a", [2, 64]), value("y_b", [3, 1, 64])]
    path = write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, {"T": random(ROWS, 64)}))
    out, meant, plan = lowered(path, FOUR)
    found = table_of(plan)
    a, b = np.array([3, 4]), np.array([[5], [6], [0]])
    for got, ids in zip(run(out, {"a": a, "b": b}), (a, b), strict=True):
        np.testing.assert_array_equal(got, meant[found.name][ids])
    assert len(load(out).ir.graph.initializers) == 3


@pytest.mark.parametrize(
    ("spec", "columns", "oldest"),
    [
        (Spec(2, 32, True), 64, "1.27"), (Spec(4, 32), 64, "1.23"), (Spec(8, 32), 96, "1.23"),
        (Spec(4, 32), 96, "1.27"), (Spec(4, 32, True), 96, "1.23"),
    ],
)  # fmt: skip
def test_the_oldest_runtime(tmp_path, spec, columns, oldest):
    """Zero points whose rows end within a byte are read wrongly before 1.27."""
    path = tables(tmp_path / "m.onnx", columns)
    model = load(path)
    assert required_runtime(model) == ""
    (found,), _ = find_embeddings(model, Recipe(embedding=spec), [])
    q = rounded(found.weight_sources()[0].read(), spec, np.float32)
    lower(model, found, pack(q, Storage(np.float32, 21)))
    assert required_runtime(model) == oldest
