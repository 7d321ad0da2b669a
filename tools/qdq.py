"""What the installed onnxruntime makes of DequantizeLinear in front of MatMul, Gemm and Gather.

    python tools/qdq.py fuse      # which forms become MatMulNBits, and whether every form computes what numpy does
    python tools/qdq.py speed     # milliseconds of one product and memory, one thread
    python tools/qdq.py tables    # rows of a quantized table
    python tools/qdq.py opset     # what onnx.version_converter keeps, changes and refuses

Needs numpy, onnx 1.20 or newer and an onnxruntime of any version (one in PYTHONPATH goes first). docs/qdq.md has what
they print.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
F32, F16, I64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}
FLOAT = {"session.disable_quant_qdq": "1"}


def tensor(name: str, codes: np.ndarray, kind: str) -> TensorProto:
    """Whole numbers as an ONNX tensor of type `kind`, lowest bits first."""
    bits = BITS[kind]
    flat = np.pad((codes.ravel() & (1 << bits) - 1).astype(np.uint8), (0, -codes.size % (8 // bits)))
    data = (flat.reshape(-1, 8 // bits).astype(np.uint16) << np.arange(0, 8, bits)).sum(1).astype(np.uint8)
    dtype = getattr(TensorProto, kind.upper())
    return TensorProto(name=name, data_type=dtype, dims=codes.shape, raw_data=data.tobytes())


class Case:
    """A weight [K, N] (as stored: [N, K] when `turned`) behind DequantizeLinear, and what numpy makes of it."""

    def __init__(
        self,
        kind: str = "uint4",
        axis: int = 0,
        block: int = 32,
        k: int = 64,
        n: int = 48,
        *,
        turned: bool = False,
        half: bool = False,
        opset: int = 0,
    ) -> None:
        rng = np.random.default_rng(0)
        bits, shape = BITS[kind], [n, k] if turned else [k, n]
        low, high = (-(1 << bits - 1), 1 << bits - 1) if kind[0] == "i" else (0, 1 << bits)
        groups = [-(-d // block) if i == axis else d for i, d in enumerate(shape)] if block else [shape[axis]]
        codes, self.zero = rng.integers(low, high, shape), rng.integers(low, high, groups)
        scales = (rng.uniform(0.5, 2, groups) / 2**bits).astype(np.float16 if half else np.float32)
        self.opset, self.dtype = opset or (25 if bits == 2 else 21 if bits == 4 or block else 13), F16 if half else F32
        self.attributes = {"axis": axis} | ({"block_size": block} if block else {})
        self.tensors = {"C": tensor("C", codes, kind), "S": numpy_helper.from_array(scales, "S")}
        if kind[0] == "u":
            self.tensors["Z"] = tensor("Z", self.zero, kind)

        def spread(a: np.ndarray) -> np.ndarray:
            if not block:
                return np.expand_dims(a, 1 - axis)
            return np.repeat(a, block, axis).take(range(shape[axis]), axis)

        offset = spread(self.zero) if "Z" in self.tensors else 0
        self.weight = (codes - offset) * spread(scales.astype(np.float64))
        if turned:
            self.weight = self.weight.T
        self.k, self.n = k, n

    def dequantize(self, suffix: str = "") -> onnx.NodeProto:
        """The node, reading tensors called so with the suffix."""
        names = [name + suffix for name in self.tensors]
        return helper.make_node("DequantizeLinear", names, ["W" + suffix], **self.attributes)

    def copies(self, suffix: str) -> list[TensorProto]:
        """The same tensors under other names."""
        tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in self.tensors.values()]
        for each in tensors:
            each.name += suffix
        return tensors


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, list]],
    outputs: Sequence[str],
    tensors: Sequence[TensorProto],
    opset: int,
    dtype: int = F32,
    microsoft: bool = False,
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info(n, *t) for n, t in inputs.items()], [info(name, dtype, None) for name in outputs], tensors
    )
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid("com.microsoft", 1)] * microsoft
    return helper.make_model(graph, opset_imports=imports, ir_version={25: 13, 24: 12, 23: 11}.get(opset, 10))


def session(proto: onnx.ModelProto, level: str = "ALL", config: dict[str, str] | None = None, saved: str = "") -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if saved:
        options.optimized_model_filepath = saved
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized(proto: onnx.ModelProto) -> str:
    """The operators of the graph that a session with default options runs."""
    with tempfile.TemporaryDirectory() as folder:
        session(proto, "ENABLE_ALL", None, f"{folder}/m.onnx")
        graph = onnx.load(f"{folder}/m.onnx", load_external_data=False).graph
    nodes = [*graph.node, *(n for o in graph.node for a in o.attribute for n in a.g.node)]
    return " ".join(_short(node) for node in nodes)


def _short(node: onnx.NodeProto) -> str:
    a = {a.name: a.i for a in node.attribute}
    known = f"({a['bits']} bits, block {a['block_size']}, level {a['accuracy_level']})" if "bits" in a else ""
    return {"DequantizeLinear": "DQ"}.get(node.op_type, node.op_type) + known


def products() -> dict[str, tuple[Case, list[onnx.NodeProto], list[TensorProto]]]:
    """Every form by name: the weight, the nodes from x to y, further initializers."""
    node, found = helper.make_node, {}

    def add(name: str, case: Case, *after: onnx.NodeProto, more: Sequence[TensorProto] = ()) -> None:
        found[name] = (case, [case.dequantize(), *(after or (node("MatMul", ["x", "W"], ["y"]),))], list(more))

    for kind in BITS:
        add(f"{kind}, block 32 along K", Case(kind))
        add(f"{kind}, one scale per output channel", Case(kind, 1, 0))
        add(f"{kind}, block 24 along N", Case(kind, 1, 24))
    for block in (1, 16, 24, 100, 256, 512, 600):
        add(f"uint4, block {block} along K, K = 600", Case(block=block, k=600))
    add("uint4, block 512 along K, K = 2048", Case(block=512, k=2048))
    for n in (48, 50):
        add(f"uint2, block 32 along K, N = {n}", Case("uint2", n=n))
    add("uint4, float16", Case(half=True))
    bias = numpy_helper.from_array(np.ones(48, np.float32), "b")
    add("uint4, Gemm", Case(), node("Gemm", ["x", "W"], ["y"]))
    add("uint4, Gemm with transB, [N, K]", Case(axis=1, turned=True), node("Gemm", ["x", "W"], ["y"], transB=1))
    turn = node("Transpose", ["W"], ["T"], perm=[1, 0]), node("MatMul", ["x", "T"], ["y"])
    add("uint4, [N, K] and a Transpose", Case(axis=1, turned=True), *turn)
    add("uint2, [N, K], per channel, and a Transpose", Case("uint2", 0, 0, turned=True), *turn)
    again = node("MatMul", ["x", "W"], ["y2"])
    add("uint4, two MatMuls read one DQ", Case(), node("MatMul", ["x", "W"], ["y"]), again)
    case = Case()
    twice = [case.dequantize("2"), node("MatMul", ["x", "W2"], ["y2"])]
    add(
        "uint4, two DQs, tensors under two names",
        case,
        node("MatMul", ["x", "W"], ["y"]),
        *twice,
        more=case.copies("2"),
    )
    add(
        "uint4, MatMul and Add of a bias",
        Case(),
        node("MatMul", ["x", "W"], ["t"]),
        node("Add", ["t", "b"], ["y"]),
        more=[bias],
    )
    case = Case()
    body = helper.make_graph(
        [case.dequantize(), node("MatMul", ["x", "W"], ["yes"])],
        "then",
        [],
        [helper.make_tensor_value_info("yes", F32, None)],
    )
    inside = onnx.GraphProto.FromString(body.SerializeToString())
    inside.initializer.extend(case.tensors.values())
    other = helper.make_graph(
        [node("Identity", ["x"], ["no"])], "else", [], [helper.make_tensor_value_info("no", F32, None)]
    )
    outside = helper.make_graph([node("MatMul", ["x", "W"], ["yes"])], "then", [], body.output)
    whether = functools.partial(node, "If", ["f"], ["y"], else_branch=other)
    stored = list(case.tensors.values())
    found["uint4, DQ and its tensors in a body"] = (case, [whether(then_branch=inside)], [])
    found["uint4, DQ in a body, its tensors outside"] = (case, [whether(then_branch=body)], stored)
    found["uint4, DQ outside, MatMul in a body"] = (case, [case.dequantize(), whether(then_branch=outside)], stored)
    return found


def fuse() -> None:
    """One line for each form: what runs by default; the error by default, at level 0, and without optimizations."""
    for name, (case, nodes, more) in products().items():
        inputs = {"x": (case.dtype, ["m", case.k])} | ({"f": (BOOL, [])} if "body" in name else {})
        tensors = more if "body" in name else [*case.tensors.values(), *more]
        proto = model(nodes, inputs, ["y"], tensors, case.opset, case.dtype)
        proto.graph.output.extend([helper.make_tensor_value_info("y2", F32, None)] * ("two" in name))
        x = np.random.default_rng(1).standard_normal((3, case.k))
        x = x.astype(helper.tensor_dtype_to_np_dtype(case.dtype))
        want = x.astype(np.float64) @ case.weight + ("bias" in name)
        feeds = {"x": x} | ({"f": np.array(True)} if "body" in name else {})
        errors = []
        for level, config in (("ENABLE_ALL", None), ("ENABLE_ALL", EXACT), ("DISABLE_ALL", None)):
            try:
                got = session(proto, level, config).run(["y"], feeds)[0]
                errors.append(f"{np.abs(got - want).max() / np.abs(want).max():.0e}")
            except Exception:
                errors.append("fails")
        runs = "no session" if errors[0] == "fails" else optimized(proto)
        print(f"| {name} | {runs} | {' | '.join(errors)} |", flush=True)


K = N = 2048
SPEEDS = [
    "float",
    "int4 fused",
    "uint4 fused",
    "uint4 fused, level 0",
    "uint4 unfused (BASIC)",
    "uint4, block 32 along N",
    "uint4, block 32 along N, folded",
    "uint8 fused",
    "uint8 fused, level 0",
    "uint8, block 32 along N",
    "uint2 fused",
    "uint2 fused, level 0",
    "uint2, block 32 along N",
]


def speed(name: str = "") -> None:
    """One line for each form, each in a process of its own."""
    if not name:
        for each in SPEEDS:
            subprocess.run([sys.executable, __file__, "speed", each], check=True)
        return
    rng = np.random.default_rng(0)
    level = "ENABLE_BASIC" if "BASIC" in name else "ENABLE_ALL"
    config = EXACT if "level 0" in name else FLOAT if "folded" in name else None
    if name == "float":
        nodes, tensors, opset = [], [numpy_helper.from_array(rng.standard_normal((K, N)).astype(np.float32), "W")], 21
    else:
        case = Case(name.split(",")[0].split()[0], int("along N" in name), 32, K, N)
        nodes, tensors, opset = [case.dequantize()], list(case.tensors.values()), case.opset
    nodes.append(helper.make_node("MatMul", ["x", "W"], ["y"]))
    proto = model(nodes, {"x": (F32, ["m", K])}, ["y"], tensors, opset)
    before = _resident()
    running = session(proto, level, config)
    rows = {m: _least(running, {"x": rng.standard_normal((m, K)).astype(np.float32)}) for m in (1, 32)}
    print(f"| {name} | {rows[1]:.2f} | {rows[32]:.1f} | {_resident() - before:.0f} |", flush=True)


def tables() -> None:
    """One line for each way to read rows of a table [49152, 576] in groups of 32 along its rows."""
    v, d, block = 49152, 576, 32
    rng, node = np.random.default_rng(0), helper.make_node
    codes, zeros = (rng.integers(0, 16, shape, np.uint8) for shape in ((v, d), (v, d // block)))
    scales = rng.uniform(0.5, 2, zeros.shape).astype(np.float32)
    want = ((codes.reshape(v, -1, block).astype(np.float32) - zeros[..., None]) * scales[..., None]).reshape(v, d)
    halves = codes[:, : d // 2] | codes[:, d // 2 :] << 4
    pairs = lambda a: a[:, ::2] | a[:, 1::2] << 4  # noqa: E731
    plain = lambda **arrays: [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]  # noqa: E731
    low = [tensor("C", codes, "uint4"), *plain(S=scales), tensor("Z", zeros, "uint4")]
    whole = [node("DequantizeLinear", ["C", "S", "Z"], ["W"], axis=1, block_size=block)]
    whole += [node("Gather", ["W", "x"], ["y"])]
    rows = [node("Gather", [a, "x"], [a.lower()]) for a in "CSZ"]
    last = node("DequantizeLinear", ["c", "s", "z"], ["y"], axis=-1, block_size=block)
    split = [
        node("Gather", ["B", "x"], ["b"]),
        node("BitwiseAnd", ["b", "low"], ["l"]),
        node("BitShift", ["b", "four"], ["h"], direction="RIGHT"),
        node("Concat", ["l", "h"], ["c"], axis=-1),
    ]
    native = node(
        "GatherBlockQuantized",
        ["C", "x", "S", "Z"],
        ["y"],
        domain="com.microsoft",
        bits=4,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    numbers = plain(low=np.uint8(15), four=np.uint8(4))
    forms: dict[str, tuple[list, list]] = {
        "Gather of a float table": (whole[1:], plain(W=want)),
        "Gather of DQ of uint4": (whole, low),
        "Gather of DQ of uint8": (whole, plain(C=codes, S=scales, Z=zeros)),
        "Gather of uint4 codes": ([*rows, last], low),
        "DQ of Gathers of uint8": ([*rows, last], plain(C=codes, S=scales, Z=zeros)),
        "DQ of bytes cut in two": ([*split, *rows[1:], last], plain(B=halves, S=scales, Z=zeros) + numbers),
        "GatherBlockQuantized": ([native], plain(C=pairs(codes), S=scales, Z=pairs(zeros))),
    }
    for name, (nodes, tensors) in forms.items():
        proto = model(nodes, {"x": (I64, ["t"])}, ["y"], tensors, 21, microsoft=name[-1] == "d")
        try:
            running = session(proto, "ENABLE_ALL")
            ids = rng.integers(0, v, 128)
            assert np.array_equal(running.run(None, {"x": ids})[0], want[ids])
            times = [_least(running, {"x": ids[:m]}) for m in (1, 128)]
            print(f"| {name} | {times[0]:.3f} | {times[1]:.2f} |", flush=True)
        except Exception as error:
            print(f"| {name} | {str(error)[:120]} |", flush=True)


def _least(running: Any, feeds: dict[str, np.ndarray]) -> float:
    """Milliseconds of the fastest of many runs."""
    times, end = [], time.perf_counter() + 1
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        running.run(None, feeds)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def old_models() -> dict[str, onnx.ModelProto]:
    """Small models of opset 17, or the one said."""
    node, info = helper.make_node, helper.make_tensor_value_info
    mean = node("ReduceMean", ["x"], ["y"], axes=[-1], name="mean")
    x = {"x": (F32, [2, 4, 8, 8])}
    ones = numpy_helper.from_array(np.ones(8, np.float32), "g")
    body = helper.make_graph([node("ReduceMean", ["x"], ["r"], axes=[-1])], "b", [], [info("r", F32, None)])
    call = model([node("F", ["x"], ["y"], domain="f")], x, ["y"], [], 17)
    call.opset_import.add(domain="f", version=1)
    call.functions.append(
        helper.make_function("f", "F", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)])
    )
    far = model([node("MatMul", ["x", "w"], ["y"])], {"x": (F32, ["m", 30000])}, ["y"], [], 17)
    far.graph.initializer.append(TensorProto(name="w", data_type=F32, dims=[30000, 30000], data_location=1))
    far.graph.initializer[0].external_data.add(key="location", value="w")
    marked = model([mean], x, ["y"], [], 17)
    marked.graph.node[0].metadata_props.add(key="k", value="v")
    pairs = [numpy_helper.from_array(np.ones(2, np.float32), n) for n in "ab"]
    gelu = node("Gelu", ["x"], ["y"], domain="com.microsoft")
    norm = node("SimplifiedLayerNormalization", ["x", "g"], ["y"])
    whether = node("If", ["f"], ["y"], then_branch=body, else_branch=body)
    group = node("GroupNormalization", ["x", "a", "b"], ["y"], num_groups=2)
    return {
        "ReduceMean with axes": model([mean], x, ["y"], [], 17),
        "the same in a body": model([whether], x | {"f": (BOOL, [])}, ["y"], [], 17),
        "Gelu of com.microsoft": model([gelu], x, ["y"], [], 17, microsoft=True),
        "SimplifiedLayerNormalization": model([norm], x, ["y"], [ones], 17),
        "a model-local function": call,
        "3.6 GB of external weights, not read": far,
        "metadata of a node": marked,
        "GroupNormalization of opset 18": model([group], x, ["y"], pairs, 18),
    }


def opset() -> None:
    """What becomes of old models on the way to 21 and 25."""
    for name, proto in old_models().items():
        for to in (21, 25):
            try:
                new = onnx.version_converter.convert_version(proto, to)
            except Exception as error:
                print(f"| {name} | {to} | refused: {' '.join(str(error).split())[-60:]} |")
                continue
            inner = [n for o in new.graph.node for a in o.attribute for n in a.g.node]
            found = [" ".join(n.op_type for n in (*new.graph.node, *inner)), f"IR {new.ir_version}"]
            found += [f"{len(new.functions)} functions"] * bool(proto.functions)
            found += [f"metadata of {sum(bool(n.metadata_props) for n in new.graph.node)} nodes"] * ("metadata" in name)
            try:
                found += ["not run" if "GB" in name else session(new, "ENABLE_ALL") and "loads"]
            except Exception as error:
                found += [f"no session: {' '.join(str(error).split())[:90]}"]
            print(f"| {name} | {to} | {'; '.join(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fuse", "speed", "tables", "opset"))
    parser.add_argument("name", nargs="?", default="")
    arguments = parser.parse_args()
    print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}", file=sys.stderr)
    if arguments.what == "speed":
        speed(arguments.name)
    else:
        {"fuse": fuse, "tables": tables, "opset": opset}[arguments.what]()


if __name__ == "__main__":
    main()
