"""Everything that reads a large constant is listed once, with its bytes and a reason that is true."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from onnx_woq import inspect, quantize
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import NothingToQuantize
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo.nodes import INT64, graph, node, random, value, write

K, MS = 64, "com.microsoft"
X = value("x", ("t", 2, K))
ONLY = "is not quantized: only MatMul, Gemm and the tables of Gather are"

# what reads it -> (nodes, inputs, weights, bytes, what the reason says)
READERS = {
    "Conv": ([node("Conv", ["i", "w"], ["y"])], {"w": random(32, 8, 3, 3)}, f"Conv {ONLY}"),
    "ConvTranspose": ([node("ConvTranspose", ["i", "w"], ["y"])], {"w": random(8, 32, 3, 3)}, f"ConvTranspose {ONLY}"),
    "LSTM": (
        [node("LSTM", ["x", "w", "r"], ["y", "", ""], hidden_size=K)],
        {"w": random(1, 4 * K, K), "r": random(1, 4 * K, K)},
        f"LSTM {ONLY}",
    ),
    "Einsum": ([node("Einsum", ["x", "w"], ["y"], equation="tbk,kn->tbn")], {"w": random(K, K)}, f"Einsum {ONLY}"),
    "Attention": (
        [node("Attention", ["x", "w", "b"], ["y"], domain=MS, num_heads=4)],
        {"w": random(K, 3 * K), "b": random(3 * K)},
        f"Attention {ONLY}",
    ),
    "an operator of somebody's own": ([node("Mine", ["x", "w"], ["y"], domain="mine")], {"w": random(K, K)}, "Mine"),
    "GatherND": ([node("GatherND", ["w", "n"], ["y"])], {"w": random(8, K, K)}, f"GatherND {ONLY}"),
    "experts": ([node("Gather", ["w", "n"], ["y"])], {"w": random(8, K, K)}, "a table with 3 dimensions, not 2"),
    "a small table": ([node("Gather", ["w", "n"], ["y"])], {"w": random(16, K)}, "a table of less than 64 KiB"),
    "a vector": ([node("Add", ["x", "w"], ["y"])], {"w": random(1024)}, "a vector, such as a bias"),
    "integers": ([node("Gather", ["w", "n"], ["y"])], {"w": np.ones((64, 64), np.int64)}, "numbers of type int64"),
}


def written(path, nodes, weights):
    read = {name for n in nodes for name in n.input}
    inputs = [v for v in (X, value("i", ("b", 8, 9, 9)), value("n", (3, 1), INT64)) if v.name in read]
    main = graph(nodes, inputs, [value("y", None, TensorProto.FLOAT)], weights)
    return write(path, main, opset=17, domains={MS: 1, "mine": 1})


@pytest.mark.parametrize("name", READERS)
def test_every_reader_is_listed_with_its_bytes(name, tmp_path):
    nodes, weights, reason = READERS[name]
    model = written(tmp_path / "m.onnx", nodes, weights)
    (row,) = inspect(model).skipped
    assert reason in row.reason
    assert row.op_type == nodes[0].op_type
    assert row.weight_bytes == sum(w.nbytes for w in weights.values() if w.nbytes > 1024)
    with pytest.raises(NothingToQuantize):
        quantize(model, tmp_path / "q.onnx")


def test_what_two_nodes_read_counts_once(tmp_path):
    nodes = [node("Einsum", ["x", "w"], [f"e{i}"], equation="tbk,kn->tbn") for i in (0, 1)]
    nodes += [node("MatMul", ["e0", "w"], ["h"]), node("Gather", ["w", "n"], ["y"])]
    model = load(written(tmp_path / "m.onnx", nodes, {"w": random(512, K)}))
    rows = {row.name: (row.weight_bytes, row.again) for row in make_plan(model, Recipe()).skipped}
    size = 512 * K * 4
    assert rows == {"y": (size, size)}, "the product has it, and Einsum reads nothing else"


def test_a_constant_that_nothing_reads(tmp_path):
    model = written(tmp_path / "m.onnx", [node("Neg", ["x"], ["y"])], {"w": random(K, K)})
    assert [(r.name, r.reason, r.weight_bytes) for r in inspect(model).skipped] == [
        ("w", "no node reads it", 4 * K * K)
    ]


def test_low_bit_weights_are_no_float_bytes(tmp_path):
    main = graph([node("MatMul", ["x", "W"], ["h"]), node("MatMul", ["h", "V"], ["y"])], [X], [value("y")],
                 {"W": random(K, K), "V": random(K, K)})  # fmt: skip
    quantize(write(tmp_path / "m.onnx", main), tmp_path / "q.onnx", Recipe(exclude=("V",)))
    found = inspect(tmp_path / "q.onnx")
    assert [(row.op_type, row.reason) for row in found.skipped] == [("MatMulNBits", "quantized already")]
    assert found.float_bytes == {}


def test_a_model_that_stays_mostly_float_says_so(tmp_path, capsys):
    from onnx_woq.report import terminal

    nodes = [node("Einsum", ["x", "w"], ["e"], equation="tbk,kn->tbn"), node("MatMul", ["e", "v"], ["y"])]
    found = inspect(written(tmp_path / "m.onnx", nodes, {"w": random(K, 4 * K), "v": random(4 * K, 16)}))
    terminal.inspection(found)
    assert "80 % of the bytes stay float: Einsum 80 %" in capsys.readouterr().out
