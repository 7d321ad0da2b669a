"""A newer opset: the same numbers and names, weights where they were, and a refusal that says what to do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_woq.errors import ModelError
from onnx_woq.graph.io.model import load, memory_tensors, serialize
from onnx_woq.graph.rewrite.raise_opset import raise_opset
from tests.zoo import architectures as arch
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, node, random, run, value, write


@pytest.mark.parametrize("external", ["", "weights.data"])
def test_it_computes_the_same_under_the_same_names(external, tmp_path):
    model = load(zoo.language_model(tmp_path / "m.onnx", opset=13, external=external))
    before = serialize(model)
    raised = raise_opset(model, 21)
    assert (raised.ir.opset_imports[""], model.ir.opset_imports[""]) == (21, 13)
    assert serialize(model) == before, "the model itself stays as it is"
    (feed,) = zoo.lm_feeds(zoo.token_ids(1))
    np.testing.assert_allclose(run(raised, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-5)
    kept = {n.name for n in model.ir.graph if n.op_type == "MatMul"}
    assert kept <= {n.name for n in raised.ir.graph}
    assert [v.name for v in raised.ir.graph.outputs] == ["logits"]
    assert raised.files == model.files


def test_weights_are_shared_and_not_copied(tmp_path):
    model = load(zoo.encoder(tmp_path / "m.onnx", external="weights.data"))
    raised = raise_opset(model, 21)
    assert memory_tensors(raised) == {}
    large = [v for v in raised.ir.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert len(large) == 4
    assert all(v.const_value is model.ir.graph.initializers[v.name].const_value for v in large)


def test_operators_that_the_converter_does_not_know_are_left_alone(tmp_path):
    """ONNX Runtime has some in ONNX's own domain, and others in one of its own."""
    model = load(arch.fused_decoder(tmp_path / "m.onnx", layers=1))
    raised = raise_opset(model, 21)
    count = lambda m: sorted((n.domain, n.op_type) for n in m.ir.graph if "Norm" in n.op_type or n.domain)  # noqa: E731
    assert count(raised) == count(model)
    assert {"SimplifiedLayerNormalization", "GroupQueryAttention"} <= {op for _, op in count(raised)}
    assert all("aside" not in domain for domain in raised.ir.opset_imports)


def twice(path):
    """y = 2·x by a function of the model's own, which loading leaves a function: it has no product."""
    body = [node("Add", ["a", "a"], ["r"])]
    made = onnx.helper.make_function("local", "Twice", ["a"], ["r"], body, [onnx.helper.make_opsetid("", 17)])
    main = graph([node("Twice", ["x"], ["y"], domain="local")], [value("x", (1, 2, 48))], [value("y", (1, 2, 48))])
    return write(path, main, opset=17, functions=[made], domains={"local": 1})


def test_functions_are_written_out_and_bodies_are_raised_too(tmp_path):
    x = random(1, 2, 48)
    for build, feed in ((twice, {"x": x}), (zoo.branches, {"x": x, "flag": np.array(False)})):
        model = load(build(tmp_path / "m.onnx"))
        assert bool(model.ir.functions) == (build is twice)
        raised = raise_opset(model, 20)
        assert not raised.ir.functions
        np.testing.assert_allclose(run(raised, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-5)


def test_metadata_of_nodes_and_the_format_of_the_file_follow(tmp_path):
    model = load(zoo.encoder(tmp_path / "m.onnx", opset=13))
    first = next(n for n in model.ir.graph if n.name == "node/first")
    first.metadata_props["where"] = "kept"
    raised = raise_opset(model, 23)
    assert next(n for n in raised.ir.graph if n.name == "node/first").metadata_props == {"where": "kept"}
    assert raised.ir.ir_version >= onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", 23)])


def test_what_cannot_be_converted_is_refused_with_a_way_out(tmp_path):
    norm = node("GroupNormalization", ["x", "s", "s"], ["y"], num_groups=2)
    main = graph([norm], [value("x", (1, 4, 3))], [value("y", (1, 4, 3))], {"s": random(2)})
    model = load(write(tmp_path / "m.onnx", main, opset=18))
    with pytest.raises(
        ModelError, match=r"opset 21.*GroupNormalization.*export it with opset 21.*--target matmulnbits"
    ):
        raise_opset(model, 21, otherwise="choose --target matmulnbits")
