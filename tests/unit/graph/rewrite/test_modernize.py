"""What is changed of an old model and what is not; tests/acceptance/quantize/test_convert.py runs the results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from onnx_woq.graph.io.model import load
from onnx_woq.graph.rewrite.modernize import modernize
from tests.zoo.nodes import graph, node, random, run, value, write


def test_double_precision_in_bodies_and_of_an_output_that_is_read_on(tmp_path):
    weight, kind = random(40, 8).astype(np.float64), TensorProto.DOUBLE

    def branch(name, op):
        return graph(
            [node("MatMul", ["x", "W"], [f"{name}_h"]), node(op, [f"{name}_h"], [name])], [], [value(name, None, kind)]
        )

    nodes = [
        node("If", ["c"], ["y"], then_branch=branch("a", "Neg"), else_branch=branch("b", "Abs")),
        node("Exp", ["y"], ["z"]),
    ]
    inputs = [value("x", ("b", 40), kind), value("c", (), TensorProto.BOOL)]
    outputs = [value(name, ("b", 8), kind) for name in "yz"]
    model = load(write(tmp_path / "m.onnx", graph(nodes, inputs, outputs, {"W": weight})))
    feed = {"x": random(3, 40).astype(np.float64), "c": np.array(True)}
    wanted = run(model, feed)
    new, (told,) = modernize(model)
    assert "double precision" in told
    constants = [v.const_value for g in new.ir.graphs() for v in g.initializers.values()]
    assert all(one.dtype == ir.DataType.FLOAT for one in constants)
    for found, array in zip(run(new, feed), wanted, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-5)


def test_nothing_is_done_to_a_model_of_today(tmp_path):
    main = graph([node("Add", ["x", "x"], ["y"])], [value("x", (2,))], [value("y", (2,))])
    model = load(write(tmp_path / "m.onnx", main))
    new, done = modernize(model)
    assert new is model
    assert done == []
