"""Statistics are those of the activations themselves, whatever the windows, the padding and the edits on the way."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.errors import DataError, ModelError
from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.graph.rewrite.expose_values import expose
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration import replay as replay_module
from onnx_woq.runtime.calibration.collect import collect_statistics
from onnx_woq.runtime.calibration.windows import CalibrationMemory
from tests.zoo.chains import WEIGHTS, K, chain, chain_inputs, language_model
from tests.zoo.nodes import BOOL, graph, lower_group, node, random, rtn, run, value, write

RAGGED = [{"x": random(1, t, K, seed=t)} for t in (5, 9, 1, 12)]


@pytest.fixture
def chained(tmp_path):
    model = load(chain(tmp_path / "m.onnx"))
    return model, find_linear_groups(model, Recipe())[0]


def flat(arrays):
    return np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays]).astype(np.float64)


def same(stats, x, rtol=1e-4):
    """Whether statistics are those of the tokens `x [T, K]`."""
    assert stats.tokens == len(x)
    np.testing.assert_allclose(stats.gram, x.T @ x, rtol=rtol, atol=rtol * np.abs(x.T @ x).max())
    np.testing.assert_allclose(stats.abs_mean, np.abs(x).mean(0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(stats.abs_max, np.abs(x).max(0), rtol=rtol, atol=rtol)


def test_equal_to_numpy_on_ragged_samples(chained):
    model, groups = chained
    collected = list(collect_statistics(model, groups, RAGGED))
    assert [group for group, _ in collected] == groups
    for group, stats in collected:
        same(stats, flat(chain_inputs(feed["x"])[group.linears[0].weight_name] for feed in RAGGED))


def test_a_weight_used_twice_sums_both_inputs(tmp_path):
    nodes = [
        node("MatMul", ["x", "W"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "W"], ["y"]),
    ]
    w = random(K, K) / 6
    main = graph(nodes, [value("x", ("b", "t", K))], [value("y", ("b", "t", K))], {"W": w})
    model = load(write(tmp_path / "m.onnx", main))
    groups, _ = find_linear_groups(model, Recipe())
    assert len(groups) == 1
    assert len(groups[0].values) == 2
    for sequential in ("off", "block", "tap"):
        ((_, stats),) = collect_statistics(model, groups, RAGGED, sequential=sequential)
        same(stats, flat([*(f["x"] for f in RAGGED), *(np.tanh(f["x"] @ w) for f in RAGGED)]))


def test_taps_with_one_input_and_two_specs_get_the_same_statistics(tmp_path):
    nodes = [node("MatMul", ["x", "A"], ["a"], name="a"), node("MatMul", ["x", "B"], ["b"], name="b")]
    weights = {"A": random(K, 20), "B": random(K, 24)}
    outputs = [value("a", ("b", "t", 20)), value("b", ("b", "t", 24))]
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("b", "t", K))], outputs, weights)))
    groups, _ = find_linear_groups(model, Recipe(overrides={"^b$": Spec(bits=8)}))
    (_, first), (_, second) = collect_statistics(model, groups, RAGGED)
    same(first, flat(f["x"] for f in RAGGED))
    assert np.array_equal(first.gram, second.gram)


@pytest.mark.parametrize("kind", ["b t k", "flattened"])
def test_padded_tokens_do_not_count(kind, tmp_path):
    ids = np.arange(24).reshape(2, 12)
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    nodes = [node("Gather", ["table", "input_ids"], ["h0"]), node("Cast", ["attention_mask"], ["unused"], to=1)]
    if kind == "flattened":
        nodes.append(node("Reshape", ["h0", "shape"], ["h"]))
    else:
        nodes.append(node("Identity", ["h0"], ["h"]))
    nodes.append(node("MatMul", ["h", "W"], ["y"]))
    weights = {"table": random(64, K), "W": random(K, 20), "shape": np.array([-1, K], np.int64)}
    inputs = [value(name, ("b", "t"), 7) for name in ("input_ids", "attention_mask")]
    model = load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y"), value("unused")], weights)))
    groups, _ = find_linear_groups(model, Recipe())
    ((_, stats),) = collect_statistics(model, groups, [{"input_ids": ids, "attention_mask": mask}])
    same(stats, flat([random(64, K)[ids[mask == 1]]]))


@pytest.mark.parametrize(
    ("dtype", "store"),
    [
        (np.float32, "memory"),
        (np.float32, "disk"),
        (np.float32, "nothing"),
        (np.float16, "memory"),
        (np.float16, "disk"),
    ],
)
def test_windows_leave_no_trace(store, dtype, tmp_path, monkeypatch):
    """Bit for bit the same statistics from one window as from one window per tap."""
    model = load(chain(tmp_path / "m.onnx", dtype))
    groups, _ = find_linear_groups(model, Recipe())
    batches = [{"x": f["x"].astype(dtype)} for f in RAGGED]
    whole = list(collect_statistics(model, groups, batches))
    monkeypatch.setattr(replay_module.Replay, "_mode", lambda self, first: store)
    for budget in (0, 20_000):
        assert len(CalibrationMemory.of(model, groups, batches).windows(budget, [[group] for group in groups])) > 1
        for (_, one), (_, other) in zip(
            whole, collect_statistics(model, groups, batches, memory_budget=budget), strict=True
        ):
            assert np.array_equal(one.gram, other.gram)
            assert np.array_equal(one.abs_mean, other.abs_mean)
            assert np.array_equal(one.abs_max, other.abs_max)
            assert one.tokens == other.tokens


def normed(path):
    """Residual blocks with norms that ONNX Runtime, if it may, fuses with the sum before them."""
    nodes, weights, last = [], {"g": 1 + random(K) / 8, "z": random(K, seed=1) / 8}, "x"
    for i in range(4):
        weights |= {f"A{i}": random(K, K, seed=2 * i) / 6, f"B{i}": random(K, K, seed=2 * i + 1) / 6}
        nodes += [
            node("LayerNormalization", [last, "g", "z"], [f"n{i}"]),
            node("MatMul", [f"n{i}", f"A{i}"], [f"a{i}"]),
            node("Relu", [f"a{i}"], [f"r{i}"]),
            node("MatMul", [f"r{i}", f"B{i}"], [f"b{i}"]),
            node("Add", [last, f"b{i}"], [f"s{i}"]),
        ]
        last = f"s{i}"
    return write(path, graph(nodes, [value("x", ("b", "t", K))], [value(last, ("b", "t", K))], weights))


def test_fusions_leave_no_trace(tmp_path):
    model = load(normed(tmp_path / "m.onnx"))
    groups, _ = find_linear_groups(model, Recipe())
    one_by_one = collect_statistics(model, groups, RAGGED, memory_budget=0)
    for (_, one), (_, other) in zip(collect_statistics(model, groups, RAGGED), one_by_one, strict=True):
        assert np.array_equal(one.gram, other.gram)


@pytest.fixture
def products(monkeypatch):
    """The names of the MatMuls in every part that is run."""
    names = []
    make = replay_module.make_session

    def spy(part, **options):
        names.extend(n.name for n in part.ir.graph if n.op_type == "MatMul")
        return make(part, **options)

    monkeypatch.setattr(replay_module, "make_session", spy)
    return names


@pytest.mark.parametrize("sequential", ["off", "tap"])
def test_every_product_is_run_once(sequential, chained, products):
    """Parts start where the last one ended, and nothing behind the last tap is run."""
    model, groups = chained
    budget = 40_000
    for group, _ in collect_statistics(model, groups, RAGGED, memory_budget=budget, sequential=sequential):
        scale(model, group.linears[0].weight_name, 1.1)
    assert sorted(products) == ["a", "b", "c", "d"]


def test_an_edit_to_the_linear_before_costs_that_linear(chained, products):
    """As folding a scale into it does: what it started from is still there."""
    model, groups = chained
    for group, _ in collect_statistics(model, groups, RAGGED, sequential="tap"):
        if before := {"B": "A", "D": "C"}.get(group.linears[0].weight_name):
            scale(model, before, 0.9)
    assert sorted(products) == ["a", "a", "b", "c", "c", "d"]


def test_non_sequential_statistics_are_of_the_model_when_walk_was_called(chained):
    model, groups = chained
    expected = {group.name: stats.gram.copy() for group, stats in collect_statistics(model, groups, RAGGED)}
    walking = collect_statistics(model, groups, RAGGED, memory_budget=0)
    for name in WEIGHTS:
        scale(model, name, 3)
    for group, stats in walking:
        assert np.array_equal(stats.gram, expected[group.name])


def test_sequential_equals_a_computation_by_hand(chained):
    """Each tap sees the earlier ones quantized."""
    model, groups = chained
    weights = dict(WEIGHTS)
    for group, stats in collect_statistics(model, groups, RAGGED, sequential="tap"):
        name = group.linears[0].weight_name
        same(stats, flat(chain_inputs(feed["x"], weights)[name] for feed in RAGGED))
        q = rtn(group)
        lower_group(model, group, q, accuracy_level=0)
        weights[name] = q.dequantize()
    assert np.abs(weights["D"] - WEIGHTS["D"]).max() > 0.01, "the edits were noticeable"


def scale(model, constant, factor):
    """Replaces a constant by a multiple of it; as all edits do, under a new name."""
    graph = model.ir.graph
    held = next(value for name, value in graph.initializers.items() if name.split("~")[0] == constant)
    new = add_initializer(graph, f"{constant}~", np.ascontiguousarray(held.const_value.numpy() * factor))
    held.replace_all_uses_with(new)
    graph.initializers.pop(held.name)


def edits():
    """Edits a consumer could make after it was given each tap, as (constant, factor)."""
    yield "weights", lambda model, group: scale(model, group.linears[0].weight_name, 1.1)
    yield "norm before", lambda model, group: scale(model, "g2" if group.linears[0].weight_name in "CD" else "g1", 0.9)
    yield (
        "linear before",
        lambda model, group: scale(model, {"B": "A", "D": "C"}.get(group.linears[0].weight_name, "E"), 0.8),
    )
    yield "the very first", lambda model, group: scale(model, "A", 1.2)


@pytest.mark.parametrize("edit", dict(edits()))
@pytest.mark.parametrize("budget", [0, 2 << 30])
def test_sequential_statistics_are_of_the_model_as_it_is(edit, budget, chained):
    """Whatever was edited, also far above the tap: the oracle runs the whole edited model."""
    model, groups = chained
    for group, stats in collect_statistics(model, groups, RAGGED, sequential="tap", memory_budget=budget):
        whole, names = expose(model, group.values)
        fetched = [run(whole, feed, [names[group.values[0]]])[0] for feed in RAGGED]
        same(stats, flat(fetched), rtol=1e-5)
        dict(edits())[edit](model, group)


@pytest.mark.parametrize("budget", [0, 2 << 30])
def test_a_norm_that_also_gives_the_residual_sum(budget, tmp_path):
    """Scaling the norm spoils one of its outputs, not the other; scaling the linear then runs the norm again."""
    nodes, weights, last = [], {"z": np.zeros((1, 1, K), np.float32)}, ("x", "z")
    for i in range(3):
        weights |= {
            f"G{i}": random(K, 40, seed=i) / 6,
            f"D{i}": random(40, K, seed=9 + i) / 6,
            f"g{i}": 1 + random(K) / 8,
        }
        nodes += [
            node("Add", [last[1], "zeros"], [f"e{i}"]),
            node(
                "SkipSimplifiedLayerNormalization",
                [last[0], f"e{i}", f"g{i}"],
                [f"n{i}", "", "", f"s{i}"],
                domain="com.microsoft",
            ),
            node("MatMul", [f"n{i}", f"G{i}"], [f"h{i}"]),
            node("Tanh", [f"h{i}"], [f"t{i}"]),
            node("MatMul", [f"t{i}", f"D{i}"], [f"d{i}"]),
        ]
        last = (f"s{i}", f"d{i}")
    nodes.insert(0, node("Sub", ["x", "x"], ["zeros"]))
    main = graph(nodes, [value("x", ("b", "t", K))], [value(last[1], ("b", "t", K))], weights)
    model = load(write(tmp_path / "m.onnx", main, domains={"com.microsoft": 1}))
    groups, _ = find_linear_groups(model, Recipe())
    assert len(groups) == 6
    for group, stats in collect_statistics(model, groups, RAGGED, sequential="tap", memory_budget=budget):
        whole, names = expose(model, group.values)
        same(stats, flat(run(whole, feed, [names[group.values[0]]])[0] for feed in RAGGED), rtol=1e-5)
        kind, block = group.values[0]
        scale(model, f"{'g' if kind == 'n' else 'G'}{block}", 0.9)


def test_an_edit_that_reaches_a_tap_of_the_same_part(tmp_path):
    """Two taps that do not depend on each other, until an edit for the first touches the second's norm."""
    nodes = [
        node("Mul", ["x", "g"], ["n"]),
        node("Tanh", ["x"], ["t"]),
        node("MatMul", ["t", "A"], ["a"]),
        node("MatMul", ["n", "B"], ["b"]),
    ]
    weights = {"g": np.ones(K, np.float32), "A": random(K, K), "B": random(K, K)}
    outputs = [value("a", ("b", "t", K)), value("b", ("b", "t", K))]
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("b", "t", K))], outputs, weights)))
    groups, _ = find_linear_groups(model, Recipe())
    walking = collect_statistics(model, groups, RAGGED, sequential="tap")
    next(walking)
    scale(model, "g", 2)
    _, stats = next(walking)
    same(stats, 2 * flat(f["x"] for f in RAGGED))
    assert next(walking, None) is None


def test_taps_in_the_branches_of_an_if(tmp_path):
    def branch(name, weight):
        nodes = [node("Tanh", ["h"], [f"{name}_t"]), node("MatMul", [f"{name}_t", weight], [f"{name}_out"])]
        return graph(nodes, [], [value(f"{name}_out", ("b", "t", K))], name=name)

    nodes = [
        node("MatMul", ["x", "W"], ["h"]),
        node("If", ["flag"], ["i"], then_branch=branch("then", "A"), else_branch=branch("other", "B")),
        node("MatMul", ["i", "C"], ["y"]),
    ]
    weights = {name: random(K, K, seed=i) / 6 for i, name in enumerate("WABC")}
    inputs = [value("flag", (), BOOL), value("x", ("b", "t", K))]
    model = load(write(tmp_path / "m.onnx", graph(nodes, inputs, [value("y", ("b", "t", K))], weights)))
    groups, _ = find_linear_groups(model, Recipe())
    batches = [feed | {"flag": np.array(i % 2 == 0)} for i, feed in enumerate(RAGGED)]
    for options in ({}, {"memory_budget": 0}, {"sequential": "tap"}, {"sequential": "block"}):
        grams = {
            group.linears[0].weight_name: stats
            for group, stats in collect_statistics(model, groups, batches, **options)
        }
        h = [feed["x"] @ weights["W"] for feed in batches]
        same(grams["A"], flat(np.tanh(one) for one in h[::2]))
        same(grams["B"], flat(np.tanh(one) for one in h[1::2]))
        used = [np.tanh(one) @ weights["AB"[i % 2]] for i, one in enumerate(h)]
        same(grams["C"], flat(used))


def test_a_tap_that_no_sample_reaches(tmp_path, caplog):
    inner = [node("Tanh", ["x"], ["t"]), node("MatMul", ["t", "A"], ["a"])]
    body = graph(inner, [], [value("a", ("t", K))], name="then")
    other = graph([node("Identity", ["x"], ["o"])], [], [value("o", ("t", K))], name="other")
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=body, else_branch=other)],
        [value("flag", (), BOOL), value("x", ("t", K))],
        [value("y", ("t", K))],
        {"A": random(K, K)},
    )
    model = load(write(tmp_path / "m.onnx", main))
    groups, _ = find_linear_groups(model, Recipe())
    ((_, stats),) = collect_statistics(model, groups, [{"flag": np.array(False), "x": random(3, K)}])
    assert stats.tokens == 0
    assert "no sample reaches" in caplog.text


def test_nan_names_the_tensor_and_the_sample(tmp_path):
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Log", ["a"], ["logs"]), node("MatMul", ["logs", "B"], ["y"])]
    main = graph(
        nodes, [value("x", ("t", K))], [value("y", ("t", K))], {"A": np.eye(K, dtype=np.float32), "B": random(K, K)}
    )
    model = load(write(tmp_path / "m.onnx", main))
    groups, _ = find_linear_groups(model, Recipe())
    good = np.ones((3, K), np.float32)
    with pytest.raises(DataError, match=r"logs.*sample 2"):
        list(collect_statistics(model, groups, [{"x": good}, {"x": -good}, {"x": good}]))


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    """Its activations are seen before any solver reads it."""
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Tanh", ["a"], ["t"]), node("MatMul", ["t", "B"], ["y"])]
    weights = {"A": random(K, K), "B": random(K, K)}
    weights["A"][3, 4] = np.nan
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("t", K))], [value("y", ("t", K))], weights)))
    groups, _ = find_linear_groups(model, Recipe())
    with pytest.raises(ModelError, match=r"'A'.*NaN"):
        list(collect_statistics(model, groups, [{"x": random(3, K)}]))


def test_no_samples(chained):
    model, groups = chained
    with pytest.raises(DataError, match="at least one sample"):
        collect_statistics(model, groups, [])


def test_a_sample_the_model_cannot_run(tmp_path):
    model = load(language_model(tmp_path / "m.onnx"))
    groups, _ = find_linear_groups(model, Recipe())
    ids = np.array([[1, 2, 99]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids * 0}
    with pytest.raises(DataError, match=r"sample 1 .*input_ids"):
        list(collect_statistics(model, groups, [feed | {"past_key_values.0.key": np.zeros((1, 1, 0, K), np.float32)}]))


@pytest.mark.parametrize("sequential", ["off", "block", "tap"])
def test_progress_only_grows_and_ends_at_its_total(sequential, chained):
    model, groups = chained
    seen = []
    for group, _ in collect_statistics(
        model, groups, RAGGED, memory_budget=0, sequential=sequential, progress=lambda *step: seen.append(step)
    ):
        if sequential == "tap":
            lower_group(model, group, rtn(group), accuracy_level=0)
    assert len({total for _, total in seen}) == 1
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == len(groups) * len(RAGGED)


def test_the_head_of_the_model_is_not_run(tmp_path):
    """Behind the last tap anything may happen; here it would fail."""
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("Reshape", ["a", "wrong"], ["y"])]
    weights = {"A": random(K, K), "wrong": np.array([7, 11], np.int64)}
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", ("t", K))], [value("y")], weights)))
    groups, _ = find_linear_groups(model, Recipe())
    ((_, stats),) = collect_statistics(model, groups, [{"x": random(5, K)}])
    assert stats.tokens == 5


@pytest.mark.parametrize("half", [False, True])
def test_what_is_expanded_when_a_model_is_loaded_is_expanded_before_a_part_is_run(half, tmp_path, monkeypatch):
    """Sessions for calibration fold nothing; statistics are those of codes that are stored as kernels read them."""
    seen: set[str] = set()
    real = replay_module.make_session

    def spy(model, **how):
        seen.update(n.op_type for n in model.ir.graph.all_nodes())
        return real(model, **how)

    monkeypatch.setattr(replay_module, "make_session", spy)
    grams = []
    for dense in (True, False):
        model = load(chain(tmp_path / f"{dense}.onnx"))
        groups, _ = find_linear_groups(model, Recipe(spec=Spec(3, 16), half_scales=half))
        grams.append([])
        for group, stats in collect_statistics(model, groups, RAGGED, sequential="tap"):
            opset = 21 if dense else 17  # at which codes lie as kernels read them
            lower_group(model, group, rtn(group, half=half), accuracy_level=4, half=half, opset=opset)
            grams[-1].append(stats.gram)
    assert "MatMulNBits" in seen
    assert seen.isdisjoint({"BitShift", "BitwiseXor", "BitwiseAnd", "Concat", "Identity", "Cast"})
    for one, other in zip(*grams, strict=True):
        np.testing.assert_array_equal(one, other)
