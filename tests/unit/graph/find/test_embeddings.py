"""Tables whose rows are gathered: which of them are worth codes, who lends them, and why the others stay float."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.graph.find.embeddings import FLOAT_BY_DEFAULT, SMALLEST_TABLE, find_embeddings
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import FLOAT, INT64, graph, node, random, value, write

ROWS = 2100
FOUR = Recipe(embedding=Spec(4, 32))


def reasons(nodes, inputs, outputs, weights, recipe=FOUR, path=None):
    model = load(write(path, graph(nodes, inputs, outputs, weights)))
    groups, _ = find_linear_groups(model, recipe)
    found, skipped = find_embeddings(model, recipe, groups)
    copies = float_copy_bytes(model, groups, found)
    assert all(skip.op_type == "Gather" and skip.weight_bytes for skip in skipped)
    return [one.weight_name for one in found], [skip.reason for skip in skipped], copies


IDS_IN, ROWS_OUT = value("ids", ["n"], INT64), value("rows", ["n", 64])
GATHER = node("Gather", ["T", "ids"], ["rows"], name="gather")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([node("Add", ["T", "b"], ["y"], name="sum")], "Add 'sum', which stays float, reads the table as well"),
        ([node("MatMul", ["b", "T"], ["y"], name="vector")], "MatMul 'vector', which stays float"),
        ([node("Gather", ["T", "ids"], ["y"], axis=1)], "Gather 'y', which stays float"),
        ([node("Identity", ["T"], ["y"])], "Identity 'y', which stays float"),
    ],
)
def test_a_table_that_others_read_stays_float(tmp_path, more, reason):
    bias = {"T": random(ROWS, 64), "b": random(64) if more[0].op_type == "Add" else random(ROWS)}
    outputs = [ROWS_OUT, value("y")]
    names, why, _ = reasons([GATHER, *more], [IDS_IN], outputs, bias, path=tmp_path / "m.onnx")
    assert names == []
    assert any(reason in one for one in why), why


def test_a_table_whose_head_stays_float_does_so_too(tmp_path):
    head = [node("Transpose", ["T"], ["t"]), node("MatMul", ["x", "t"], ["logits"], name="head")]
    args = [GATHER, *head], [IDS_IN, value("x", ["m", 64])], [ROWS_OUT, value("logits")], {"T": random(ROWS, 64)}
    recipe = Recipe(embedding=Spec(), exclude=("^head$",))
    names, (why,), copies = reasons(*args, recipe, tmp_path / "m.onnx")
    assert (names, why) == ([], "MatMul 'head', which stays float, reads the table as well")
    names, why, copies = reasons(*args, Recipe(), tmp_path / "m.onnx")
    assert (names, why, copies) == ([], [FLOAT_BY_DEFAULT], {"T": ROWS * 256})
    for spec in (Spec(), Spec(8)):
        names, why, copies = reasons(*args, Recipe(embedding=spec), tmp_path / "m.onnx")
        assert (names, why, copies) == (["T"], [], {})


def test_small_tables_and_others_are_no_embeddings(tmp_path):
    rows = SMALLEST_TABLE // 4 // 64
    sizes = {"small": (rows - 1, 64), "large": (rows, 64), "narrow": (2000, 15), "cube": (50, 50, 50)}
    nodes = [node("Gather", [name, "ids"], [f"y_{name}"]) for name in sizes]
    outputs = [value(f"y_{name}") for name in sizes]
    weights = {name: random(*shape) for name, shape in sizes.items()}
    weights["whole"] = np.ones((1000, 64), np.int64)
    nodes.append(node("Gather", ["whole", "ids"], ["y_whole"]))
    names, why, _ = reasons(
        nodes, [IDS_IN], [*outputs, value("y_whole", None, INT64)], weights, path=tmp_path / "m.onnx"
    )
    assert (names, why) == (["large"], ["only 15 columns, fewer than the smallest block (16)"])


def test_what_a_caller_may_override_stays_float(tmp_path):
    given = value("T", [ROWS, 64])
    names, (why,), _ = reasons([GATHER], [IDS_IN, given], [ROWS_OUT], {"T": random(ROWS, 64)}, path=tmp_path / "m.onnx")
    assert names == []
    assert "caller may override" in why


def test_columns_are_picked_from_no_embedding(tmp_path):
    picked = node("Gather", ["T", "ids"], ["rows"], axis=1)
    names, why, _ = reasons([picked], [IDS_IN], [value("rows")], {"T": random(ROWS, 64)}, path=tmp_path / "m.onnx")
    assert (names, why) == ([], ["Gather picks columns of the table, not rows"])


@pytest.mark.parametrize("moves", [[], ["Unsqueeze"], ["Cast", "Unsqueeze"]])
def test_rotary_tables_stay_float(tmp_path, moves):
    """They are factors; a norm, which multiplies rows by what follows from them, and a constant factor are not."""
    nodes, last = [GATHER], "rows"
    for i, op in enumerate(moves):
        extra = {"to": FLOAT} if op == "Cast" else {}
        inputs = [last, "axes"] if op == "Unsqueeze" else [last]
        nodes.append(node(op, inputs, [f"moved{i}"], **extra))
        last = f"moved{i}"
    nodes.append(node("Mul", ["q", last], ["turned"]))
    nodes += [node("Gather", ["E", "ids"], ["token"]), node("Mul", ["token", "eight"], ["scaled"])]
    nodes += [node("Mul", ["scaled", "scaled"], ["square"]), node("ReduceMean", ["square", "axes"], ["mean"])]
    nodes += [node("Sqrt", ["mean"], ["root"]), node("Reciprocal", ["root"], ["inverse"])]
    nodes += [node("Mul", ["scaled", "inverse"], ["normed"])]
    weights = {"T": random(ROWS, 64), "E": random(ROWS, 64), "eight": np.float32(8).reshape(())}
    weights["axes"] = np.array([-1], np.int64)
    inputs = [IDS_IN, value("q", ["n", 64])]
    names, (why,), _ = reasons(nodes, inputs, [value("turned"), value("normed")], weights, path=tmp_path / "m.onnx")
    assert names == ["E"]
    assert "a factor of activations" in why


@pytest.mark.parametrize("first", ["one", "two"])
def test_of_two_heads_the_one_on_the_same_grid_lends_its_codes(tmp_path, first):
    nodes = [node("Gather", ["T", "ids"], ["rows"]), node("Transpose", ["T"], ["turned"])]
    nodes += [node("MatMul", [x, "turned"], [f"y_{x}"], name=x) for x in ("one", "two")]
    inputs = [value("ids", [2, 3], INT64), value("one", ["m", 64]), value("two", ["m", 64])]
    outputs = [value("rows", [2, 3, 64]), value("y_one"), value("y_two")]
    path = write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, {"T": random(ROWS, 64)}))
    recipe = Recipe(embedding=Spec(), overrides={f"^{first}$": Spec(8)})
    model = load(path)
    groups, _ = find_linear_groups(model, recipe)
    (found,), _ = find_embeddings(model, recipe, groups)
    assert (found.shared, found.head.name) == (True, "y_two" if first == "one" else "y_one")


def test_expressions_choose_among_tables(tmp_path):
    nodes = [node("Gather", [f"T{i}", "ids"], [f"y{i}"], name=f"gather{i}") for i in range(3)]
    weights = {f"T{i}": random(ROWS, 64, seed=i) for i in range(3)}
    path = write(tmp_path / "m.onnx", graph(nodes, [IDS_IN], [value(f"y{i}") for i in range(3)], weights))
    recipe = Recipe(embedding=Spec(4), exclude=("gather1",), overrides={"^T2$": Spec(8, 64)})
    model = load(path)
    found, (skipped,) = find_embeddings(model, recipe, find_linear_groups(model, recipe)[0])
    assert [(one.name, one.spec) for one in found] == [("y0", Spec(4)), ("y2", Spec(8, 64))]
    assert (skipped.name, skipped.reason) == ("y1", "excluded by 'gather1'")
    recipe = Recipe(embedding=Spec(4), include=("gather1",), overrides={"T2": None})
    found, skipped = find_embeddings(model, recipe, [])
    assert ([one.name for one in found], len(skipped)) == (["y1"], 2)


@pytest.mark.parametrize(
    ("make", "tied"),
    [
        ([node("Gemm", ["x", "T"], ["y"], transB=1)], True),
        ([node("Transpose", ["T"], ["t"]), node("MatMul", ["x", "t"], ["y"])], True),
        ([node("Transpose", ["T"], ["t"]), node("Gemm", ["x", "t"], ["y"], transB=1)], False),
        ([node("Gemm", ["x", "T"], ["y"])], False),
        ([node("Gemm", ["x", "T"], ["y"], transB=1, alpha=0.5)], False),
    ],
    ids=["Gemm", "Transpose", "both", "neither", "scaled"],
)
def test_a_head_is_the_table_seen_from_the_other_side(make, tied, tmp_path):
    """A square one may be read either way round: then only the way it is read says which it is."""
    table = random(160, 160)
    inputs, outputs = [IDS_IN, value("x", ["m", 160])], [value("rows"), value("y")]
    model = load(write(tmp_path / "m.onnx", graph([GATHER, *make], inputs, outputs, {"T": table})))
    groups, _ = find_linear_groups(model, FOUR)
    (found,), _ = find_embeddings(model, FOUR, groups)
    assert (found.head is not None, found.shared, found.counted) == (tied, tied, True)
    assert (found.k, found.n, found.weight_bytes) == (160, 160, table.nbytes)
    (source,) = found.weight_sources()
    np.testing.assert_array_equal(source.read(), table.T)
