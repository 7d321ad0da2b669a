"""Weights of any magnitude that float32 has: what a number type cannot hold is stored in another, never clipped."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnx_woq import Recipe, Spec, inspect, quantize
from tests.zoo import nodes
from tests.zoo import small as zoo

K, N = 64, 48
MAGNITUDES = (1e-44, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e38)
TINY = float(np.finfo(np.float32).tiny)
BASE = (zoo.mixing(1, K, N) / np.abs(zoo.mixing(1, K, N)).max()).astype(np.float64)
X = zoo.correlated(3, 160, K).astype(np.float64)
DATA = [{"x": X[i::4].astype(np.float32)} for i in range(4)]


def decoded(path, dtype=np.float32):
    """What the model multiplies by: its outputs for the rows of the identity, one operator at a time."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (out,) = ort.InferenceSession(str(path), options).run(None, {"x": np.eye(K, dtype=dtype)})
    return out.astype(np.float64)


def lost(weight, other):
    """The error of the outputs relative to their size; numbers below the smallest normal one count as equal."""
    delta = np.where(np.abs(other - weight) <= TINY, 0, other - weight)
    size = np.abs(weight).max()
    return np.linalg.norm(X @ (delta / size)) / np.linalg.norm(X @ (weight / size))


def rounded(weight, bits, symmetric, group=32, half=False):
    """Plain round to nearest in float64, group by group; if `half` with the next larger scale that float16 has."""
    out, top = np.empty_like(weight), 2**bits - 1
    for start in range(0, K, group):
        w = weight[start : start + group]
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        scale = np.abs(w).max(0) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / top
        scale = np.where(scale > 0, scale, 1.0)
        if half:
            stored = scale.astype(np.float16)
            scale = np.where(stored < scale, np.nextafter(stored, np.float16(np.inf)), stored).astype(np.float64)
        zero = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low / scale), 0, top)
        out[start : start + group] = (np.clip(np.rint(w / scale) + zero, 0, top) - zero) * scale
    return out


@pytest.mark.parametrize("magnitude", [1e-44, 1e-10, 3e38])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_no_magnitude_is_worse_than_another(method, magnitude, tmp_path):
    no_worse(method, "matmulnbits", magnitude, (3,), tmp_path)


@pytest.mark.slow  # 840 models
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "teq", "hqq"])
def test_no_magnitude_of_any_method_and_target_is_worse_than_another(method, target, magnitude, tmp_path):
    no_worse(method, target, magnitude, (3, 4, 8), tmp_path)


def no_worse(method, target, magnitude, widths, tmp_path):
    """Compares with plain rounding of the same weight at magnitude 1."""
    weight = (BASE * magnitude).astype(np.float32)
    path = nodes.linear(tmp_path / "m.onnx", weight)
    for bits, symmetric, half in itertools.product(widths, (True, False), (True, False)):
        spec = Spec(bits, 32, symmetric=symmetric)
        recipe = Recipe(method, spec, target=target, half_scales=half, accuracy_level=0)
        quantize(path, tmp_path / "q.onnx", recipe, DATA)
        found = lost(weight.astype(np.float64), decoded(tmp_path / "q.onnx"))
        assert found < 1.05 * lost(BASE, rounded(BASE, bits, symmetric)), (bits, symmetric, half)


@pytest.mark.parametrize("magnitude", [6e-8, 1e-6, 1e-3, 3e4])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", pytest.param("teq", marks=pytest.mark.slow), "hqq"])
def test_magnitudes_of_a_model_in_float16(method, magnitude, tmp_path):
    weight = (BASE * magnitude).astype(np.float16)
    path = nodes.linear(tmp_path / "m.onnx", weight)
    exact = weight.astype(np.float64)
    for bits, symmetric in itertools.product((4, 8), (True, False)):
        recipe = Recipe(method, Spec(bits, 32, symmetric=symmetric), accuracy_level=0)
        quantize(path, tmp_path / "q.onnx", recipe, [{"x": feed["x"].astype(np.float16)} for feed in DATA])
        found = decoded(tmp_path / "q.onnx", np.float16)
        assert np.isfinite(found).all()
        best = lost(exact, rounded(exact, bits, symmetric, half=True))
        assert lost(exact, found) < 1.05 * best + 1e-3, (bits, symmetric)


def scale_types(path):
    model = onnx.load(path)
    kinds = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer}
    return {name.split("_Q")[0]: kind for name, kind in kinds.items() if name.endswith("scales")}


@pytest.mark.parametrize("small", [1e-9, 1e9])
def test_only_the_weight_that_needs_it_has_wider_scales(small, tmp_path):
    """One group of one output channel is enough; `inspect` knows of it before."""
    odd = (BASE / 4).astype(np.float32)
    odd[32:, 5] *= small
    path = zoo.siblings(tmp_path / "m.onnx", {"plain": (BASE / 4).astype(np.float32), "odd": odd}, norm=True)
    separate = {"include": ("odd",), "half_scales": True}
    quantize(path, tmp_path / "q.onnx", Recipe("rtn", **separate))
    assert set(scale_types(tmp_path / "q.onnx").values()) == {np.dtype(np.float32)}
    quantize(path, tmp_path / "p.onnx", Recipe("rtn", include=("plain",), half_scales=True))
    assert set(scale_types(tmp_path / "p.onnx").values()) == {np.dtype(np.float16)}
    report = inspect(path, Recipe("rtn", **separate))
    assert report.weights[0].bytes_after == K * N // 2 + 2 * N * 4 + N


def test_an_embedding_with_tiny_rows(tmp_path):
    net = zoo.Net()
    table = np.concatenate([zoo.mixing(1, 32, K), 1e-9 * zoo.mixing(2, 32, K)]).astype(np.float32)
    h = net.op("Gather", net.const("table", table), "ids", out="h")
    net.matmul(h, zoo.weight(3, K, N), "y")
    shapes = {"ids": (zoo.I64, ["b"])}, {"h": (zoo.F32, ["b", K]), "y": (zoo.F32, ["b", N])}
    path = net.save(tmp_path / "m.onnx", *shapes)
    for target in ("matmulnbits", "qdq"):
        recipe = Recipe("rtn", half_scales=True, embedding=Spec(8, 32), target=target)
        quantize(path, tmp_path / "q.onnx", recipe)
        (rows,) = nodes.run(tmp_path / "q.onnx", {"ids": np.arange(64)}, ["h"])
        assert (np.linalg.norm(rows - table, axis=1) < 0.01 * np.linalg.norm(table, axis=1)).all(), target
