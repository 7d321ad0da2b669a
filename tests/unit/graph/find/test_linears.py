"""What is found, how it is grouped, and the reason given for everything else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.errors import ModelError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import BOOL, FLOAT, FLOAT16, INT64, graph, node, random, value, write
from tests.zoo.nodes import linear as linear_model

W = random(40, 40)
X = [value("x", ("m", 40))]


def model(tmp_path, nodes, outputs, weights=None, *, inputs=X, inner=(), opset=21):
    main = graph(
        nodes, inputs, [o if isinstance(o, onnx.ValueInfoProto) else value(o) for o in outputs], weights, inner
    )
    return load(write(tmp_path / "m.onnx", main, opset=opset))


def attention(tmp_path):
    """A block whose sites and products are all of the kinds a transformer has."""
    nodes = [
        node("MatMul", ["x", "Q"], ["q"], name="q_proj"),
        node("MatMul", ["x", "K"], ["k"], name="k_proj"),
        node("MatMul", ["x", "V"], ["v"], name="v_proj"),
        node("Transpose", ["k"], ["kt"], perm=[1, 0]),
        node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        node("Softmax", ["scores"], ["p"]),
        node("MatMul", ["p", "v"], ["mixed"], name="mix"),
        node("MatMul", ["mixed", "O"], ["o"], name="o_proj"),
        node("MatMul", ["o", "H"], ["logits"], name="lm_head"),
    ]
    weights = {"Q": random(40, 30, seed=1), "K": random(40, 30, seed=2), "V": random(40, 40, seed=3)}
    return model(tmp_path, nodes, ["logits"], weights | {"O": W, "H": random(40, 50)})


def names(groups):
    return [[linear.node_name for linear in group.linears] for group in groups]


def test_siblings_form_one_tap_and_products_of_two_activations_are_listed(tmp_path):
    groups, skipped = find_linear_groups(attention(tmp_path), Recipe())
    assert names(groups) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["lm_head"]]
    assert [group.values for group in groups] == [("x",), ("mixed",), ("o",)]
    assert [group.name for group in groups] == ["q", "o", "logits"]
    assert [(group.k, group.n) for group in groups] == [(40, 100), (40, 40), (40, 50)]
    assert [group.weight_bytes for group in groups] == [40 * 100 * 4, 40 * 40 * 4, 40 * 50 * 4]
    assert [(s.name, s.node_name, s.reason, s.weight_bytes) for s in skipped] == [
        ("scores", "scores", "both inputs are computed", 0),
        ("mixed", "mix", "both inputs are computed", 0),
    ]


def test_weights_stand_side_by_side(tmp_path):
    groups, _ = find_linear_groups(attention(tmp_path), Recipe())
    weight = groups[0].weight()
    assert weight.shape == (40, 100)
    for linear, columns in groups[0].slices():
        np.testing.assert_array_equal(
            weight[:, columns], random(40, linear.n, seed={"Q": 1, "K": 2, "V": 3}[linear.weight_name])
        )


def test_specs_by_expression_split_a_tap(tmp_path):
    eight = Spec(8, 32)
    recipe = Recipe(overrides={"k_proj": eight, "^o$": None, "^H$": Spec(2, 64)})
    groups, skipped = find_linear_groups(attention(tmp_path), recipe)
    assert names(groups) == [["q_proj", "v_proj"], ["k_proj"], ["lm_head"]]
    assert [group.spec.bits for group in groups] == [4, 8, 2]
    assert ("o_proj", "left float by an override", 6400) in [(s.node_name, s.reason, s.weight_bytes) for s in skipped]


def test_include_and_exclude(tmp_path):
    groups, skipped = find_linear_groups(attention(tmp_path), Recipe(include=("proj",), exclude=("^v_",)))
    assert names(groups) == [["q_proj", "k_proj"], ["o_proj"]]
    reasons = {s.node_name: s.reason for s in skipped}
    assert reasons["v_proj"] == "excluded by '^v_'"
    assert reasons["lm_head"] == "not named by --include"


def heads(model):
    _, skipped = find_linear_groups(model, Recipe(lm_head=False))
    return {s.node_name for s in skipped if s.reason == "the last MatMul, left float by the recipe"}


def test_the_head_is_the_site_behind_the_first_float_output(tmp_path):
    assert heads(attention(tmp_path)) == {"lm_head"}
    nodes = [
        node("MatMul", ["x", "A"], ["h"], name="body"),
        node("MatMul", ["h", "B"], ["p"], name="head"),
        node("Add", ["p", "b"], ["s"]),
        node("Reshape", ["s", "shape"], ["r"]),
        node("Div", ["r", "c"], ["d"]),
        node("Tanh", ["d"], ["t"]),
        node("Mul", ["c", "t"], ["logits"]),
        node("ArgMax", ["logits"], ["best"]),
        node("MatMul", ["h", "C"], ["other"], name="later"),
    ]
    weights = {"A": W, "B": W, "C": W, "b": random(40), "shape": np.array([1, -1, 40]), "c": np.float32([30.0])[0]}
    outputs = [value("best", None, INT64), value("logits", None, FLOAT), value("other", None, FLOAT)]
    assert heads(model(tmp_path, nodes, outputs, weights)) == {"head"}


def test_both_branches_have_a_head(tmp_path):
    def branch(name):
        nodes = [
            node("MatMul", ["x", "W"], [f"{name}_h"], name=f"{name}_body"),
            node("Relu", [f"{name}_h"], [f"{name}_r"]),
        ]
        nodes += [node("MatMul", [f"{name}_r", "V"], [f"{name}_y"], name=f"{name}_head")]
        return graph(nodes, [], [value(f"{name}_y")], name=name)

    choice = node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    inputs = [*X, value("flag", (), BOOL)]
    assert heads(model(tmp_path, [choice], ["y"], {"W": W, "V": random(40, 40)}, inputs=inputs)) == {"a_head", "b_head"}


def test_without_a_head_it_is_the_last_site(tmp_path):
    nodes = [
        node("MatMul", ["x", "W"], ["h"], name="first"),
        node("MatMul", ["h", "V"], ["g"], name="last"),
        node("Add", ["g", "x"], ["s"]),
        node("LayerNormalization", ["s", "gamma"], ["y"]),
    ]
    assert heads(model(tmp_path, nodes, ["y"], {"W": W, "V": random(40, 40), "gamma": random(40)})) == {"last"}


@pytest.mark.parametrize(
    ("shape", "rank", "found"),
    [
        ((1, 40, 9), 3, True),
        ((1, 40, 9), 4, True),
        ((1, 1, 40, 9), 4, True),
        ((1, 40, 9), 2, False),
        ((2, 40, 9), 3, False),
    ],
)
def test_stacked_weights(tmp_path, shape, rank, found):
    inputs = [value("x", (*range(2, rank + 1), 40))]
    m = model(tmp_path, [node("MatMul", ["x", "W"], ["y"])], ["y"], {"W": random(*shape)}, inputs=inputs)
    groups, skipped = find_linear_groups(m, Recipe())
    assert len(groups) == found
    assert len(skipped) == (not found)
    if found:
        assert groups[0].weight().shape == (40, 9)


def test_the_rank_of_an_inner_value_is_inferred(tmp_path):
    nodes = [node("Relu", ["x"], ["h"]), node("MatMul", ["h", "W"], ["y"])]
    three = [value("x", (2, 3, 40))]
    assert find_linear_groups(model(tmp_path, nodes, ["y"], {"W": random(1, 40, 9)}, inputs=three), Recipe())[0]
    unknown = [node("MyOp", ["x"], ["h"], domain="mine"), nodes[1]]
    main = graph(unknown, three, [value("y")], {"W": random(1, 40, 9)})
    path = write(tmp_path / "u.onnx", main, domains={"mine": 1})
    _, (skipped,) = find_linear_groups(load(path), Recipe())
    assert "not known to have as many" in skipped.reason


SKIPS = {
    "left factor": ([node("MatMul", ["W", "x"], ["y"])], "the constant is the left factor"),
    "both constant": ([node("MatMul", ["W", "W"], ["y"])], "both inputs are constant"),
    "vector": ([node("MatMul", ["x", "v"], ["y"])], "the weight is a vector"),
    "narrow": ([node("MatMul", ["n", "W8"], ["y"])], "only 8 input channels, fewer than the smallest block (16)"),
    "transA": ([node("Gemm", ["x", "O", "b"], ["y"], transA=1)], "the weight is also a graph input"),
    "integers": ([node("MatMul", ["ix", "I"], ["y"])], "the weight is int32, not float32, float16 or bfloat16"),
    "doubles": ([node("MatMul", ["dx", "D"], ["y"])], "the weight is double, not float32, float16 or bfloat16"),
    "cast integers": ([node("Cast", ["I"], ["w"], to=FLOAT), node("MatMul", ["x", "w"], ["y"])], "the weight is int32"),
    "override": ([node("MatMul", ["x", "O"], ["y"])], "the weight is also a graph input, which a caller may override"),
    "random weight": (
        [node("RandomNormalLike", ["W"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
        "both inputs are computed",
    ),
    "computed stack": (
        [node("Transpose", ["S"], ["s"]), node("MatMul", ["x", "s"], ["y"])],
        "a stack of matrices [3, 40, 2]",
    ),
    "fused": ([node("FusedMatMul", ["x", "W"], ["y"], domain="com.microsoft", transA=1)], "FusedMatMul of this form"),
}


@pytest.mark.parametrize("case", SKIPS)
def test_every_other_product_is_listed_with_its_reason(tmp_path, case):
    nodes, reason = SKIPS[case]
    weights = {
        "W": W, "v": random(40), "W8": random(8, 40), "I": np.ones((40, 40), np.int32), "D": np.ones((40, 40)),
        "b": random(40), "O": W, "S": random(2, 40, 3),
    }  # fmt: skip
    extra = [value("n", ("m", 8)), value("O", (40, 40)), value("ix", (40, 40), 6), value("dx", (40, 40), 11)]
    read = {name for n in nodes for name in n.input}
    inputs = [value("x", (40, 40)), *(v for v in extra if v.name in read)]
    main = graph(nodes, inputs, [value("y")], {name: w for name, w in weights.items() if name in read})
    m = load(write(tmp_path / "m.onnx", main, domains={"com.microsoft": 1}))
    groups, (skipped,) = find_linear_groups(m, Recipe())
    assert groups == []
    assert reason in skipped.reason
    assert skipped.name == "y"
    assert skipped.op_type == nodes[-1].op_type
    assert bool(skipped.weight_bytes) == (case != "random weight")


def test_convolutions_and_embeddings_are_not_products(tmp_path):
    nodes = [node("Gather", ["E", "i"], ["e"]), node("MatMul", ["e", "W"], ["y"])]
    m = model(tmp_path, nodes, ["y"], {"E": random(7, 40), "W": W}, inputs=[value("i", (3,), INT64)])
    groups, skipped = find_linear_groups(m, Recipe())
    assert len(groups) == 1
    assert skipped == []


def test_unnamed_nodes_are_known_by_their_output(tmp_path):
    path = linear_model(tmp_path / "m.onnx", W, name="")
    groups, _ = find_linear_groups(load(path), Recipe(include=("^y$",)))
    assert groups[0].linears[0].name == "y"


def test_sites_that_share_a_weight_share_a_tap_and_its_columns(tmp_path):
    nodes = [
        node("MatMul", ["x", "W"], ["a"], name="a"),
        node("MatMul", ["x", "V"], ["b"], name="b"),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "W"], ["c"], name="c"),
        node("MatMul", ["r", "U"], ["d"], name="d"),
        node("MatMul", ["b", "T"], ["e"], name="e"),
    ]
    weights = {name: random(40, 40, seed=i) for i, name in enumerate("WVUT")}
    m = model(tmp_path, nodes, ["c", "d", "e"], weights)
    groups, _ = find_linear_groups(m, Recipe())
    assert names(groups) == [["a", "b", "c", "d"], ["e"]]
    assert groups[0].values == ("x", "r")
    assert groups[0].n == 120
    assert groups[0].weight().shape == (40, 120)
    places = {linear.node_name: (s.start, s.stop) for linear, s in groups[0].slices()}
    assert places == {"a": (0, 40), "b": (40, 80), "c": (0, 40), "d": (80, 120)}
    split, _ = find_linear_groups(m, Recipe(overrides={"^c$": Spec(8, 32)}))
    assert names(split) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_the_same_constant_used_both_ways_round_is_two_weights(tmp_path):
    nodes = [
        node("Transpose", ["W"], ["Wt"], perm=[1, 0]),
        node("MatMul", ["x", "W"], ["a"]),
        node("MatMul", ["x", "Wt"], ["b"]),
        node("Gemm", ["x", "W"], ["c"], transB=1, alpha=2.0),
        node("Transpose", ["Wt"], ["Wtt"], perm=[1, 0]),
        node("MatMul", ["x", "Wtt"], ["d"]),
    ]
    m = model(tmp_path, nodes, ["a", "b", "c", "d"], {"W": W})
    (group,), _ = find_linear_groups(m, Recipe())
    weight = group.weight()
    np.testing.assert_array_equal(weight, np.concatenate([W, W.T, 2 * W.T], axis=1))
    assert [(s.start, s.stop) for _, s in group.slices()] == [(0, 40), (40, 80), (80, 120), (0, 40)]
    assert group.weight_bytes == W.nbytes


def test_a_cast_that_narrows_is_applied(tmp_path):
    nodes = [
        node("Cast", ["W"], ["h"], to=FLOAT16),
        node("Cast", ["h"], ["w"], to=FLOAT),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    (group,), _ = find_linear_groups(model(tmp_path, nodes, ["y"], {"W": W}), Recipe())
    np.testing.assert_array_equal(group.weight(), W.astype(np.float16).astype(np.float32))


def test_a_cast_that_overflows_makes_the_weight_unusable_without_a_warning(tmp_path):
    nodes = [node("Cast", ["W"], ["h"], to=FLOAT16), node("Cast", ["h"], ["w"], to=FLOAT)]
    nodes += [node("MatMul", ["x", "w"], ["y"])]
    (group,), _ = find_linear_groups(model(tmp_path, nodes, ["y"], {"W": W * 1e6}), Recipe())
    with pytest.raises(ModelError, match="infinite"):
        group.weight()


def test_someone_looking_at_a_weight_does_not_stop_anyone_from_reading_it(tmp_path):
    m = load(linear_model(tmp_path / "m.onnx", W, external=True))
    tensor = m.ir.graph.initializers["W"].const_value
    view = tensor.numpy()
    (group,), _ = find_linear_groups(m, Recipe())
    for _ in range(2):
        np.testing.assert_array_equal(group.weight(), W)
    np.testing.assert_array_equal(view, W)
    np.testing.assert_array_equal(tensor.numpy(), W)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, bad):
    weight = W.copy()
    weight[3, 4] = bad
    (group,), _ = find_linear_groups(load(linear_model(tmp_path / "m.onnx", weight)), Recipe())
    for read in (group.weight, group.check):
        with pytest.raises(ModelError, match="'W' of 'mm' has NaN or infinite"):
            read()


def test_weight_is_a_copy(tmp_path):
    (group,), _ = find_linear_groups(load(linear_model(tmp_path / "m.onnx", W, external=True)), Recipe())
    first = group.weight()
    first[:] = 0
    np.testing.assert_array_equal(group.weight(), W)
    assert group.weight().flags.c_contiguous


def test_bodies_come_where_their_node_stands(tmp_path):
    def branch(name):
        return graph([node("MatMul", ["h", "W"], [f"{name}_y"], name=name)], [], [value(f"{name}_y")], name=name)

    nodes = [
        node("MatMul", ["x", "A"], ["h"], name="before"),
        node("If", ["flag"], ["g"], then_branch=branch("then"), else_branch=branch("else")),
        node("MatMul", ["g", "B"], ["y"], name="after"),
    ]
    weights = {"A": W, "W": random(40, 40), "B": random(40, 40, seed=1)}
    groups, _ = find_linear_groups(
        model(tmp_path, nodes, ["y"], weights, inputs=[*X, value("flag", (), BOOL)]), Recipe()
    )
    assert [sorted(t) for t in names(groups)] == [["before"], ["else", "then"], ["after"]]
