"""`target="qdq"`: every weight is a DequantizeLinear in front of the MatMul or Gemm that was there.

The references are below, as naive as they can be: rounding to nearest along either dimension, and what
DequantizeLinear of ONNX says. What the runtime makes of the nodes is in docs/qdq.md.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_woq import Recipe, Spec, inspect, quantize
from onnx_woq.errors import AlreadyQuantized, RecipeError
from tests.acceptance.resume.test_resume import stopped
from tests.support import hooks, measure
from tests.support.runtimes import has, need, need_opset
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

LEVEL = "session.qdq_matmulnbits_accuracy_level"  # what a fused product is computed with: 4 by default
GATHERED = ("tokens", "places")
FUSES_ALL = "1.25"  # 2 and 8 bits, one scale per channel, Gemm, MatMul with a bias added; before, 4 bits in blocks


# -- references ---------------------------------------------------------------------------------------------------


def rounded(w: np.ndarray, spec: Any) -> np.ndarray:
    """`w [K, N]` rounded to nearest, group by group along dimension 1 - group_dim, as docs/methods.md says."""
    w = np.asarray(w if spec.group_dim else w.T, np.float32)
    out, top, half = np.empty_like(w), 2**spec.bits - 1, 2 ** (spec.bits - 1)
    step = len(w) if spec.group_size == -1 else spec.group_size
    for start in range(0, len(w), step):
        for column in range(w.shape[1]):
            part = w[start : start + step, column]
            lo, hi, extreme = min(part.min(), 0), max(part.max(), 0), part[np.argmax(np.abs(part))]
            scale, zero = (hi - lo) / top, half if spec.symmetric else None
            if spec.bits == 1 and not spec.symmetric:  # two levels, of which zero is one
                scale, zero = np.abs(extreme), int(extreme < 0)
            if spec.symmetric:
                scale = -extreme if spec.bits == 1 else np.abs(part).max() / (half - 1)
            scale = np.float32(scale) or np.float32(1)
            zero = np.clip(np.rint(-lo / scale), 0, top) if zero is None else zero
            codes = np.clip(np.rint(part / scale) + zero, 0, top)
            out[start : start + step, column] = (codes - zero) * scale
    return out if spec.group_dim else out.T


def assert_rounded(got: np.ndarray, w: np.ndarray, spec: Any) -> None:
    """As `rounded`, but that a quotient half way between two codes may go either way."""
    want, wide = rounded(w, spec), np.abs(w).max() / max(1, 2 ** (spec.bits - 1) - 1)
    assert (~np.isclose(got, want, rtol=1e-5, atol=1e-7)).sum() <= max(1, w.size // 100)
    np.testing.assert_allclose(got, want, atol=1.01 * wide)


def dequantized(x: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, axis: int, block: int) -> np.ndarray:
    """DequantizeLinear of ONNX, opset 21: one scale for all, one for each index of an axis, or one for each block."""
    if scales.ndim > 1:
        places = np.arange(x.shape[axis]) // block
        scales, zeros = (a if a is None else np.take(a, places, axis) for a in (scales, zeros))
    elif scales.ndim == 1:
        shape = [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
        scales, zeros = (a if a is None else a.reshape(shape) for a in (scales, zeros))
    return (x - (0 if zeros is None else zeros)) * scales


class Written:
    """A file's constants, and what each DequantizeLinear of constants stands for."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.nodes = list(measure.nodes(self.model))
        self.values = measure.tensors(self.model)
        self.makers = {out: node for node in self.nodes for out in node.output}
        self.dq = {n.output[0]: n for n in self.nodes if n.op_type == "DequantizeLinear" and n.input[0] in self.values}

    def parts(self, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int, int]:
        """Codes, scales, zero points, axis and block size of a DequantizeLinear, in int64 and float64."""
        node = self.dq[value]
        codes, scales, *zeros = (self.values[name] for name in node.input if name)
        a = {"axis": 1, "block_size": 0} | {a.name: a.i for a in node.attribute}
        zero = zeros[0].astype(np.int64) if zeros else None
        return codes.astype(np.int64), scales.astype(np.float64), zero, a["axis"], a["block_size"]

    def array(self, value: str) -> np.ndarray:
        return dequantized(*self.parts(value))

    def kind(self, value: str) -> str:
        """The ONNX type of the codes."""
        tensors = {t.name: t for graph in measure.graphs(self.model.graph) for t in graph.initializer}
        return TensorProto.DataType.Name(tensors[self.dq[value].input[0]].data_type).lower()

    def behind(self, value: str) -> str:
        """The DequantizeLinear that a value comes from, through what only moves or widens numbers; or "" for none."""
        while value in self.makers and value not in self.dq:
            if self.makers[value].op_type not in ("Transpose", "Cast", "Identity", "Reshape"):
                return ""
            value = self.makers[value].input[0]
        return value if value in self.dq else ""

    def weights(self) -> dict[str, str]:
        """The DequantizeLinear of every MatMul and Gemm, by what the product is called."""
        products = [node for node in self.nodes if node.op_type in ("MatMul", "Gemm")]
        return {node.output[0]: at for node in products if (at := self.behind(node.input[1]))}

    def matrix(self, product: str) -> np.ndarray:
        """The weight [K, N] of a product."""
        node = self.makers[product]
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        at = node.input[1]
        while at not in self.dq:
            turned ^= self.makers[at].op_type == "Transpose"
            at = self.makers[at].input[0]
        return self.array(at).T if turned else self.array(at)

    @property
    def opset(self) -> int:
        return next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))


def twin(path: Path) -> bytes:
    """The same model with the arrays that its DequantizeLinears stand for as float initializers."""
    written = Written(path)
    for graph in measure.graphs(written.model.graph):
        kept = [node for node in graph.node if node.output[0] not in written.dq]
        for node in graph.node:
            if (name := node.output[0]) in written.dq:
                array = written.array(name).astype(written.values[node.input[1]].dtype)
                graph.initializer.append(numpy_helper.from_array(array, name))
        del graph.node[:]
        graph.node.extend(kept)
    return written.model.SerializeToString()


# -- sessions -----------------------------------------------------------------------------------------------------


def options(*, optimize: bool = True, level: str = "") -> ort.SessionOptions:
    found = ort.SessionOptions()
    found.intra_op_num_threads, found.log_severity_level = 1, 3
    if not optimize:
        found.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if level:
        found.add_session_config_entry(LEVEL, level)
    return found


def run(model: Path | bytes, feeds: measure.Feeds, **how: Any) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(model) if isinstance(model, Path) else model, options(**how))
    names = [output.name for output in session.get_outputs()]
    rows = [dict(zip(names, session.run(names, dict(feed)), strict=True)) for feed in feeds]
    return {n: np.concatenate([row[n].reshape(-1, row[n].shape[-1]).astype(np.float64) for row in rows]) for n in names}


def fused(path: Path) -> list[dict[str, int]]:
    """The attributes of each MatMulNBits in the graph that a session with default options runs."""
    with tempfile.TemporaryDirectory() as folder:
        how = options()
        how.optimized_model_filepath = f"{folder}/m.onnx"
        ort.InferenceSession(str(path), how)
        found = measure.nodes(onnx.load(f"{folder}/m.onnx", load_external_data=False))
        return [measure.attributes(node) for node in found if node.op_type == "MatMulNBits"]


def assert_equal(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], rtol: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=rtol * np.abs(value).max(), err_msg=name)


def assert_runs(path: Path, feeds: measure.Feeds, rtol: float = 1e-5) -> None:
    """ONNX accepts the file, and every session computes what its numbers say: exactly, or with int8 activations."""
    onnx.checker.check_model(str(path), full_check=True)
    want = run(twin(path), feeds, optimize=False)
    assert_equal(run(path, feeds, optimize=False), want, rtol)
    assert_equal(run(path, feeds, level="0"), want, rtol)
    plain = run(path, feeds)
    assert all(measure.sqnr(value, plain[name]) > 20 for name, value in want.items())


def standard(path: Path) -> bool:
    """Whether a file asks for nothing that is not ONNX."""
    model = onnx.load(path, load_external_data=False)
    return {n.domain for n in measure.nodes(model)} | {o.domain for o in model.opset_import} <= {"", "ai.onnx"}


def qdq(method: str = "rtn", spec: Spec | None = None, **fields: Any) -> Recipe:
    return Recipe(method, spec or Spec(), target="qdq", **fields)


def refused(model: Path, out: Path, recipe: Callable[[], Recipe], data: Any) -> str:
    """Why a recipe is refused, or "" when it was carried out."""
    try:
        quantize(model, out, recipe(), data)
    except RecipeError as error:
        return str(error)
    return ""


def container(bits: int) -> int:
    """The width that codes of `bits` bits are stored in."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def need_codes(bits: int) -> None:
    if container(bits) == 2:
        need_opset(25)


def said(report: Any, caplog: pytest.LogCaptureFixture, lines: list[str], old: int, new: int) -> bool:
    """Whether a run told that it raised the opset: in its report, its log or what it announced."""
    text = "\n".join([json.dumps(report.to_dict(), default=str), caplog.text, *lines])
    return bool(re.search(rf"opset[^\n]*?\b{old}\b[^\n]*?\b{new}\b", text, re.IGNORECASE))


# -- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_the_layout_that_the_runtime_fuses(bits, symmetric, tmp_path):
    """[K, N] in blocks along K; int without zero points where the grid is symmetric, uint with them otherwise."""
    need_codes(bits)
    model, out = zoo.chain(tmp_path / "m.onnx", (600, 144, 40)), tmp_path / "q.onnx"
    quantize(model, out, qdq(spec=Spec(bits, 32, symmetric)))
    written = Written(out)
    assert standard(out)
    assert set(written.weights()) == {"h0", "h1"}
    for product, value in written.weights().items():
        codes, scales, zeros, axis, block = written.parts(value)
        assert (axis % 2, block, scales.shape) == (0, 32, (-(-len(codes) // 32), codes.shape[1]))
        assert written.kind(value) == f"{'' if symmetric else 'u'}int{container(bits)}"
        assert (zeros is None) == symmetric
        assert symmetric or zeros.shape == scales.shape
        assert [n.op_type for n in written.nodes if value in n.input] == ["MatMul"]
        assert_rounded(written.matrix(product), measure.float_weights(model)[product], Spec(bits, 32, symmetric))
    assert_runs(out, [{"x": zoo.correlated(1, 7, 600)}])
    if bits in (3, 4) or has(FUSES_ALL):
        assert [(a["bits"], a["block_size"]) for a in fused(out)] == [(container(bits), 32)] * 2


@pytest.mark.parametrize("group", [16, 64, 128, 256, 48, 96, 512, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [zoo.F32, zoo.F16], ids=["fp32", "fp16"])
def test_groups_along_k(bits, group, dtype, tmp_path):
    need_codes(bits)
    if bits == 2 and dtype == zoo.F16:
        need("1.27", "fused products of 2 bits in float16")
    model, out = zoo.chain(tmp_path / "m.onnx", (1100, 40), dtype=dtype), tmp_path / "q.onnx"
    quantize(model, out, qdq(spec=Spec(bits, group)))
    written = Written(out)
    (value,) = written.weights().values()
    _, _, _, axis, block = written.parts(value)
    # Larger powers of two are silently wrong, or no session starts, before 1.30.
    assert axis % 2 or block <= 256 or block & (block - 1), "blocks that older runtimes compute wrongly"
    assert written.values[written.dq[value].input[1]].dtype == (np.float32 if dtype == zoo.F32 else np.float16)
    x = zoo.correlated(1, 5, 1100).astype(np.float32 if dtype == zoo.F32 else np.float16)
    assert_runs(out, [{"x": x}], 1e-5 if dtype == zoo.F32 else 4e-3)
    native = group in (16, 64, 128, 256, 512) and bits == 4 and dtype == zoo.F32
    if native or (group in (16, 64, 128, 256, 512, -1) and has(FUSES_ALL)):
        assert len(fused(out)) == 1


@pytest.mark.parametrize(("method", "bits", "symmetric"), [
    *(("rtn", bits, symmetric) for bits in (2, 3, 4, 5, 8) for symmetric in (False, True)),
    ("gptq", 4, False), ("gptq", 4, True), ("gptq", 3, False), ("awq", 4, False), ("teq", 4, False), ("hqq", 4, False),
])  # fmt: skip
@pytest.mark.parametrize("group", [32, 128])
def test_the_codes_are_those_of_matmulnbits(method, bits, symmetric, group, lm, lm_data, tmp_path):
    need_codes(bits)
    spec, data = Spec(bits, group, symmetric), None if method in ("rtn", "hqq") else lm_data
    one, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    quantize(lm, one, Recipe(method, spec, accuracy_level=0), data)
    quantize(lm, other, qdq(method, spec), data)
    native, written = measure.low_bit(one), Written(other)
    values = measure.tensors(onnx.load(one))
    assert set(native) == set(written.weights())
    for product, value in written.weights().items():
        codes, scale, zero = measure.grid(native[product], values)
        mine, scales, zeros, axis, block = written.parts(value)
        spread = dequantized(np.ones_like(mine), scales, None, axis, block)
        np.testing.assert_array_equal(spread, scale)
        np.testing.assert_array_equal(dequantized(mine, np.ones_like(scales), zeros, axis, block), codes - zero)
    if bits == 4 or has(FUSES_ALL):
        assert_equal(run(other, lm_data[:2], level="0"), run(one, lm_data[:2]), 1e-5)


@pytest.mark.parametrize("fields", [
    {"method": "gptq", "true_sequential": True},
    {"method": "gptq", "both_streams": True},
    {"method": "awq", "options": {"folding": True}},
    {"method": "rtn", "bias_correction": True},
    {"method": "rtn", "rotation": True},
    {"method": "rtn", "half_scales": True},
    {"method": "rtn", "overrides": {"down": Spec(8, 64), "layer0": None}},
], ids=lambda fields: " ".join(map(str, fields)))  # fmt: skip
def test_whatever_else_a_recipe_says(fields, lm, lm_data, tmp_path):
    """The file computes what the same recipe computes with MatMulNBits in float."""
    recipe = Recipe(**fields, accuracy_level=0)
    data = None if set(fields) & {"rotation", "half_scales", "overrides"} else lm_data
    want = quantize(lm, tmp_path / "a.onnx", recipe, data)
    got = quantize(lm, tmp_path / "b.onnx", replace(recipe, target="qdq"), data)
    assert [tap.name for tap in got.taps] == [tap.name for tap in want.taps]
    assert [tap.error or 0 for tap in got.taps] == pytest.approx([tap.error or 0 for tap in want.taps], rel=1e-3)
    assert standard(tmp_path / "b.onnx")
    assert_runs(tmp_path / "b.onnx", lm_data[:2], 3e-5)
    assert_equal(run(tmp_path / "b.onnx", lm_data[:2], level="0"), run(tmp_path / "a.onnx", lm_data[:2]), 3e-4)


def test_low_rank_factors_are_products_too_or_refused_by_name(lm, lm_data, tmp_path):
    if refusal := refused(lm, tmp_path / "q.onnx", lambda: qdq(lowrank=16), lm_data):
        assert re.search("lowrank.*qdq|qdq.*lowrank", refusal)
        assert not list(tmp_path.iterdir())
        return
    quantize(lm, tmp_path / "a.onnx", Recipe(lowrank=16, accuracy_level=0), lm_data)
    assert standard(tmp_path / "q.onnx")
    assert_runs(tmp_path / "q.onnx", lm_data[:2], 3e-5)
    assert_equal(run(tmp_path / "q.onnx", lm_data[:2], level="0"), run(tmp_path / "a.onnx", lm_data[:2]), 3e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_gemms(bits, tmp_path):
    """With transB, alpha, beta and every form of a bias; those that are plain products are fused."""
    model, data, out = zoo.gemms(tmp_path / "m.onnx"), [{"a": zoo.correlated(2, 9, 40)}], tmp_path / "q.onnx"
    quantize(model, out, qdq(spec=Spec(bits, 16)))
    assert set(Written(out).weights()) >= {f"g{i}" for i in range(8)}
    assert_runs(out, data)
    before, after = run(model, data), run(out, data, level="0")
    assert all(measure.sqnr(value, after[name]) > (20, 40)[bits == 8] for name, value in before.items())
    if has(FUSES_ALL):
        assert len(fused(out)) >= 4  # alpha 1, and no bias or one number per channel: with transB as well


@pytest.mark.parametrize("n", [37, 38, 39, 40])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group", [32, -1])
def test_two_bits_and_any_number_of_output_channels(n, symmetric, group, tmp_path):
    """onnxruntime 1.25 to 1.32 computes nonsense of fused int2 and uint2 where N is no multiple of 4 (docs/qdq.md)."""
    need_codes(2)
    model, out, spec = zoo.chain(tmp_path / "m.onnx", (160, n)), tmp_path / "q.onnx", Spec(2, group, symmetric)
    quantize(model, out, qdq(spec=spec))
    assert_rounded(Written(out).matrix("h0"), measure.float_weights(model)["h0"], spec)
    for _ in range(3):
        assert_runs(out, [{"x": zoo.correlated(1, 5, 160)}])


def shared_weight(path: Path, k: int = 256, n: int = 320) -> Path:
    """x and relu(x) times the same weight."""
    net = zoo.Net()
    w = net.const("W", zoo.weight(1, k, n))
    net.op("MatMul", "x", w, out="y")
    net.op("MatMul", net.op("Relu", "x", out="relu"), w, out="z")
    shape = ["batch", n]
    return net.save(path, {"x": (zoo.F32, ["batch", k])}, {"y": (zoo.F32, shape), "z": (zoo.F32, shape)}, opset=21)


def test_a_shared_weight_is_stored_once_and_fused_twice(tmp_path):
    """Newer runtimes fuse only tensors that one node reads: other names for one place in the data file."""
    model, out = shared_weight(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    report = quantize(model, out, qdq())
    packed = 256 * 320 // 2 + 256 * 320 // 32 * 4.5
    assert sum(path.stat().st_size for path in tmp_path.glob("q.onnx*")) == report.bytes_after < 1.2 * packed + 4096
    assert_runs(out, [{"x": zoo.correlated(1, 5, 256)}])
    written = Written(out)
    np.testing.assert_array_equal(written.matrix("y"), written.matrix("z"))
    assert len(fused(out)) == 2


@pytest.mark.parametrize("shape", ["constants", "branches", "loop", "functions"])
def test_every_shape_of_model(shape, tmp_path):
    """Weights behind other nodes, in bodies and in functions: no session may fail to start, which some layouts do."""
    x = zoo.correlated(3, 9, 48)[None]
    feeds = [{"x": x, "flag": np.array(f)} for f in (True, False)] if shape == "branches" else [{"x": x}]
    model, out = getattr(zoo, shape)(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    report = quantize(model, out, qdq(spec=Spec(8, 16)))
    sites = sum(len(tap.sites) for tap in report.taps)
    assert len(Written(out).weights()) == sites
    assert_runs(out, feeds)
    before, after = run(model, feeds), run(out, feeds, level="0")
    assert all(measure.sqnr(value, after[name]) > 35 for name, value in before.items())


def test_large_weights_in_bodies(tmp_path):
    """Above the size at which tensors go to the data file; a node in a body and its tensors outside starts nowhere."""
    k, net, bodies = 128, zoo.Net(), []
    for i in range(2):
        inner = zoo.Net()
        inner.matmul("x", zoo.weight(i, k, k), f"out{i}")
        value = helper.make_tensor_value_info(f"out{i}", zoo.F32, None)
        bodies.append(helper.make_graph(inner.nodes, f"body{i}", [], [value], initializer=inner.tensors))
    net.op("If", "flag", out="y", then_branch=bodies[0], else_branch=bodies[1])
    inputs = {"x": (zoo.F32, ["b", k]), "flag": (zoo.BOOL, [])}
    model = net.save(tmp_path / "m.onnx", inputs, {"y": (zoo.F32, ["b", k])})
    quantize(model, tmp_path / "q.onnx", qdq())
    assert len(Written(tmp_path / "q.onnx").weights()) == 2
    assert_runs(tmp_path / "q.onnx", [{"x": zoo.correlated(1, 5, k), "flag": np.array(f)} for f in (True, False)])


# -- the opset ----------------------------------------------------------------------------------------------------


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in measure.nodes(model))


@pytest.mark.parametrize(("bits", "group", "before", "after"), [
    (4, 32, 13, 21), (4, 32, 17, 21), (4, -1, 17, 21), (3, 32, 18, 21), (8, 32, 17, 21), (4, 32, 21, 21),
    (8, 32, 21, 21), (8, -1, 13, 13), (8, -1, 17, 17), (6, -1, 13, 13), (4, 32, 23, 23), (4, 32, 25, 25),
    (2, 32, 17, 25), (2, 32, 21, 25), (1, 32, 17, 25), (2, 32, 25, 25),
])  # fmt: skip
def test_the_opset_is_raised_only_where_it_must_be(bits, group, before, after, tmp_path, caplog):
    need_opset(max(before, after))
    caplog.set_level(logging.INFO)
    model, out, lines = zoo.language_model(tmp_path / "m.onnx", opset=before), tmp_path / "q.onnx", []
    report = quantize(model, out, qdq(spec=Spec(bits, group)), announce=lines.append)
    assert Written(out).opset == after
    assert said(report, caplog, lines, before, after) or before == after
    ir_version = onnx.load(out, load_external_data=False).ir_version
    least = helper.find_min_ir_version_for([helper.make_opsetid("", after)])
    assert ir_version >= least
    assert_runs(out, zoo.lm_feeds(zoo.token_ids(2)))
    was, now = onnx.load(model), onnx.load(out)
    added = ("DequantizeLinear", "Constant")
    assert operators(was) == Counter({kind: n for kind, n in operators(now).items() if kind not in added})
    outputs = [n.output[0] for n in was.graph.node]
    assert [n.output[0] for n in now.graph.node if n.output[0] in outputs] == outputs


def test_half_precision_scales_need_opset_19(tmp_path):
    model, out = zoo.chain(tmp_path / "m.onnx", (160, 40), dtype=zoo.F16, opset=17), tmp_path / "q.onnx"
    quantize(model, out, qdq(spec=Spec(8, -1)))
    assert Written(out).opset >= 19
    assert_runs(out, [{"x": zoo.correlated(1, 5, 160).astype(np.float16)}], 4e-3)


@pytest.mark.parametrize("kind", ["decoder", "merged_decoder", "fused_decoder", "bert"])
def test_raising_keeps_what_the_model_computes(kind, tmp_path):
    """Operators that changed on the way, in bodies too; operators of the runtime, also those in ONNX's own domain."""
    model, out = getattr(arch, kind)(tmp_path / "m.onnx", layers=3), tmp_path / "q.onnx"
    before = onnx.load(model)
    assert before.opset_import[0].version == 17
    name = kind.removesuffix("_decoder")
    data = arch.ragged(name) if name == "bert" else arch.ragged(name, layers=3)
    quantize(model, out, qdq(spec=Spec(8, 32)))
    assert Written(out).opset == 21
    want, got = run(model, data), run(out, data, level="0")
    assert all(measure.sqnr(value, got[key]) > 30 for key, value in want.items())
    assert_equal(run(out, data, optimize=False), run(twin(out), data, optimize=False), 1e-5)
    assert run(out, data).keys() == want.keys()


def test_external_weights_stay_where_they_are(tmp_path):
    model = zoo.language_model(tmp_path / "in" / "m.onnx", external="w.bin")
    before = measure.listing(tmp_path / "in")
    report = quantize(model, tmp_path / "out" / "q.onnx", qdq())
    assert measure.listing(tmp_path / "in") == before
    assert report.bytes_after == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert_runs(tmp_path / "out" / "q.onnx", zoo.lm_feeds(zoo.token_ids(1)))


# -- any group, both dimensions -----------------------------------------------------------------------------------

WIDTHS = [bits for bits in range(1, 9) if bits > 2 or has("1.24")]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    k=st.integers(16, 70),
    n=st.integers(1, 40),
    bits=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    group=st.sampled_from([1, 2, 7, 16, 24, 32, 64, 100, 1024, -1]),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_any_group_along_either_dimension(k, n, bits, symmetric, group, dim, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    spec = Spec(bits, group, symmetric, group_dim=dim)
    w = zoo.weight(seed, k, n)
    w[:, :: max(1, n // 3)] = np.abs(w[:, :: max(1, n // 3)])  # of one sign
    w[: min(k, 7)] *= seed % 3  # zeros
    model, out = zoo.siblings(folder / "m.onnx", {"y": w}), folder / "q.onnx"
    quantize(model, out, qdq(spec=spec))
    assert_rounded(Written(out).matrix("y"), w, spec)
    assert_runs(out, [{"x": zoo.correlated(seed, 3, k)[None]}])


@pytest.mark.parametrize("group", [24, 32, -1])
def test_groups_of_output_channels(group, tmp_path):
    """One scale for each input channel and each group of output channels, so the blocks lie along N."""
    model, out = zoo.chain(tmp_path / "m.onnx", (96, 80)), tmp_path / "q.onnx"
    quantize(model, out, qdq(spec=Spec(4, group, group_dim=0)))
    written = Written(out)
    value = written.weights()["h0"]
    _, scales, _, axis, block = written.parts(value)
    spread = dequantized(np.ones((96, 80)), scales, None, axis, block)
    assert all(len(np.unique(row[start : start + (group if group > 0 else 80)])) == 1
               for row in spread for start in range(0, 80, group if group > 0 else 80))  # fmt: skip
    assert len(np.unique(spread[:, 0])) > 90
    assert_runs(out, [{"x": zoo.correlated(1, 5, 96)}])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("spec", [{"group_size": 24}, {"group_size": 32, "group_dim": 0}, {"group_size": 1}], ids=str)
def test_calibrated_methods_take_them_or_refuse_by_name(method, spec, enc, enc_data, tmp_path):
    recipe = {"method": method, "spec": {"bits": 4} | spec, "target": "qdq"}
    if refusal := refused(enc, tmp_path / "q.onnx", lambda: Recipe.from_dict(recipe), enc_data):
        assert "group_dim" in spec, "any group of input channels is fine"
        assert re.search(f"group_dim.*{method}|{method}.*group_dim", refusal, re.IGNORECASE)
        return
    quantize(enc, tmp_path / "r.onnx", Recipe.from_dict(recipe | {"method": "rtn"}))
    assert_runs(tmp_path / "q.onnx", enc_data)
    before = run(enc, enc_data)["y"]
    losses = [np.square(run(tmp_path / f"{name}.onnx", enc_data, level="0")["y"] - before).sum() for name in "qr"]
    assert losses[0] <= 1.02 * losses[1] + 1e-9  # groups of one lose nothing but float32's rounding


@pytest.mark.parametrize("spec", [
    {"group_size": 1}, {"group_size": 24}, {"group_size": 100}, {"group_size": 32, "group_dim": 0},
], ids=str)  # fmt: skip
def test_matmulnbits_refuses_what_it_cannot_hold_and_names_qdq(spec, cli, enc, tmp_path):
    for recipe in (Recipe("rtn", Spec(4, **spec)), Recipe("rtn", overrides={".": Spec(4, **spec)})):
        with pytest.raises(RecipeError, match="--target qdq"):
            inspect(enc, recipe)
        with pytest.raises(RecipeError, match="--target qdq"):
            quantize(enc, tmp_path / "refused.onnx", recipe)
    assert not (tmp_path / "refused.onnx").exists()
    assert Recipe("rtn", Spec(4, **spec), target="qdq").spec.group_size == spec["group_size"]
    (tmp_path / "r.json").write_text(json.dumps({"spec": spec}))
    refused = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--recipe", tmp_path / "r.json")
    assert (refused.exit_code, "--target qdq" in refused.stderr) == (2, True)
    cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--recipe", tmp_path / "r.json", "--target", "qdq")
    assert_runs(tmp_path / "q.onnx", zoo.float_feeds(2))


@pytest.mark.parametrize("make", [
    lambda: Spec(group_size=0), lambda: Spec(group_size=-2), lambda: Spec(group_dim=2), lambda: Spec(group_dim=True),
    lambda: Recipe(target=""), lambda: Recipe(target=None),
], ids=["no group", "negative group", "third dimension", "not a number", "empty target", "no target"])  # fmt: skip
def test_what_is_out_of_range(make):
    with pytest.raises(RecipeError, match=r"group_size|group_dim|target"):
        make()


def test_a_misspelt_target_is_answered_with_the_nearest(enc):
    with pytest.raises(RecipeError, match="did you mean qdq"):
        inspect(enc, Recipe(target="qd"))


# -- tables -------------------------------------------------------------------------------------------------------


def rows_read(path: Path, name: str = "tokens") -> np.ndarray:
    """The whole table [V, D] as the model reads it, without optimizations."""
    ids = np.arange(zoo.VOCAB).reshape(-1, zoo.LONGEST)
    return run(measure.exposed(path, [name]), zoo.lm_feeds(list(ids[:, None])), optimize=False)[name]


def float_tables(path: Path) -> list[str]:
    """Float matrices that a Gather reads."""
    written = Written(path)
    gathered = [n.input[0] for n in written.nodes if n.op_type == "Gather" and n.output[0] in GATHERED]
    return [name for name in gathered if name in written.values and written.values[name].dtype == np.float32]


def tables_made_whole(path: Path) -> list[str]:
    """Gathers from a DequantizeLinear: the runtime makes all of the table for every row (docs/qdq.md)."""
    written = Written(path)
    return [n.output[0] for n in written.nodes if n.op_type == "Gather" and written.behind(n.input[0])]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("opset", [17, 21])
def test_embeddings(bits, symmetric, opset, lm_data, tmp_path):
    need_codes(bits)
    model, out = zoo.language_model(tmp_path / "m.onnx", opset=opset), tmp_path / "q.onnx"
    grid = Spec(bits, 32, symmetric)
    report = quantize(model, out, qdq(spec=grid, embedding=grid))
    assert {row.name for row in report.embeddings} == {"tokens"}  # the other is too small to count
    groups = zoo.VOCAB * zoo.HIDDEN // 32
    assert report.embeddings[0].bytes_after <= groups * (32 * container(bits) // 8 + 4 + 1)
    assert standard(out)
    assert "embedding" not in float_tables(out)
    assert not tables_made_whole(out)
    table = next(numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer if t.name == "embedding")
    assert_rounded(rows_read(out).T, table.T, grid)
    assert_runs(out, lm_data[:2])


@pytest.mark.parametrize("embedding", [Spec(4, 32), Spec(8, 32)], ids=["as the head", "other bits"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_tied_head(method, embedding, tied_lm, lm_data, tmp_path):
    """Head and table are both in low bits, and no float copy is left; whether one lends the other its codes is open."""
    out = tmp_path / "q.onnx"
    report = quantize(tied_lm, out, qdq(method, Spec(4, 32), embedding=embedding), lm_data)
    assert report.copies == {}
    assert "embedding" not in float_tables(out)
    assert not tables_made_whole(out)
    assert "logits" in Written(out).weights()
    assert_runs(out, lm_data[:2])
    was = next(numpy_helper.to_array(t) for t in onnx.load(tied_lm).graph.initializer if t.name == "embedding")
    assert measure.sqnr(was, rows_read(out)) > (15 if embedding.bits == 4 else 40)
    if has(FUSES_ALL):
        assert len(fused(out)) == len(Written(out).weights()), "the head is fused as well"


# -- around it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Spec(4, 32), Spec(4, 32, True), Spec(8, 32), Spec(8, -1)], ids=str)
def test_a_quantized_model_is_not_quantized_again(spec, enc, cli, tmp_path):
    out = tmp_path / "q.onnx"
    quantize(enc, out, qdq(spec=spec))
    for target in ("qdq", "matmulnbits"):
        with pytest.raises(AlreadyQuantized):
            quantize(out, tmp_path / "again.onnx", Recipe(target=target))
    assert not (tmp_path / "again.onnx").exists()
    assert cli("quantize", out, "-o", tmp_path / "again.onnx").exit_code == 2


@pytest.mark.parametrize("recipe", [
    {"method": "gptq"}, {"method": "gptq", "true_sequential": True}, {"method": "rtn", "embedding": {"bits": 4}},
    {"method": "rtn", "spec": {"bits": 8, "group_size": 24, "group_dim": 0}},
], ids=str)  # fmt: skip
def test_interrupted_again_and_again(recipe, tmp_path):
    model = zoo.language_model(tmp_path / "m.onnx", external="w.bin")  # opset 17: it is raised every time
    data, recipe = zoo.lm_feeds(zoo.token_ids(4)), Recipe.from_dict(recipe | {"target": "qdq"})
    for name in "ab":
        (tmp_path / name).mkdir()
    quantize(model, tmp_path / "a" / "q.onnx", recipe, data)
    interrupts = 0
    for at in range(3, 200, 3):
        try:
            quantize(model, tmp_path / "b" / "q.onnx", recipe, data, resume=True, progress=stopped(at))
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 2
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "a")
    assert_runs(tmp_path / "b" / "q.onnx", data[:1])


@pytest.mark.slow
def test_killed_and_resumed(cli, tmp_path):
    arch.decoder(tmp_path / "m.onnx", opset=17, layers=4, external="w.bin")
    zoo.array_folder(tmp_path / "data", "input_ids", [ids % arch.VOCAB for ids in zoo.token_ids(6, 20)])
    command = lambda out, *more: ["quantize", tmp_path / "m.onnx", "-o", tmp_path / out / "q.onnx", "--target", "qdq",  # noqa: E731
                                  "--algorithm", "gptq", "--calib", tmp_path / "data", *more]  # fmt: skip
    for name in "ab":
        (tmp_path / name).mkdir()
    cli.ok(*command("a"))
    dead = hooks.run_cli(command("b"), log=tmp_path / "log", at=10, signal=signal.SIGKILL, method="gptq", pause=0.3)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-400:]
    assert not (tmp_path / "b" / "q.onnx").exists()
    cli.ok(*command("b", "--resume"))
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "a")


@pytest.mark.parametrize(("recipe", "opset"), [
    ({}, 17), ({}, 21), ({"spec": {"bits": 8, "group_size": -1}}, 17), ({"spec": {"bits": 3, "symmetric": True}}, 17),
    ({"spec": {"bits": 4, "group_size": 24}}, 21), ({"spec": {"bits": 4, "group_size": 24, "group_dim": 0}}, 21),
    ({"embedding": {"bits": 4}}, 17), ({"half_scales": True}, 21),
], ids=str)  # fmt: skip
def test_inspect_foretells_the_file(recipe, opset, tmp_path):
    model = zoo.language_model(tmp_path / "m.onnx", opset=opset)
    recipe = Recipe.from_dict(recipe | {"target": "qdq"})
    found, done = inspect(model, recipe), quantize(model, tmp_path / "q.onnx", recipe)
    assert found.bytes_after == pytest.approx(done.bytes_after, rel=0.05)
    assert done.bytes_after == sum(path.stat().st_size for path in tmp_path.glob("q.onnx*"))
    assert [(t.name, t.bytes_after) for t in found.taps] == [(t.name, t.bytes_after) for t in done.taps]
    assert (found.embeddings, found.copies) == (done.embeddings, done.copies)


def test_the_command_line(cli, lm, tmp_path, caplog):
    report = cli.json("quantize", lm, "-o", tmp_path / "q.onnx", "--target", "qdq", "--bits", 4, "--group-size", 32)
    assert report["recipe"]["target"] == "qdq"
    assert measure.recipe_of(tmp_path / "q.onnx")["target"] == "qdq"
    assert standard(tmp_path / "q.onnx")
    shown = cli.ok("quantize", lm, "-o", tmp_path / "again.onnx", "--target", "qdq")
    assert re.search(r"opset[^\n]*17[^\n]*21", shown.stdout + shown.stderr + caplog.text, re.IGNORECASE)
    assert measure.digest(tmp_path / "again.onnx.data") == measure.digest(tmp_path / "q.onnx.data")
    planned = cli.json("inspect", lm, "--target", "qdq")
    assert planned["bytes_after"] == pytest.approx(report["bytes_after"], rel=0.05)
    odd = cli.json("quantize", lm, "-o", tmp_path / "odd.onnx", "--target", "qdq", "--group-size", 24)
    assert odd["recipe"]["spec"]["group_size"] == 24
    refused = cli("quantize", lm, "-o", tmp_path / "no.onnx", "--target", "qqd")
    assert (refused.exit_code, "qdq" in refused.stderr) == (2, True)
    assert "--target" in cli.ok("quantize", "--help").stdout
    assert "--target" in cli.ok("inspect", "--help").stdout


def test_a_recipe_survives_json_and_old_ones_are_read():
    recipe = Recipe("rtn", Spec(4, 24, True, group_dim=0), target="qdq", embedding=Spec(4, 7))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.fingerprint() != replace(recipe, spec=Spec(4, 24, True)).fingerprint()
    assert Recipe.from_dict({"method": "rtn", "spec": {"bits": 4, "group_size": 32, "symmetric": False}}) == Recipe()
    assert Recipe().spec.group_dim == 1
    assert Recipe("rtn").target != "qdq"


def everything(path: Path) -> Iterator[str]:
    model = onnx.load(path, load_external_data=False)
    yield from (name for node in measure.nodes(model) for name in (node.name, *node.output) if name)


def test_names_are_kept_and_none_is_used_twice(lm, tmp_path):
    quantize(lm, tmp_path / "q.onnx", qdq())
    before, after = list(everything(lm)), Counter(everything(tmp_path / "q.onnx"))
    assert set(before) <= set(after)
    values = Counter(
        v for n in measure.nodes(onnx.load(tmp_path / "q.onnx", load_external_data=False)) for v in n.output
    )
    assert max(values.values()) == 1
