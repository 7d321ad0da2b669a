"""Dividing an activation and multiplying the weight changes nothing: what AWQ rests on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.graph.rewrite.fold_scale import can_fold, divide_input
from onnx_woq.recipe import Recipe
from onnx_woq.targets import matmulnbits
from tests.zoo.nodes import BOOL, FLOAT, FLOAT16, graph, lower, node, pack_group, random, rtn, run, value, write

K, N = 32, 12
SCALE = np.exp(random(K, seed=7) * 0.7)
MICROSOFT = {"com.microsoft": 1}


def block(nodes, weights=None, *, inputs=(), outputs=(), dtype=FLOAT):
    """A graph from `x [m, K]` over `nodes`, which make `v [m, K]`, to the sites `y` and `z`."""
    numpy_type = np.float16 if dtype == FLOAT16 else np.float32
    all_weights = {"W1": random(K, N, seed=1), "W2": random(K, N, seed=2), **(weights or {})}
    linears = [node("MatMul", ["v", "W1"], ["y"], name="site1"), node("MatMul", ["v", "W2"], ["z"], name="site2")]
    return graph(
        [*nodes, *linears],
        [value("x", ("m", K), dtype), *inputs],
        [value("y", ("m", N), dtype), value("z", ("m", N), dtype), *outputs],
        {name: w.astype(numpy_type) if w.dtype == np.float32 else w for name, w in all_weights.items()},
    )


def site_tap(model):
    """The tap of `v`."""
    return next(
        group for group in find_linear_groups(model, Recipe())[0] if "site1" in [s.node_name for s in group.linears]
    )


def multiply_weights(group, scale):
    """Multiplies the rows of every float weight of the tap by the scale."""
    for linear in group.linears:
        weight = linear.view() * scale[:, None]
        weight = (weight.T if linear.transposed() else weight).astype(linear.dtype.numpy())
        linear.node.replace_input_with(1, add_initializer(linear.node.graph, f"{linear.weight_name}_s", weight))


def fold(path, kind, *, feeds=None, scale=SCALE, allow_mul=True, bound=2e-6, prepare=None, dtype=np.float32):
    """Divides the input of the tap of `v` and scales its weights; all outputs must stay. Returns the model."""
    model = load(path)
    if prepare:
        prepare(model)
    feeds = feeds or {"x": random(5, K, seed=3, dtype=dtype)}
    before = run(model, feeds)
    group = site_tap(model)
    assert can_fold(group) == (kind != "mul")
    assert divide_input(group, scale, allow_mul=allow_mul) == kind
    multiply_weights(group, scale)
    for want, got in zip(before, run(model, feeds), strict=True):
        assert np.linalg.norm((got - want).astype(np.float64)) <= bound * np.linalg.norm(want.astype(np.float64))
    muls = [n for n in model.ir.graph.all_nodes() if n.op_type == "Mul" and "scaled" in (n.name or "")]
    assert bool(muls) == (kind == "mul")
    save(model, path.with_name("folded.onnx"), metadata={})
    for want, got in zip(before, run(path.with_name("folded.onnx"), feeds), strict=True):
        assert np.linalg.norm((got - want).astype(np.float64)) <= bound * np.linalg.norm(want.astype(np.float64))
    return model


GAMMA, BETA = np.abs(random(K, seed=4)) + 0.5, random(K, seed=5)

NORMS = {
    "layer norm": [node("LayerNormalization", ["x", "g", "b"], ["v"], axis=-1)],
    "layer norm without bias": [node("LayerNormalization", ["x", "g"], ["v"], axis=-1)],
    "simplified": [node("SimplifiedLayerNormalization", ["x", "g"], ["v"], axis=-1)],
    "RMS norm": [node("RMSNormalization", ["x", "g"], ["v"], axis=-1)],
    "skip": [node("SkipLayerNormalization", ["x", "x", "g", "b"], ["v"], domain="com.microsoft")],
    "skip simplified": [node("SkipSimplifiedLayerNormalization", ["x", "x", "g"], ["v"], domain="com.microsoft")],
    "RMS norm written out": [
        node("Mul", ["x", "x"], ["xx"]),
        node("ReduceMean", ["xx", "last"], ["mean"]),
        node("Sqrt", ["mean"], ["rms"]),
        node("Div", ["x", "rms"], ["normed"]),
        node("Mul", ["g", "normed"], ["v"]),
    ],
    "layer norm written out": [
        node("ReduceMean", ["x", "last"], ["mean"]),
        node("Sub", ["x", "mean"], ["centred"]),
        node("Mul", ["centred", "centred"], ["square"]),
        node("ReduceMean", ["square", "last"], ["variance"]),
        node("Sqrt", ["variance"], ["deviation"]),
        node("Div", ["centred", "deviation"], ["normed"]),
        node("Mul", ["normed", "g"], ["scaled_norm"]),
        node("Add", ["scaled_norm", "b"], ["v"]),
    ],
    "behind identity and shape readers": [
        node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1),
        node("Identity", ["n"], ["v"]),
        node("Shape", ["v"], ["shape"]),
    ],
    "a constant product": [node("Sigmoid", ["x"], ["s"]), node("Mul", ["s", "two"], ["v"])],
    "a constant divisor": [node("Sigmoid", ["x"], ["s"]), node("Div", ["s", "g"], ["v"])],
    "a constant numerator": [node("Exp", ["x"], ["s"]), node("Div", ["g", "s"], ["v"])],
    "a difference from a constant": [node("Mul", ["x", "g"], ["t"]), node("Sub", ["b", "t"], ["v"])],
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS)
def test_norms_and_constants_take_the_scale(tmp_path, case):
    weights = {"g": GAMMA, "b": BETA, "last": np.array([-1], np.int64), "two": np.array(2.0, np.float32)}
    nodes = NORMS[case]
    read = {name for n in nodes for name in n.input}
    used = {name: w for name, w in weights.items() if name in read}
    opset = 23 if case == "RMS norm" else 21
    path = write(tmp_path / "m.onnx", block(nodes, used), opset=opset, domains=MICROSOFT)
    model = fold(path, "norm", allow_mul=False)
    assert "g" not in model.ir.graph.initializers, "the old constant is gone"


def test_skip_norm_keeps_its_residual(tmp_path):
    nodes = [node("SkipSimplifiedLayerNormalization", ["x", "x", "g"], ["v", "", "", "sum"], domain="com.microsoft")]
    main = block(nodes, {"g": GAMMA}, outputs=[value("sum", ("m", K))])
    fold(write(tmp_path / "m.onnx", main, domains=MICROSOFT), "norm")


def test_a_gamma_that_another_norm_reads_is_copied(tmp_path):
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["v"], axis=-1),
        node("LayerNormalization", ["x", "g", "b"], ["w"], axis=-1),
    ]
    main = block(nodes, {"g": GAMMA, "b": BETA}, outputs=[value("w", ("m", K))])
    model = fold(write(tmp_path / "m.onnx", main), "norm")
    np.testing.assert_array_equal(model.ir.graph.initializers["g"].const_value.numpy(), GAMMA)


NEED_MUL = {
    "graph input": [node("Identity", ["x"], ["v"])],
    "activation": [node("Relu", ["x"], ["v"])],
    "residual": [node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1), node("Add", ["n", "x"], ["v"])],
    "square": [node("Mul", ["x", "g"], ["n"]), node("Mul", ["n", "n"], ["v"])],
    "another reader": [node("LayerNormalization", ["x", "g", "b"], ["v"], axis=-1), node("Relu", ["v"], ["r"])],
    "an output": [node("LayerNormalization", ["x", "g", "b"], ["v"], axis=-1)],
    "gamma may be overridden": [node("LayerNormalization", ["x", "over"], ["v"], axis=-1)],
    "second output": [node("TopK", ["x", "k"], ["v", "index"], axis=-1)],
}


@pytest.mark.parametrize("case", NEED_MUL)
def test_everything_else_needs_a_product(tmp_path, case):
    extra = {"another reader": [value("r", ("m", K))], "an output": [value("v", ("m", K))]}.get(case, [])
    inputs = [value("over", (K,))] if "over" in case else []
    weights = {"g": GAMMA, "b": BETA, "over": GAMMA, "k": np.array([K], np.int64)}
    read = {name for n in NEED_MUL[case] for name in n.input}
    used = {name: w for name, w in weights.items() if name in read}
    path = write(tmp_path / "m.onnx", block(NEED_MUL[case], used, inputs=inputs, outputs=extra))
    feeds = {"x": random(5, K, seed=3)} | ({"over": GAMMA} if inputs else {})
    fold(path, "mul", feeds=feeds)
    group = site_tap(load(path))
    with pytest.raises(ValueError, match="cannot be divided"):
        divide_input(group, SCALE, allow_mul=False)


def test_a_tap_fed_by_a_graph_input_directly(tmp_path):
    main = graph(
        [node("MatMul", ["x", "W"], ["y"], name="site1")], [value("x", ("m", K))], [value("y")], {"W": random(K, N)}
    )
    fold(write(tmp_path / "m.onnx", main), "mul")


GATED = [
    node("MatMul", ["x", "G"], ["gate"], name="gate"),
    node("Sigmoid", ["gate"], ["sigmoid"]),
    node("Mul", ["gate", "sigmoid"], ["act"]),
    node("MatMul", ["x", "U"], ["up"], name="up"),
    node("Mul", ["act", "up"], ["v"]),
]
LINEAR = {
    "gate times up": GATED,
    "up times gate": [*GATED[:-1], node("Mul", ["up", "act"], ["v"])],
    "matmul": [node("MatMul", ["x", "U"], ["v"], name="up")],
    "matmul and bias": [node("MatMul", ["x", "U"], ["p"], name="up"), node("Add", ["b", "p"], ["v"])],
    "gemm": [node("Gemm", ["x", "U", "b"], ["v"], name="up", alpha=0.5, beta=2.0)],
    "gemm transposed": [node("Gemm", ["x", "Ut", "b"], ["v"], name="up", transB=1)],
    "gemm with a scalar": [node("Gemm", ["x", "U", "two"], ["v"], name="up")],
    "gemm with a matrix": [node("Gemm", ["x", "U", "M"], ["v"], name="up", beta=2.0)],
}


def lower_all_but_the_tap(model):
    for group in find_linear_groups(model, Recipe(exclude=("^site",)))[0]:
        matmulnbits.lower(model, group, pack_group(group, rtn(group)), accuracy_level=0)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("case", LINEAR)
def test_linear_layers_take_the_scale_once_they_are_quantized(tmp_path, case, lowered):
    weights = {"G": random(K, K, seed=8), "U": random(K, K, seed=9), "Ut": random(K, K, seed=9), "b": BETA}
    weights |= {"two": np.array(2.0, np.float32), "M": random(5, K)}
    read = {name for n in LINEAR[case] for name in n.input}
    path = write(tmp_path / "m.onnx", block(LINEAR[case], {name: w for name, w in weights.items() if name in read}))
    if lowered:
        fold(path, "linear", allow_mul=False, prepare=lower_all_but_the_tap, bound=3e-6)
    else:
        model = fold(path, "mul", bound=3e-6)
        stays = model.ir.graph.initializers["Ut" if "Ut" in read else "U"].const_value.numpy()
        np.testing.assert_array_equal(stays, weights["U"])


def test_scales_of_a_lowered_weight_that_others_share_are_copied(tmp_path):
    nodes = [node("MatMul", ["x", "U"], ["v"], name="up"), node("MatMul", ["x", "U"], ["u2"], name="up2")]
    path = write(tmp_path / "m.onnx", block(nodes, {"U": random(K, K)}, outputs=[value("u2", ("m", K))]))

    fold(path, "linear", prepare=lower_all_but_the_tap)


def test_an_activation_read_inside_a_branch(tmp_path):
    def branch(weight, name):
        return graph([node("MatMul", ["v", weight], [f"{name}_y"], name=name)], [], [value(f"{name}_y")], name=name)

    choice = node("If", ["flag"], ["y"], then_branch=branch("W1", "site1"), else_branch=branch("W2", "site2"))
    main = graph(
        [node("LayerNormalization", ["x", "g"], ["v"], axis=-1), choice],
        [value("x", ("m", K)), value("flag", (), BOOL)],
        [value("y", ("m", N))],
        {"g": GAMMA, "W1": random(K, N), "W2": random(K, N, seed=1)},
    )
    feeds = {"x": random(5, K), "flag": np.array(True)}
    fold(write(tmp_path / "m.onnx", main), "norm", feeds=feeds)


def test_two_activations_of_a_shared_weight(tmp_path):
    main = graph(
        [
            node("LayerNormalization", ["x", "g"], ["v"], axis=-1),
            node("MatMul", ["v", "W"], ["h"], name="site1"),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "W"], ["y"], name="again"),
        ],
        [value("x", ("m", K))],
        [value("y", ("m", K))],
        {"g": GAMMA, "W": random(K, K)},
    )
    fold(write(tmp_path / "m.onnx", main), "mul", bound=1e-5)


@pytest.mark.parametrize(("scale", "kind"), [(SCALE, "norm"), (np.full(K, 1e-5), "mul"), (np.full(K, 1e5), "mul")])
def test_float16_folds_only_what_it_can_hold(tmp_path, scale, kind):
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["v"], axis=-1)]
    path = write(tmp_path / "m.onnx", block(nodes, {"g": GAMMA, "b": BETA}, dtype=FLOAT16))
    group = site_tap(load(path))
    if kind == "norm":
        fold(path, kind, dtype=np.float16, bound=3e-3)
    else:
        with pytest.raises(ValueError, match="cannot be divided"):
            divide_input(group, scale, allow_mul=True)
        assert np.array_equal(load(path).ir.graph.initializers["g"].const_value.numpy(), GAMMA.astype(np.float16))


def test_a_cast_between_norm_and_site(tmp_path):
    nodes = [node("LayerNormalization", ["x32", "g"], ["n"], axis=-1), node("Cast", ["n"], ["v"], to=FLOAT16)]
    main = graph(
        [node("Cast", ["x"], ["x32"], to=FLOAT), *nodes, node("MatMul", ["v", "W"], ["y"], name="site1")],
        [value("x", ("m", K), FLOAT16)],
        [value("y", ("m", N), FLOAT16)],
        {"g": GAMMA, "W": random(K, N, dtype=np.float16)},
    )
    fold(write(tmp_path / "m.onnx", main), "norm", dtype=np.float16, bound=3e-3)


@pytest.mark.parametrize("scale", [np.zeros(K), np.ones(K + 1), np.full(K, np.nan), -np.ones(K)])
def test_unusable_scales(tmp_path, scale):
    path = write(tmp_path / "m.onnx", block(NEED_MUL["activation"]))
    with pytest.raises(ValueError, match="positive finite"):
        divide_input(site_tap(load(path)), scale, allow_mul=True)


def test_folding_and_lowering_a_whole_gated_block(tmp_path):
    """In graph order, each tap scaled and then lowered, the last one folded into the codes of the one before."""
    nodes = [
        node("LayerNormalization", ["in", "g"], ["x"], axis=-1),
        *GATED,
        node("MatMul", ["v", "D"], ["y"], name="site1"),
    ]
    main = graph(
        nodes,
        [value("in", ("m", K))],
        [value("y", ("m", N))],
        {"g": GAMMA, "G": random(K, K, seed=8), "U": random(K, K, seed=9), "D": random(K, N, seed=10)},
    )
    path = write(tmp_path / "m.onnx", main)
    model, feeds = load(path), {"in": random(5, K, seed=3)}
    kinds = []
    for group in find_linear_groups(model, Recipe().with_spec(bits=8, group_size=16))[0]:
        kinds.append(divide_input(group, SCALE, allow_mul=False))
        multiply_weights(group, SCALE)
        matmulnbits.lower(model, group, pack_group(group, rtn(group)), accuracy_level=0)
    assert kinds == ["norm", "linear"]
    want, got = run(path, feeds)[0], run(model, feeds)[0]
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    assert sorted(n.op_type for n in model.ir.graph).count("MatMulNBits") == 3
    assert ir.DataType.FLOAT in {v.dtype for v in model.ir.graph.outputs}
    lower(load(path))
