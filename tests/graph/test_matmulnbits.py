"""What is lowered computes what was quantized: for every width, group, scheme and form of the node."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from builders import BFLOAT16, BOOL, FLOAT, FLOAT16, INT64, graph, linear, lower, node, random, run, value, write
from onnx_woq.graph.lower.matmulnbits import minimum_runtime, native_layout, packed_bytes
from onnx_woq.graph.model import load, save
from onnx_woq.recipe import Recipe, Spec

GROUPS = (16, 32, 48, 64, 96, 128, 160, 256, 512, -1)


def many(path, dtype, k: int, n: int, count: int, opset: int = 21):
    """`count` MatMuls of one input, so that a session tries many specs."""
    proto = {np.float32: FLOAT, np.float16: FLOAT16}[dtype]
    weights = {f"W{i}": random(k, n, seed=i, dtype=dtype) * dtype(0.1) for i in range(count)}
    nodes = [node("MatMul", ["x", f"W{i}"], [f"y{i}"], name=f"mm{i}") for i in range(count)]
    outputs = [value(f"y{i}", ["m", n], proto) for i in range(count)]
    return write(path, graph(nodes, [value("x", ["m", k], proto)], outputs, weights), opset=opset)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("k", [200, 1000])
def test_every_width_group_and_scheme_computes_what_it_stores(tmp_path, dtype, k):
    n = 7
    specs = [Spec(b, g, s) for b, g, s in itertools.product(range(1, 9), GROUPS, (False, True))]
    recipe = Recipe(overrides={f"^mm{i}$": spec for i, spec in enumerate(specs)})
    path = many(tmp_path / "m.onnx", dtype, k, n, len(specs))
    x = random(3, k, seed=99, dtype=dtype)
    for level, bound in ((0, 1e-5 if dtype is np.float32 else 2e-3), (4, 0.03)):
        model = load(path)
        taps, solved, _ = lower(model, recipe, accuracy_level=level)
        save(model, tmp_path / "q.onnx", metadata={})
        onnx.checker.check_model(tmp_path / "q.onnx")
        outputs = run(tmp_path / "q.onnx", {"x": x})
        want = {site.name: x.astype(np.float32) @ q.dequantize() for tap, q in zip(taps, solved, strict=True) for site in tap.sites}
        for i, (spec, got) in enumerate(zip(specs, outputs, strict=True)):
            assert got.dtype == dtype
            assert relative(got, want[f"y{i}"]) < bound, (spec, level)
