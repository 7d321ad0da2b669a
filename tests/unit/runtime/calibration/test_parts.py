"""Parts of a model compute what the model computes there, in float32, from no more than they need."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_woq.graph.io.model import load, serialize
from onnx_woq.runtime.calibration.parts import cut_out, plan_part, single_precision
from onnx_woq.runtime.calibration.structure import Structure
from tests.zoo.chains import K, chain, chain_inputs
from tests.zoo.nodes import BFLOAT16, graph, node, random, run, value, write

X = random(1, 6, K, seed=3)
VALUES = {"n1": "A", "ta": "B", "n2": "C", "tc": "D", "s": "E"}
WANT = {name: chain_inputs(X)[weight] for name, weight in VALUES.items()}


def planned(model, values, remembered=(), dtypes=None, *, keep_used=False, attention=()):
    dtypes = {name: np.dtype(np.float32) for name in dtypes or ()}
    return plan_part(model, Structure(model), values, remembered, dtypes, {"x"}, keep_used, attention)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_part_computes_what_the_model_computes_there(dtype, tmp_path):
    model = load(chain(tmp_path / "m.onnx", dtype))
    before = serialize(model)
    part, inputs = cut_out(model, Structure(model), {"x", "n2"}, ["tc", "n1"], {"n2": np.dtype(np.float32)})
    assert set(inputs) == {"x", "n2"}
    found = dict(zip(["tc", "n1"], run(part, {"x": X, "n2": WANT["n2"].astype(np.float32)}), strict=True))
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, WANT[name], rtol=2e-3, atol=2e-3)
    assert serialize(model) == before


def test_what_is_known_already_takes_no_part(tmp_path):
    model = load(chain(tmp_path / "m.onnx"))
    part = planned(model, ["n2"], ["n2", "r"], ["n2"])
    assert (part.model, part.inputs, part.outputs) != (None, (), ()), "r is not known"
    part = planned(model, ["n2"], ["n2"], ["n2"])
    assert (part.model, part.inputs, part.outputs) == (None, (), ())
    assert (part.names, part.remembered) == ({"n2": "n2"}, ("n2",))


@pytest.mark.parametrize("keep_used", [False, True])
def test_what_a_part_starts_from_is_kept_where_it_is_asked_for(keep_used, tmp_path):
    model = load(chain(tmp_path / "m.onnx"))
    part = planned(model, ["tc"], ["r"], ["n2", "r"], keep_used=keep_used)
    assert (part.inputs, part.outputs) == (("n2",), ("tc",))
    assert part.remembered == (("r", "n2") if keep_used else ("r",))


def test_inputs_of_the_model_are_not_remembered(tmp_path):
    part = planned(load(chain(tmp_path / "m.onnx")), ["n1"], ["x", "n1"])
    assert (part.inputs, part.outputs, part.remembered) == (("x",), ("n1",), ("n1",))


def test_values_in_bodies_come_out_as_tokens(tmp_path):
    bodies = [
        graph([node(op, ["x"], [op]), node("Neg", [op], [f"{op}_y"])], [], [value(f"{op}_y")],
              inner=[value(op, (2, 3, K))])
        for op in ("Exp", "Abs")
    ]  # fmt: skip
    nodes = [node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])]
    main = graph(nodes, [value("x", (2, 3, K)), value("flag", [], 9)], [value("y")])
    model, x = load(write(tmp_path / "m.onnx", main)), random(2, 3, K)
    part = plan_part(model, Structure(model), ["Abs"], [], {}, {"x", "flag"}, False, ())
    (found,) = run(part.model, {"x": x, "flag": np.array(False)}, list(part.outputs))
    assert part.names == {"Abs": part.outputs[0]}
    np.testing.assert_array_equal(found, np.abs(x).reshape(-1, K))


def test_of_attention_the_squares_are_fetched_unless_it_is_remembered(tmp_path):
    nodes = [node("Softmax", ["x"], ["p"], axis=-1), node("Neg", ["p"], ["y"])]
    model = load(write(tmp_path / "m.onnx", graph(nodes, [value("x", (1, 2, 3, 3))], [value("y", (1, 2, 3, 3))])))
    part = planned(model, ["p"], attention=["p"])
    assert (part.names, part.outputs) == ({"p": "p_squares"}, ("p_squares",))
    part = planned(model, ["p"], ["p"], attention=["p"])
    assert (part.names, part.outputs) == ({"p": "p"}, ("p",))


@pytest.mark.parametrize(
    ("dtype", "wide"), [("float16", "float32"), ("float32", "float32"), ("int64", "int64"), ("bool", "bool")]
)
def test_only_half_precision_is_widened(dtype, wide):
    array = np.ones(3, dtype)
    assert single_precision(array).dtype == wide
    assert (single_precision(array) is array) == (dtype == wide)


def test_brain_floats_are_half_precision(tmp_path):
    main = graph([node("Identity", ["x"], ["y"])], [value("x", (2,), BFLOAT16)], [value("y", (2,), BFLOAT16)])
    brain = load(write(tmp_path / "m.onnx", main)).ir.graph.inputs[0].type.dtype.numpy()
    assert single_precision(np.ones(2, brain)).dtype == np.float32
