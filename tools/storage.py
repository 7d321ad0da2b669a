"""What is stored otherwise than kernels read it: is it right, and what does loading it cost?

    python tools/storage.py make build/storage
    python tools/storage.py run build/storage          # numpy and an onnxruntime of any version are enough here

`run` prints, for small models that `make` has written, whether each level of graph optimization computes what numpy
does; then for a chain of products the bytes of the file, seconds and peak memory of loading, memory afterwards, and
milliseconds for one row of activations, the forms in turn so that other work on the machine meets them alike.
docs/storage.md has the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

K = N = 2048
PRODUCTS, ROUNDS, REPEATS = 24, 7, 30
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
FORMS = {  # (bits, half scales, dense)
    "3 bits in 4": (3, False, False),
    "3 bits dense": (3, False, True),
    "4 bits": (4, False, False),
    "4 bits, float16 scales": (4, True, False),
    "3 bits dense, float16 scales": (3, True, True),
    "5 bits in 8": (5, False, False),
    "5 bits dense": (5, False, True),
    "6 bits dense": (6, False, True),
}
BARE = "4 bits, float16 scales, codes constant"  # what must not be written


def make(folder: Path) -> None:
    """Writes the models, and what numpy makes of the small ones."""
    from onnx import TensorProto, helper

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(PRODUCTS)]
    weights = {f"W{i}": rng.standard_normal((K, N), np.float32) / np.float32(K**0.5) for i in range(PRODUCTS)}
    inputs = [info("x0", TensorProto.FLOAT, ["m", K])]
    chain = helper.make_graph(nodes, "chain", inputs, [info(f"x{PRODUCTS}", TensorProto.FLOAT, ["m", N])])
    _save(chain, weights, folder / "chain.onnx")
    for name, form in FORMS.items():
        _quantized(folder / "chain.onnx", folder / f"chain, {name}.onnx", form, symmetric=False, level=4)
    small = {"W": rng.standard_normal((256, 32), np.float32)}
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "W"], [f"y{i}"])], f"branch{i}", [], [info(f"y{i}", 1, None)]
        )
        for i in range(2)
    ]
    x, flag, y = info("x", TensorProto.FLOAT, ["m", 256]), info("flag", TensorProto.BOOL, []), info("y", 1, ["m", 32])
    whether = helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])
    _save(
        helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "main", [x], [y]),
        small,
        folder / "main.onnx",
    )
    _save(helper.make_graph([whether], "if", [x, flag], [y]), small, folder / "if.onnx")
    activations = {"x": rng.standard_normal((5, 256), np.float32)}
    wanted = {}
    for kind, name, symmetric, level in itertools.product(("main", "if"), (*FORMS, BARE), (False, True), (0, 4)):
        file = f"{kind}, {name}, {'sym' if symmetric else 'asym'}, level {level}"
        form = FORMS.get(name, (4, True, False))
        decoded = _quantized(folder / f"{kind}.onnx", folder / f"{file}.onnx", form, symmetric=symmetric, level=level)
        if name == BARE:
            _without_identity(folder / f"{file}.onnx")
        wanted[file] = activations["x"] @ decoded
    np.savez(folder / "wanted.npz", **activations, **wanted)


def _save(graph: object, weights: dict[str, np.ndarray], path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    imports = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def _quantized(path: Path, out: Path, form: tuple[int, bool, bool], *, symmetric: bool, level: int) -> np.ndarray:
    """Rounds to nearest and writes `out`; gives the last weight as the file stands for it."""
    from onnx_woq import Recipe, Spec
    from onnx_woq.core.methods.registry import METHODS
    from onnx_woq.graph.find.linears import find_linear_groups
    from onnx_woq.graph.io.model import load
    from onnx_woq.graph.io.save import save
    from onnx_woq.targets.matmulnbits import lower_group, pack

    bits, half, dense = form
    recipe = Recipe(spec=Spec(bits, 32, symmetric), half_scales=half)
    model = load(path)
    for group in find_linear_groups(model, recipe)[0]:
        q = METHODS["rtn"].solve(group.weight(), None, group.spec, scale_dtype=group.scale_dtype)
        lower_group(model, group, [pack(q, group.scale_dtype, dense=dense)], accuracy_level=level)
    save(model, out, metadata={})
    return q.dequantize()


def _without_identity(path: Path) -> None:
    """Has MatMulNBits read the codes from the initializer itself."""
    import onnx

    model = onnx.load(path)
    (identity,) = (node for node in model.graph.node if node.op_type == "Identity")
    model.graph.node.remove(identity)
    for tensor in model.graph.initializer:
        tensor.name = identity.output[0] if tensor.name == identity.input[0] else tensor.name
    onnx.save(model, path)


def run(folder: Path) -> None:
    """Prints both tables for the onnxruntime that is installed."""
    import onnxruntime as ort

    print(f"onnxruntime {ort.__version__}\n\n| model | {' | '.join(LEVELS)} |\n|---|{'---|' * len(LEVELS)}")
    with np.load(folder / "wanted.npz") as arrays:
        for name in arrays.files:
            if name != "x":
                verdicts = (
                    _verdict(ort, folder / f"{name}.onnx", arrays["x"], arrays[name], level) for level in LEVELS
                )
                print(f"| {name} | {' | '.join(verdicts)} |")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in FORMS}
    for _, name in itertools.product(range(ROUNDS), FORMS):
        rows[name].append(json.loads(_child(folder / f"chain, {name}.onnx")))
    print("\n| form | MB of files | s to load | peak MB | MB afterwards | ms for one row |\n|---|---|---|---|---|---|")
    for name, found in rows.items():
        files = (folder / f"chain, {name}.onnx", folder / f"chain, {name}.onnx.data")
        size = sum(file.stat().st_size for file in files) / 1e6
        best = {key: min(one[key] for one in found) for key in found[0]}
        cells = f"{best['load']:.2f} | {best['peak']:.0f} | {best['after']:.0f} | {best['run']:.2f}"
        print(f"| {name} | {size:.1f} | {cells} |")


def _verdict(ort: object, path: Path, x: np.ndarray, want: np.ndarray, level: str) -> str:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    try:
        session = ort.InferenceSession(str(path), options)
        known = {"x": x, "flag": np.array(True)}
        got = session.run(None, {given.name: known[given.name] for given in session.get_inputs()})[0]
    except Exception as error:
        return f"error: {str(error).split(':')[-1].strip()[:40]}"
    off = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return "right" if off < 1e-5 else f"right to {off:.1%}" if off < 0.02 else f"WRONG by {off:.0%}"


def _child(path: Path) -> str:
    command = [sys.executable, __file__, "child", str(path)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is seen to be
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def child(path: Path) -> None:
    """Loads one file and multiplies; prints JSON."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    before, start = _memory("VmRSS"), time.perf_counter()
    session = ort.InferenceSession(str(path), options)
    load, after, peak = time.perf_counter() - start, _memory("VmRSS") - before, _memory("VmHWM") - before
    feed = {"x0": np.random.default_rng(1).standard_normal((1, K), np.float32)}
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    print(json.dumps({"load": load, "peak": peak, "after": after, "run": 1e3 * min(times)}))


def _memory(key: str) -> float:
    """MB of this process, as Linux says."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1e3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "child"])
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    {"make": make, "run": run, "child": child}[arguments.what](arguments.path)


if __name__ == "__main__":
    main()
