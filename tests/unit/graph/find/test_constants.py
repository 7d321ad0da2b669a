"""Weights as they are stored: the same numbers as the float32 copy, and no copy where none is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_woq.errors import ModelError
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import BFLOAT16, FLOAT, FLOAT16, graph, linear, node, random, value, write

K, N = 40, 24
TYPES = {FLOAT: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
MAPS = Path("/proc/self/maps")


def one_tap(path):
    (group,), _ = find_linear_groups(load(path), Recipe())
    return group


def stored(weight, kind, how):
    """A weight in a file beside the model, in the model, or in the model as a list of numbers."""
    if how != "list":
        return onnx.numpy_helper.from_array(weight, "W")
    return onnx.helper.make_tensor("W", kind, weight.shape, weight.astype(np.float32))


STEPS = st.lists(st.one_of(st.just("Identity"), st.just("Transpose"), st.sampled_from(sorted(TYPES))), max_size=4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(TYPES)),
    steps=STEPS,
    gemm=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, 0.3]),
    rank=st.sampled_from([2, 3]),
    how=st.sampled_from(["external", "embedded", "list"]),
    columns=st.sampled_from([2, N]),  # below and above the size that stays in the structure
)
def test_parts_are_the_weight(tmp_path, kind, steps, gemm, trans_b, alpha, rank, how, columns):
    gemm = gemm and rank == 2
    current = kind
    turned = steps.count("Transpose") + (gemm and trans_b)
    weight = random(*((K, columns) if turned % 2 == 0 else (columns, K))).astype(TYPES[kind])
    expected, nodes, name = weight, [], "W"
    for i, step in enumerate(steps):
        if step == "Identity":
            nodes.append(node("Identity", [name], [f"w{i}"]))
        elif step == "Transpose":
            perm = [1, 0] if rank == 2 else [0, 2, 1]
            nodes.append(node("Transpose", [name], [f"w{i}"], perm=perm))
            expected = expected.T
        else:
            nodes.append(node("Cast", [name], [f"w{i}"], to=step))
            expected, current = expected.astype(TYPES[step]), step
        name = f"w{i}"
    if gemm:
        nodes.append(node("Gemm", ["x", name], ["y"], transB=int(trans_b), alpha=alpha))
        expected = (expected.T if trans_b else expected).astype(np.float32) * np.float32(alpha)
    else:
        nodes.append(node("MatMul", ["x", name], ["y"]))
    tensor = stored(weight if rank == 2 else weight[None], kind, how)
    shape = ("m", K) if rank == 2 else (1, "m", K)
    main = graph(nodes, [value("x", shape, current)], [value("y", None, current)], {"W": tensor})
    group = one_tap(write(tmp_path / "m.onnx", main, external=how == "external"))
    (part,) = group.weight_sources()
    read = part.read()
    assert (part.name, part.k, part.n) == ("W", K, columns)
    assert read.shape == (K, columns)
    assert read.dtype in [np.dtype(t) for t in TYPES.values()]
    assert not read.flags.writeable
    np.testing.assert_array_equal(read.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(group.weight(), expected.astype(np.float32))
    assert group.weight().flags.writeable


def test_parts_stand_in_the_order_of_the_weight(tmp_path):
    weights = {"A": random(K, 8, seed=1), "B": random(K, 16, seed=2), "C": random(8, K, seed=3)}
    nodes = [node("MatMul", ["x", "A"], ["a"]), node("MatMul", ["x", "B"], ["b"])]
    nodes += [node("MatMul", ["x", "A"], ["again"]), node("Gemm", ["x", "C"], ["c"], transB=1)]
    main = graph(nodes, [value("x", (3, K))], [value(v) for v in ("a", "b", "again", "c")], weights)
    group = one_tap(write(tmp_path / "m.onnx", main))
    assert [part.name for part in group.weight_sources()] == ["A", "B", "C"]
    np.testing.assert_array_equal(
        np.concatenate([part.read() for part in group.weight_sources()], axis=1), group.weight()
    )


def is_mapped(path):
    return str(path) in MAPS.read_text()


@pytest.mark.skipif(not MAPS.exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("chain", ["none", "Transpose", "Cast to float32", "transB"])
@pytest.mark.parametrize("external", [False, True])
def test_a_part_is_a_map_of_the_file_as_long_as_someone_holds_it(tmp_path, kind, chain, external):
    weight = random(K, 64).astype(TYPES[kind])
    kept, taken = (weight, "W") if chain in ("none", "Cast to float32") else (weight.T.copy(), "W")
    nodes, dtype = [], kind
    if chain == "Transpose":
        nodes, taken = [node("Transpose", ["W"], ["t"])], "t"
    elif chain == "Cast to float32":
        nodes, taken, dtype = [node("Cast", ["W"], ["t"], to=FLOAT)], "t", FLOAT
    product = node("Gemm", ["x", taken], ["y"], transB=1) if chain == "transB" else node("MatMul", ["x", taken], ["y"])
    main = graph([*nodes, product], [value("x", (3, K), dtype)], [value("y", None, dtype)], {"W": kept})
    path = write(tmp_path / "m.onnx", main, external=external)
    file = tmp_path / "m.onnx.data" if external else path
    group = one_tap(path)
    assert not is_mapped(file)
    read = group.weight_sources()[0].read()
    assert read.dtype == TYPES[kind]
    assert is_mapped(file)
    column = read[:, 3]
    del read
    np.testing.assert_array_equal(column, weight[:, 3])
    del column
    assert not is_mapped(file)
    group.check()
    group.weight()
    assert not is_mapped(file)


def test_a_weight_in_memory_is_not_copied_and_not_writable(tmp_path):
    tensor = onnx.helper.make_tensor("W", FLOAT, (K, 64), random(K, 64))
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", (3, K))], [value("y")], {"W": tensor})
    model = load(write(tmp_path / "m.onnx", main))
    (group,), _ = find_linear_groups(model, Recipe())
    read = group.weight_sources()[0].read()
    held = resolve(model.ir.graph.initializers["W"]).tensor.numpy()
    assert np.shares_memory(read, held)
    with pytest.raises(ValueError, match="read-only"):
        read[0, 0] = 1
    held[0, 0] = 1  # others may still


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (K - 1, 8199), (17, 4000)])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(tmp_path, kind, turned, bad, place):
    weight = np.full((K, 8200), np.finfo(np.float16).max, TYPES[kind])
    weight[::2] *= -1
    weight[3] = 0
    stored_weight = weight.T.copy() if turned else weight
    product = node("Gemm", ["x", "W"], ["y"], transB=1) if turned else node("MatMul", ["x", "W"], ["y"])
    for broken in (False, True):
        if broken:
            stored_weight[place[::-1] if turned else place] = bad
        main = graph([product], [value("x", (3, K), kind)], [value("y", None, kind)], {"W": stored_weight})
        group = one_tap(write(tmp_path / "m.onnx", main))
        if not broken:
            group.check()
            continue
        for read in (group.check, group.weight):
            with pytest.raises(ModelError, match="'W' of 'y' has NaN or infinite"):
                read()
        assert not np.isfinite(group.weight_sources()[0].read()[place]), "a part says what is there"


def test_a_file_that_went_away(tmp_path):
    path = linear(tmp_path / "m.onnx", random(K, 64), external=True)
    group = one_tap(path)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match="weight 'W' cannot be read"):
        group.weight_sources()[0].read()


def test_threads_read_one_weight_at_the_same_time(tmp_path):
    weight = random(K, 640)
    group = one_tap(linear(tmp_path / "m.onnx", weight, external=True))
    with ThreadPoolExecutor(8) as pool:
        sums = list(
            pool.map(lambda _: float(group.weight().sum()) + float(group.weight_sources()[0].read()[0, 0]), range(400))
        )
    assert set(sums) == {float(weight.sum()) + float(weight[0, 0])}
