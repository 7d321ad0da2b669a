"""onnxsim's GPTQ, AWQ and AutoRound on a model that its entry points take too long for, in an environment of its own.

    python -m venv VENV && VENV/bin/pip install onnxsim==0.8.1 onnxruntime==1.32.0 onnx==1.23.2
    VENV/bin/python tools/peers/onnxsim_solvers.py stats MODEL.onnx IDS.npz STATS.npz
    VENV/bin/python tools/peers/onnxsim_solvers.py solve MODEL.onnx STATS.npz WEIGHTS.npz --method gptq [--blocks 1 14]
    VENV/bin/python tools/peers/onnxsim_solvers.py check  (the shipped functions, on a small layer)

As shipped, `apply_gptq` and the others keep every activation in float64 and multiply matrices by plain loops. `solve`
reads the Gram matrix instead:

- gptq: `onnxsim.gptq._gptq_quantize_columns`, which sees no more of the activations.
- awq: `onnxsim.awq._quantize_blockwise_int4`; the search over 20 exponents around it is written here after
  `awq_entry.cpp`, its squared output error taken from the Gram matrix rather than from the rows.
- autoround: `onnxsim.autoround._joint_loop` and `onnxsim.adaround._optimize_rounding`, 300 steps of each, the better of
  both, as `apply_autoround` does. Their loss is a square, so a root of the Gram matrix stands for the activations.

`check` says whether the shipped functions end at the same weights. All are symmetric, 4 bits, groups of 32: onnxsim has
no asymmetric grid for these methods.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxsim.adaround import _optimize_rounding
from onnxsim.autoround import _autoround_results, _init_autoround, _joint_loop, _keep_better_of
from onnxsim.awq import _quantize_blockwise_int4
from onnxsim.gptq import _gptq_quantize_columns

BLOCK = 32


def linears(graph: onnx.GraphProto) -> dict[str, tuple[str, str]]:
    """Name of the PyTorch module -> names of the activation and of the weight `[K, N]`."""
    nodes = (n for n in graph.node if n.op_type == "MatMul" and n.name.endswith("_proj/MatMul"))
    return {".".join(n.name.strip("/").split("/")[:-1]): (n.input[0], n.input[1]) for n in nodes}


def feed_of(graph: onnx.GraphProto, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`ids [T]` as the feed of a decoder with an empty past."""
    row = ids[None]
    feed = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(row.shape[1])[None]}
    for value in graph.input:
        if value.name.startswith("past"):
            dims = value.type.tensor_type.shape.dim
            feed[value.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), np.float32)
    return {value.name: feed[value.name] for value in graph.input}


def activations(model: onnx.ModelProto, ids: np.ndarray, names: list[str]) -> Iterator[list[np.ndarray]]:
    """Per sequence, the activations `[T, K]` of `names`."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for row in ids:
        yield [x.reshape(-1, x.shape[-1]) for x in session.run(names, feed_of(model.graph, row))]


def stats(model: onnx.ModelProto, ids: np.ndarray, path: Path) -> None:
    """Writes `gram:NAME [K, K]`, `abs:NAME [K]` (mean magnitudes) of every activation, and the number of tokens."""
    names = list(dict.fromkeys(x for x, _ in linears(model.graph).values()))
    gram: dict[str, np.ndarray] = {}
    magnitude: dict[str, np.ndarray] = {}
    for number, found in enumerate(activations(model, ids, names)):
        for name, x in zip(names, found, strict=True):
            gram[name] = gram.get(name, 0) + x.T @ x
            magnitude[name] = magnitude.get(name, 0) + np.abs(x).sum(0, dtype=np.float64)
        print(f"{time.strftime('%T')} sequence {number + 1}/{len(ids)}", flush=True)
    arrays = {f"gram:{n}": g for n, g in gram.items()} | {f"abs:{n}": m / ids.size for n, m in magnitude.items()}
    np.savez(path, tokens=ids.size, **{key.replace("/", "|"): value for key, value in arrays.items()})


def rtn(w: np.ndarray, *_: object) -> np.ndarray:
    """What `quantize_weight_only_int4` makes of `w [N, K]`."""
    codes, scales = _quantize_blockwise_int4(w, BLOCK)
    return codes * np.repeat(scales, BLOCK, axis=1)


def gptq(w: np.ndarray, h: np.ndarray, *_: object) -> np.ndarray:
    """What `apply_gptq` makes of `w [N, K]`."""
    _codes, scales = _quantize_blockwise_int4(w, BLOCK)
    scales = scales.astype(np.float32).astype(np.float64)  # as the model stores them
    codes = _gptq_quantize_columns(w, scales, BLOCK, h.astype(np.float64), percdamp=0.01, proc_block_size=128)
    return codes * np.repeat(scales, BLOCK, axis=1)


def awq(w: np.ndarray, h: np.ndarray, magnitude: np.ndarray, _: int) -> np.ndarray:
    """What `apply_awq` makes of `w [N, K]`, the inserted Mul folded in."""
    best, least = w, np.inf
    for alpha in np.linspace(0, 1, 20):
        raw = np.maximum(magnitude, 1e-12) ** alpha
        channel = raw / np.exp(np.log(raw).mean())
        codes, scales = _quantize_blockwise_int4(w * channel, BLOCK)
        new = codes * np.repeat(scales, BLOCK, axis=1) / channel
        delta = (new - w).astype(np.float32)
        error = float(((delta @ h) * delta).sum(dtype=np.float64))
        if error < least:
            best, least = new, error
    return best


STEPS = {"num_iterations": 300, "learning_rate": 0.1, "reg_param": 0.01, "warm_start": 0.2, "beta_range": (20.0, 2.0)}
CLIP = (0.5, 1.5)
RANGE = {"n_min": -7.0, "n_max": 7.0}


def autoround(w: np.ndarray, h: np.ndarray, _: np.ndarray, tokens: int) -> np.ndarray:
    """What `apply_autoround` makes of `w [N, K]` with its defaults."""
    values, vectors = np.linalg.eigh(h.astype(np.float64))
    x = np.sqrt(np.maximum(values, 0) * len(h) / tokens)[:, None] * vectors.T  # losses are means over rows
    _codes, scales = _quantize_blockwise_int4(w, BLOCK)
    scales = scales.astype(np.float32).astype(np.float64)
    parallel_map, v, c = _init_autoround(w, scales, BLOCK)
    v, c = _joint_loop(
        w, scales, BLOCK, x, x @ w.T, v, c, **RANGE, **STEPS, clip_learning_rate=0.03, clip_ratio_range=CLIP
    )
    joint = _autoround_results(w, scales, BLOCK, v, c, *RANGE.values(), CLIP)
    codes = _optimize_rounding(w, parallel_map, x, **RANGE, **STEPS)
    codes, scales = _keep_better_of(x, x @ w.T, scales, parallel_map, joint, codes)
    return codes * np.repeat(scales.astype(np.float32).astype(np.float64), BLOCK, axis=1)


METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq, "autoround": autoround}


def solve(model: onnx.ModelProto, path: Path, output: Path, method: str, blocks: list[int] | None) -> None:
    """Writes the weights `[K, N]` that `method` ends with, and prints the CPU seconds of solving."""
    values = {t.name: t for t in model.graph.initializer}
    new: dict[str, np.ndarray] = {}
    spent = 0.0
    with np.load(path, allow_pickle=False) as known:
        for module, (x, weight) in linears(model.graph).items():
            if blocks is not None and int(re.search(r"layers\.(\d+)\.", module)[1]) not in blocks:
                continue
            h, magnitude = (known[f"{kind}:{x}".replace("/", "|")] for kind in ("gram", "abs"))
            w = numpy_helper.to_array(values[weight]).T.astype(np.float64)
            cpu = time.process_time()
            made = METHODS[method](w, h, magnitude, int(known["tokens"]))
            spent += time.process_time() - cpu
            new[module] = np.ascontiguousarray(made.T, dtype=np.float32)
            print(f"{time.strftime('%T')} {module} CPU {spent:.1f} s", flush=True)
    np.savez(output, **new)
    print(json.dumps({"tool": f"onnxsim {method}", "cpu": spent, "linears": len(new)}))


def layer(w: np.ndarray) -> onnx.ModelProto:
    """A model of one MatMul by `w [K, N]`."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, w.shape[0]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, w.shape[1]])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def dequantized(model: onnx.ModelProto) -> np.ndarray:
    """The weight `[K, N]` that a model of one MatMul computes with: its output for the identity."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return session.run(None, {"x": np.eye(width, dtype=np.float32)})[0]


def check(k: int = 96, n: int = 40, rows: int = 300) -> None:
    """The shipped functions and the ones here on a layer `[k, n]` with correlated inputs, drawn with seed 0."""
    import onnxsim

    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    x, w = x.astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    plain = layer(w)
    start = onnxsim.quantize_weight_only_int4(plain)
    for method in METHODS:
        made = start
        if method != "rtn":
            made = getattr(onnxsim, f"apply_{method}")(plain, start, calibration_data=[{"x": x}])
        here = METHODS[method](w.T.astype(np.float64), x.T @ x, np.abs(x).mean(0, dtype=np.float64), rows).T
        differ = (np.abs(here - dequantized(made)) > 0.01 * np.abs(w).max() / 7).mean()
        error = np.square(x @ (here - w)).sum() / np.square(x @ w).sum()
        print(f"{method}: {differ:.4%} of the weights differ from what is shipped; output error {error:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stats", "solve", "check"])
    parser.add_argument("files", nargs="*", type=Path, help="as above")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--blocks", type=int, nargs="*", help="only these decoder layers")
    given = parser.parse_args()
    if given.what == "check":
        check()
    elif given.what == "solve":
        solve(onnx.load(given.files[0]), *given.files[1:3], given.method, given.blocks)
    else:
        stats(onnx.load(given.files[0]), np.load(given.files[1])["input_ids"], given.files[2])


if __name__ == "__main__":
    main()
