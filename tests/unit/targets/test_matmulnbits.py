"""What is lowered computes what was quantized: for every width, group, scheme and form of the node."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from onnx_woq.targets.base import Storage, stored_bytes
from onnx_woq.targets.matmulnbits import minimum_runtime, native_layout, shapes
from onnx_woq.targets.registry import required_runtime
from tests.support.runtimes import has, need_opset
from tests.zoo.nodes import BFLOAT16, BOOL, FLOAT, FLOAT16, INT64, graph, lower, node, random, run, value, write
from tests.zoo.nodes import linear as linear_model

GROUPS = (16, 32, 48, 64, 96, 128, 160, 256, 512, -1)


def many(path, dtype, k: int, n: int, count: int, opset: int = 21):
    """`count` MatMuls of one input, so that a session tries many specs."""
    proto = {np.float32: FLOAT, np.float16: FLOAT16}[dtype]
    weights = {f"W{i}": random(k, n, seed=i, dtype=dtype) * dtype(0.1) for i in range(count)}
    nodes = [node("MatMul", ["x", f"W{i}"], [f"y{i}"], name=f"mm{i}") for i in range(count)]
    outputs = [value(f"y{i}", ["m", n], proto) for i in range(count)]
    return write(path, graph(nodes, [value("x", ["m", k], proto)], outputs, weights), opset=opset)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("k", [200, 1000])
def test_every_width_group_and_scheme_computes_what_it_stores(tmp_path, dtype, k):
    n = 7
    widths = [b for b in range(1, 9) if has(minimum_runtime(b, accuracy_level=0, scale_dtype=dtype))]
    specs = [Spec(b, g, s) for b, g, s in itertools.product(widths, GROUPS, (False, True))]
    recipe = Recipe(overrides={f"^mm{i}$": spec for i, spec in enumerate(specs)})
    path = many(tmp_path / "m.onnx", dtype, k, n, len(specs))
    x = random(3, k, seed=99, dtype=dtype)
    for level, bound in ((0, 1e-5 if dtype is np.float32 else 2e-3), (4, 0.03)):
        model = load(path)
        groups, solved, _ = lower(model, recipe, accuracy_level=level)
        save(model, tmp_path / "q.onnx", metadata={})
        onnx.checker.check_model(tmp_path / "q.onnx")
        outputs = run(tmp_path / "q.onnx", {"x": x})
        want = {
            linear.name: x.astype(np.float32) @ q.dequantize()
            for group, q in zip(groups, solved, strict=True)
            for linear in group.linears
        }
        for i, (spec, got) in enumerate(zip(specs, outputs, strict=True)):
            assert got.dtype == dtype
            assert relative(got, want[f"y{i}"]) < bound, (spec, level)


def check(path, feeds, bound=1e-5, recipe=None, groups=1):
    """Lowers the model at level 0 and compares it with itself on the dequantized weights."""
    model = load(path)
    before = {v.name for v in model.ir.graph.outputs}
    found, solved, skipped = lower(model, recipe)
    assert len(found) == groups, skipped
    out = path.with_name("q.onnx")
    save(model, out, metadata={})
    onnx.checker.check_model(out)
    assert {v.name for v in load(out).ir.graph.outputs} == before
    want = run(replaced(path, found, solved), feeds)
    for got, expected in zip(run(out, feeds), want, strict=True):
        assert got.dtype == expected.dtype
        assert relative(got, expected) < bound
    return load(out), found


def replaced(path, groups, solved):
    """The float model with every weight replaced by what its codes stand for."""
    proto = onnx.load(path)
    for group, q in zip(groups, solved, strict=True):
        for linear, columns in group.slices() if site_is_float(group) else stored(group):
            new = q.columns(columns).dequantize() / np.float32(linear.scale)
            put(proto, linear, new)
    out = path.with_name("dequantized.onnx")
    onnx.save(proto, out)
    return out


def site_is_float(group):
    return all(linear.node.op_type != "MatMulNBits" for linear in group.linears)


def stored(group):
    """Sites with their columns, read off the shared initializers after lowering."""
    places, start = {}, 0
    for linear in group.linears:
        packed = linear.node.inputs[1].name
        if packed not in places:
            places[packed] = slice(start, start + linear.n)
            start += linear.n
        yield linear, places[packed]


def put(proto, linear, weight):
    for scope in scopes(proto.graph):
        for tensor in scope.initializer:
            if tensor.name == linear.weight_name:
                old = onnx.numpy_helper.to_array(tensor)
                new = weight if tuple(old.shape[-2:]) == weight.shape else weight.T
                tensor.CopyFrom(onnx.numpy_helper.from_array(new.reshape(old.shape).astype(old.dtype), tensor.name))


def scopes(main):
    yield main
    for n in main.node:
        for a in n.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from scopes(a.g)


def ops(model):
    return sorted(n.op_type for n in model.ir.graph.all_nodes())


@pytest.mark.parametrize("opset", [13, 17, 21, 22, 23, 25])
@pytest.mark.parametrize("external", [False, True])
def test_every_opset_and_both_ways_of_storing(tmp_path, opset, external):
    need_opset(opset)
    path = linear_model(tmp_path / "m.onnx", random(40, 9), opset=opset, external=external)
    model, _ = check(path, {"x": random(3, 40)})
    assert ops(model) == ["MatMulNBits"]
    assert model.ir.opset_imports == {"": opset, "com.microsoft": 1}
    assert "W" not in model.ir.graph.initializers


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40), (2, 1, 2, 3, 40), (0, 40)])
def test_every_rank_of_the_activation(tmp_path, shape):
    main = graph(
        [node("MatMul", ["x", "W"], ["y"])], [value("x", shape)], [value("y", (*shape[:-1], 9))], {"W": random(40, 9)}
    )
    path = write(tmp_path / "m.onnx", main)
    if shape[0]:
        check(path, {"x": random(*shape)})
    else:
        model = load(path)
        lower(model)
        assert run(model, {"x": random(*shape)})[0].shape == (0, 9)


C_FORMS = {
    "none": None, "vector": (9,), "row": (1, 9), "scalar": (), "one": (1,), "one by one": (1, 1),
    "column": (3, 1), "full": (3, 9),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("form", C_FORMS)
@pytest.mark.parametrize("factors", [{}, {"alpha": 0.5, "beta": -2.0}, {"beta": 0.0}])
def test_every_form_of_gemm(tmp_path, dtype, trans_b, form, factors):
    proto = {np.float32: FLOAT, np.float16: FLOAT16}[dtype]
    shape = C_FORMS[form]
    weights = {"W": random(*((9, 40) if trans_b else (40, 9)), dtype=dtype)}
    if shape is not None:
        weights["C"] = np.asarray(random(*shape, seed=5), dtype)
    main = graph(
        [node("Gemm", ["x", "W", *(["C"] if shape is not None else [])], ["y"], transB=trans_b, name="g", **factors)],
        [value("x", (3, 40), proto)],
        [value("y", (3, 9), proto)],
        weights,
    )
    path = write(tmp_path / "m.onnx", main)
    model, _ = check(path, {"x": random(3, 40, dtype=dtype)}, 1e-5 if dtype is np.float32 else 3e-3)
    added = form in ("column", "full") and factors.get("beta") != 0.0
    assert ops(model) == (["Add", "MatMulNBits"] if added else ["MatMulNBits"])
    assert "W" not in model.ir.graph.initializers


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_gemm_with_a_computed_addend(tmp_path, beta):
    main = graph(
        [node("Gemm", ["x", "W", "c"], ["y"], beta=beta)],
        [value("x", (3, 40)), value("c", (9,))],
        [value("y", (3, 9))],
        {"W": random(40, 9)},
    )
    check(write(tmp_path / "m.onnx", main), {"x": random(3, 40), "c": random(9, seed=4)})


def test_gemm_bias_that_a_caller_may_override_is_not_frozen(tmp_path):
    main = graph(
        [node("Gemm", ["x", "W", "c"], ["y"])],
        [value("x", (3, 40)), value("c", (9,))],
        [value("y", (3, 9))],
        {"W": random(40, 9), "c": random(9)},
    )
    check(write(tmp_path / "m.onnx", main), {"x": random(3, 40), "c": random(9, seed=4)})


def test_bfloat16_is_computed_between_casts(tmp_path):
    import ml_dtypes

    weight = random(40, 9).astype(ml_dtypes.bfloat16)
    main = graph(
        [
            node("Cast", ["x"], ["xb"], to=BFLOAT16),
            node("MatMul", ["xb", "W"], ["yb"], name="mm"),
            node("Cast", ["yb"], ["y"], to=FLOAT),
        ],
        [value("x", (2, 40))],
        [value("y", (2, 9))],
        {"W": onnx.helper.make_tensor("W", BFLOAT16, (40, 9), weight.tobytes(), raw=True)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    _, (q,), _ = lower(model)
    x = random(2, 40)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert relative(run(model, {"x": x})[0], rounded @ q.dequantize()) < 2**-7
    assert ops(model) == ["Cast", "Cast", "Cast", "Cast", "MatMulNBits"]


def test_bfloat16_gemm_with_a_matrix_to_add_keeps_its_types(tmp_path):
    weights = {
        "W": onnx.helper.make_tensor("W", BFLOAT16, (40, 9), random(40, 9)),
        "C": onnx.helper.make_tensor("C", BFLOAT16, (2, 9), random(2, 9)),
    }
    main = graph(
        [node("Gemm", ["x", "W", "C"], ["y"], beta=2.0)],
        [value("x", (2, 40), BFLOAT16)],
        [value("y", (2, 9), BFLOAT16)],
        weights,
    )
    model = load(write(tmp_path / "m.onnx", main))
    lower(model)
    save(model, tmp_path / "q.onnx", metadata={})
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "q.onnx"), check_type=True, strict_mode=True)
    assert [n.op_type for n in model.ir.graph] == [
        "Cast",
        "Cast",
        "MatMulNBits",
        "Add",
        "Cast",
    ]  # there is no Add for it


def test_a_weight_behind_transpose_cast_identity_and_constant_nodes(tmp_path):
    constant = node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(random(9, 40, dtype=np.float16)))
    main = graph(
        [
            constant,
            node("Transpose", ["c"], ["ct"]),
            node("Cast", ["ct"], ["cf"], to=FLOAT),
            node("Identity", ["cf"], ["ci"]),
            node("MatMul", ["x", "ci"], ["y"]),
        ],
        [value("x", (3, 40))],
        [value("y", (3, 9))],
    )
    model = load(write(tmp_path / "m.onnx", main))
    _, (q,), _ = lower(model)
    assert ops(model) == ["MatMulNBits"], "what nothing reads any more is gone"
    x = random(3, 40)
    assert relative(run(model, {"x": x})[0], x @ q.dequantize()) < 1e-5


def test_tied_weight_read_by_two_activations_is_stored_once(tmp_path):
    main = graph(
        [
            node("MatMul", ["x", "W"], ["h"], name="a"),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "W"], ["y"], name="b"),
        ],
        [value("x", (3, 40))],
        [value("y", (3, 40))],
        {"W": random(40, 40)},
    )
    model, (group,) = check(write(tmp_path / "m.onnx", main), {"x": random(3, 40)}, groups=1)
    assert group.values == ("x", "r")
    first, second = (n for n in model.ir.graph if n.op_type == "MatMulNBits")
    assert list(first.inputs[1:]) == list(second.inputs[1:])
    assert sum(v.const_value.nbytes for v in model.ir.graph.initializers.values()) < 40 * 40 * 4 / 2


def test_embedding_tied_to_the_head_stays_for_the_gather(tmp_path):
    main = graph(
        [
            node("Gather", ["E", "ids"], ["h"]),
            node("Transpose", ["E"], ["Et"], perm=[1, 0]),
            node("MatMul", ["h", "Et"], ["y"]),
        ],
        [value("ids", (3,), INT64)],
        [value("y", (3, 30))],
        {"E": random(30, 40)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    _, (q,), _ = lower(model)
    ids = np.array([1, 5, 29])
    assert relative(run(model, {"ids": ids})[0], random(30, 40)[ids] @ q.dequantize()) < 1e-5
    assert ops(model) == ["Gather", "MatMulNBits"]
    assert "E" in model.ir.graph.initializers


def body(weight: str, result: str, inputs=(), outputs=(), weights=None, before=(), name="body"):
    return graph(
        [*before, node("MatMul", ["x", weight], [result])], inputs, [*outputs, value(result)], weights, name=name
    )


def test_if_branches_with_their_own_and_an_outer_weight_and_clashing_names(tmp_path):
    then = body("W", "out")
    other = body("V", "out", weights={"V": random(40, 9, seed=2)})
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)],
        [value("flag", (), BOOL), value("x", (3, 40))],
        [value("y", (3, 9))],
        {"W": random(40, 9)},
    )
    path = write(tmp_path / "m.onnx", main)
    for flag in (True, False):
        model, _ = check(path, {"flag": np.array(flag), "x": random(3, 40)}, groups=1)
    assert ops(model) == ["If", "MatMulNBits", "MatMulNBits"]
    assert len({n.outputs[0].name for n in model.ir.graph.all_nodes()}) == 3


def test_loop_body(tmp_path):
    inner = graph(
        [
            node("Identity", ["go"], ["go_on"]),
            node("MatMul", ["h", "W"], ["p"]),
            node("Tanh", ["p"], ["h2"]),
            node("Identity", ["h2"], ["each"]),
        ],
        [value("i", (), INT64), value("go", (), BOOL), value("h", (3, 40))],
        [value("go_on", (), BOOL), value("h2", (3, 40)), value("each", (3, 40))],
    )
    main = graph(
        [node("Loop", ["trips", "", "x"], ["y", "all"], body=inner)],
        [value("trips", (), INT64), value("x", (3, 40))],
        [value("y", (3, 40)), value("all", ("t", 3, 40))],
        {"W": random(40, 40)},
    )
    path = write(tmp_path / "m.onnx", main)
    model, _ = check(path, {"trips": np.array(3), "x": random(3, 40)})
    assert "MatMulNBits" in ops(model)


def test_a_product_that_is_an_output_is_read_by_others_and_fed_by_an_input(tmp_path):
    main = graph(
        [node("MatMul", ["x", "W"], ["y"]), node("Relu", ["y"], ["z"])],
        [value("x", (3, 40))],
        [value("y", (3, 9)), value("z", (3, 9))],
        {"W": random(40, 9)},
    )
    check(write(tmp_path / "m.onnx", main), {"x": random(3, 40)})


def test_functions_with_a_matmul_are_inlined_and_others_kept(tmp_path):
    domain = "local"
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(domain, 1)]
    make = onnx.helper.make_function
    inner = [node("proj", ["a", "w"], ["c"], domain=domain), node("act", ["c"], ["b"], domain=domain)]
    functions = [
        make(domain, "proj", ["a", "w"], ["b"], [node("MatMul", ["a", "w"], ["b"])], imports),
        make(domain, "outer", ["a", "w"], ["b"], inner, imports),
        make(domain, "act", ["a"], ["b"], [node("Relu", ["a"], ["b"])], imports),
    ]
    main = graph(
        [node("outer", ["x", "W"], ["h"], domain=domain), node("outer", ["h", "V"], ["y"], domain=domain)],
        [value("x", (3, 40))],
        [value("y", (3, 9))],
        {"W": random(40, 40), "V": random(40, 9)},
    )
    path = write(tmp_path / "m.onnx", main, functions=functions, domains={domain: 1})
    model, _ = check(path, {"x": random(3, 40)}, groups=2)
    assert [f.name for f in model.ir.functions.values()] == ["act"]
    assert ops(model) == ["MatMulNBits", "MatMulNBits", "act", "act"]


def test_layout_is_native_and_never_splits_a_group():
    for bits, group, k in itertools.product(range(1, 9), (-1, *range(16, 600, 16)), (16, 100, 576, 1000, 4096)):
        container, block = native_layout(bits, group, k)
        whole = group == -1 or group >= k
        assert container == {1: 2, 2: 2, 3: 4, 4: 4}.get(bits, 8)
        assert block in (16, 32, 64, 128, 256)
        assert whole or group % block == 0
        assert container != 2 or block in (32, 64, 128) or (group % 32 and not whole)
        assert container == 2 or whole or group not in (16, 32, 64, 128, 256) or block == group


def test_layout_of_known_shapes():
    assert native_layout(4, -1, 4096) == (4, 256)
    assert native_layout(4, -1, 100) == (4, 128)
    assert native_layout(4, -1, 20) == (4, 32)
    assert native_layout(2, 256, 4096) == (2, 128)
    assert native_layout(2, 16, 4096) == (2, 16)
    assert native_layout(3, 96, 4096) == (4, 32)
    assert native_layout(8, 512, 4096) == (8, 256)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packed_bytes_are_the_bytes_written(tmp_path, symmetric, dtype):
    for i, (bits, group) in enumerate(itertools.product(range(1, 9), (16, 32, 96, 512, -1))):
        spec = Spec(bits, group, symmetric)
        model = load(linear_model(tmp_path / f"m{i}.onnx", random(200, 9, dtype=dtype)))
        lower(model, Recipe(spec=spec))
        size = sum(v.const_value.nbytes for v in model.ir.graph.initializers.values())
        numbers = sum("uint8" in name for name in model.ir.graph.initializers)  # that all weights share
        assert size == stored_bytes(shapes(200, 9, spec, Storage(dtype, 21))) + numbers


def test_the_runtime_that_is_needed(tmp_path):
    assert [minimum_runtime(b) for b in (1, 2, 3, 4, 5, 8)] == ["1.24", "1.24", "1.20", "1.20", "1.22", "1.22"]
    assert minimum_runtime(8, accuracy_level=0) == "1.23"
    assert minimum_runtime(2, scale_dtype=np.float16) == "1.28"
    path = many(tmp_path / "m.onnx", np.float32, 40, 9, 3)
    assert required_runtime(load(path)) == ""
    cases = [((4, 4, 4), 4, "1.20"), ((4, 8, 4), 4, "1.22"), ((4, 8, 4), 0, "1.23"), ((2, 8, 3), 4, "1.24")]
    for specs, level, version in cases:
        model = load(path)
        lower(model, Recipe(overrides={f"mm{i}": Spec(b, 32) for i, b in enumerate(specs)}), accuracy_level=level)
        assert required_runtime(model) == version


@pytest.mark.parametrize(("symmetric", "level", "version"), [(False, 4, "1.29"), (False, 0, "1.20"), (True, 4, "1.20")])
def test_zero_points_of_int8_products_in_bodies_need_a_newer_runtime(tmp_path, symmetric, level, version):
    """Before 1.29 they are silently wrong when the constants lie outside the body, as they must for sessions."""
    branches = [body("W", f"out{i}", name=f"branch{i}") for i in range(2)]
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        [value("flag", (), BOOL), value("x", (3, 40))],
        [value("y", (3, 9))],
        {"W": random(40, 9)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    lower(model, Recipe(spec=Spec(4, 32, symmetric)), accuracy_level=level)
    assert required_runtime(model) == version
