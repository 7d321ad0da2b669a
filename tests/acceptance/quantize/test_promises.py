"""What `inspect` promises, `quantize` does, on every model of the zoo: rows, targets, float nodes, copies, bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect, quantize
from onnx_woq.errors import NothingToQuantize
from tests.zoo import architectures as arch
from tests.zoo import generation
from tests.zoo import small as zoo

F16, BF16 = zoo.F16, zoo.BF16
MODELS = {
    "decoder 13": partial(arch.decoder, opset=13),
    "decoder 20": partial(arch.decoder, opset=20),
    "tied decoder": partial(arch.decoder, tied=True),
    "float16 decoder": partial(arch.decoder, dtype=F16),
    "bfloat16 decoder": partial(arch.decoder, dtype=BF16),
    "merged decoder": arch.merged_decoder,
    "fused decoder": arch.fused_decoder,
    "bert": arch.bert,
    "cross decoder": arch.cross_decoder,
    "loop between": arch.loop_between,
    "funnel": arch.funnel,
    "tangle": arch.tangle,
    "language model": zoo.language_model,
    "tied language model": partial(zoo.language_model, tied=True),
    "encoder": zoo.encoder,
    "chain": zoo.chain,
    "gemms": zoo.gemms,
    "constants": zoo.constants,
    "branches": zoo.branches,
    "loop": zoo.loop,
    "functions": zoo.functions,
    "leftovers": zoo.leftovers,
    "generation": generation.greedy_search,
}
TABLES = Spec(4, 32)
RECIPES = {
    "rtn": Recipe("rtn"),
    "3 bits and tables": Recipe("rtn", Spec(3, 32), embedding=TABLES, half_scales=True),
    "hqq per channel": Recipe("hqq", Spec(8, -1, symmetric=True), lm_head=False),
    "qdq": Recipe("rtn", Spec(4, 32), embedding=TABLES, target="qdq"),
}
OPERATORS = {"matmulnbits": {"MatMulNBits", "GatherBlockQuantized"}, "qdq": {"DequantizeLinear"}}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_inspect_promises_what_quantize_does(name, recipe, tmp_path):
    model, out, wanted = MODELS[name](tmp_path / "m.onnx"), tmp_path / "q.onnx", RECIPES[recipe]
    promised = inspect(model, wanted)
    if not promised.weights:
        with pytest.raises(NothingToQuantize):
            quantize(model, out, wanted)
        return
    done = quantize(model, out, wanted)
    assert [replace(row, error=None, scaling="") for row in done.weights] == list(promised.weights)
    assert (done.skipped, done.copies, done.bytes_before) == (promised.skipped, promised.copies, promised.bytes_before)
    assert promised.bytes_after == pytest.approx(done.bytes_after, rel=0.01, abs=4096)
    written = onnx.load(out, load_external_data=False)
    lows = [node for node in nodes(written.graph) if node.op_type in OPERATORS[wanted.target]]
    # Of QDQ each node reads codes of its own; of the others each node is the one that reads them.
    assert len(lows) == sum(len(row.nodes) for row in promised.weights)
    left = {node.output[0] for node in nodes(written.graph) if node.op_type in ("MatMul", "Gemm")}
    assert {row.name for row in promised.skipped if row.op_type in ("MatMul", "Gemm")} <= left | inner_names(promised)


@pytest.mark.parametrize("external", ["", "weights.bin"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_inspect_accounts_for_every_byte(name, recipe, external, tmp_path):
    """Rows, what stays float and the rest are the files; the rest is the structure and constants of next to no size."""
    path = MODELS[name](tmp_path / "m.onnx")
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=external, size_threshold=0)
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    found = inspect(path, RECIPES[recipe])
    listed = sum(row.bytes_before for row in found.weights) + sum(r.weight_bytes - r.again for r in found.skipped)
    assert listed + found.rest == found.bytes_before == files
    model = onnx.load(path)
    sizes = [tensor_bytes(t) for t in constants(model)]
    least = max(1024, files // 1000)
    small, large = (sum(s for s in sizes if (s > least) == kind) for kind in (False, True))
    assert listed >= large
    assert found.rest <= files - large
    assert listed <= large + small


def constants(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a file: initializers, and the attributes of nodes in graphs, bodies and functions."""
    inner = [n for function in model.functions for n in nodes(function)]
    held = [a.t for n in [*nodes(model.graph), *inner] for a in n.attribute if a.HasField("t")]
    graphs = [model.graph, *(a.g for n in nodes(model.graph) for a in n.attribute if a.HasField("g"))]
    return [*held, *(tensor for graph in graphs for tensor in graph.initializer)]


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    return onnx.numpy_helper.to_array(tensor).nbytes


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for body in bodies for node in nodes(body))]


def inner_names(promised) -> set[str]:
    """Products inside functions that could not be inlined are no nodes of the graph."""
    return {row.name for row in promised.skipped if "function" in row.reason}
