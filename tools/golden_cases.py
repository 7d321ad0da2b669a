"""What `tools/golden.py` runs: command lines, and the models, data and recipes they are given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = ("", "quantize", "evaluate", "inspect", "configs")
AMOUNT = ("--samples", "8", "--seqlen", "64")
DATA = ("--calib", "calib.txt", *AMOUNT)
GPTQ = ("--config", "GPTQ_G32ASYM")
BY_BLOCK = ("--option", "sequential_unit=block")

OPTIONS: Mapping[str, Sequence[str]] = {
    "3 bits": ("--bits", "3"),
    "5 bits": ("--bits", "5"),
    "symmetric": (*GPTQ, "--scheme", "sym"),
    "per channel": ("--group-size", "-1"),
    "embedding": ("--embedding-bits", "4"),
    "embedding of other bits": (*GPTQ, "--bits", "3", "--embedding-bits", "8", "--embedding-group", "16"),
    "half scales": (*GPTQ, "--option", "half_scales=true"),
    "low rank": (*GPTQ, "--option", "lowrank=16"),
    "bias correction": ("--option", "bias_correction=true"),
    "rotation": (*GPTQ, "--option", "rotation=true", "--embedding-bits", "4"),
    "true sequential": (*GPTQ, "--option", "true_sequential=true", *BY_BLOCK),
    "both streams": (*GPTQ, "--option", "both_streams=true", *BY_BLOCK),
    "attention weighted": (*GPTQ, "--option", "attention_weighted=true"),
    "act-order": (*GPTQ, "--option", "actorder=true", "--option", "enable_mse_search=true"),
    "GPTQ scaled by AWQ": (*GPTQ, "--option", "scaling=awq", "--option", "static_groups=true"),
    "AWQ folded": ("--algorithm", "AWQ", "--option", "folding=true"),
    "TEQ": ("--algorithm", "TEQ", "--option", "steps=8"),
    "HQQ": ("--algorithm", "HQQ", "--option", "iterations=5"),
    "accuracy level 0": (*GPTQ, "--accuracy-level", "0", "--max-memory", "1GB"),
    "recipe in JSON": ("--recipe", "recipe.json"),
    "recipe in TOML": ("--recipe", "recipe.toml", "--exclude", "layers.3"),
}
"""On the shipped model; AWQ without folding is a preset."""

GRIDS = [
    *((bits, scheme, group) for bits in range(1, 9) for scheme, group in (("sym", -1), ("asym", 32))),
    *((bits, "asym", 48) for bits in (2, 4, 8)),
]
"""On the small models."""

MISTAKES: Mapping[str, Sequence[str]] = {
    "unknown configuration": ("--config", "GPTQ_G32ASIM"),
    "unknown option": (*GPTQ, "--option", "actorders=true"),
    "no data": GPTQ,
    "no such grid": ("--group-size", "17"),
    "two recipes": (*GPTQ, "--recipe", "recipe.json"),
    "nothing to quantize": ("--include", "nowhere"),
}

TUNINGS: Mapping[str, tuple[str, Sequence[str]]] = {
    "auto": ("configurations", ("--auto", "--objective", "smallest", "--tolerance", "0.2")),
    "bits": ("mixes", ("--target-bpw", "4.5")),
    "size": ("mixes", ("--target-size", "1.1MB")),
    "frontier": ("mixes", ("--objective", "pareto", "--points", "2", "--tolerance", "0.2")),
}
"""Name -> work folder, where what one mix has measured serves the next, and flags."""

BY_METRIC = ("--eval", "metric:size", "--lower-is-better", "--auto", "--max-trials", "2", "--json")

UNFINISHED: Mapping[str, Mapping[str, Any]] = {"gptq": {}, "gptq, tap by tap": {"true_sequential": True}}
"""Recipes whose runs are killed after `KILLED_AT` of `TAPS` taps."""

KILLED_AT, TAPS = 14, 17

_RECIPE: Mapping[str, Any] = {
    "method": "gptq",
    "spec": {"bits": 4, "group_size": 32, "symmetric": True},
    "options": {"group_order": True},
    "include": ["mlp", "o_proj", "logits"],
    "exclude": ["layers.0.*gate"],
    "overrides": {"down_proj": {"bits": 8, "group_size": 64}, "layers.2.*o_proj": None},
}
_TOML = """method = "awq"
include = ["self_attn", "down_proj"]
spec = { bits = 4, group_size = 64 }
overrides = { "v_proj" = { bits = 8, group_size = 32 } }
"""
_METRIC = """from pathlib import Path


def size(path):
    return sum(file.stat().st_size for file in Path(path).parent.glob(Path(path).name + "*")) / 1e6
"""
_MODELS = {
    "encoder": """<ir_version: 8, opset_import: ["" : 17]>
    encoder (float[b,s,64] x) => (float[n,48] y) {
        first = MatMul(x, W_first)
        unit = LayerNormalization<axis = -1>(first, gamma)
        left = MatMul(unit, W_left)
        right = MatMul(unit, W_right)
        open = Sigmoid(right)
        both = Mul(left, open)
        flat = Reshape(both, shape)
        y = Gemm<transB = 1>(flat, W_last, bias)
    }""",
    "tied": """<ir_version: 10, opset_import: ["" : 21]>
    tied (int64[b,s] input_ids) => (float[b,s,512] logits) {
        h0 = Gather(table, input_ids)
        wide = MatMul(h0, W_up)
        on = Relu(wide)
        down = MatMul(on, W_down)
        h1 = Add(h0, down)
        head = Transpose<perm = [1, 0]>(table)
        logits = MatMul(h1, head)
    }""",
}
_WEIGHTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "encoder": {"W_first": (64, 64), "W_left": (64, 160), "W_right": (64, 160), "W_last": (48, 160), "gamma": (64,),
                "bias": (48,)},
    "tied": {"table": (512, 64), "W_up": (64, 160), "W_down": (160, 64)},
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Writes everything that the command lines name: they are run in this folder."""
    shutil.copytree(ROOT / "models" / "demo", folder / "demo")
    subprocess.run([sys.executable, ROOT / "models" / "text.py", folder], check=True, stdout=subprocess.DEVNULL)
    (folder / "recipe.json").write_text(json.dumps(_RECIPE))
    (folder / "recipe.toml").write_text(_TOML)
    (folder / "metric.py").write_text(_METRIC)
    for name in _MODELS:
        _make_model(folder, name)


def _make_model(folder: Path, name: str) -> None:
    """A small model, the encoder's weights beside it, with eight samples of data."""
    import numpy as np
    import onnx
    from onnx import numpy_helper, parser

    rng = np.random.default_rng(0)
    model = parser.parse_model(_MODELS[name])
    for weight, shape in _WEIGHTS[name].items():
        array = rng.standard_normal(shape, np.float32) / np.float32(8)
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    if name == "encoder":
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 160]), "shape"))
    beside = name == "encoder"
    place = folder / f"{name}.onnx"
    onnx.save(model, place, save_as_external_data=beside, location=f"{name}.data", size_threshold=1024)
    (folder / f"{name}-data").mkdir()
    mixing = rng.standard_normal((64, 64), np.float32) * np.linspace(0.1, 1, 64, dtype=np.float32)
    for number in range(8):
        x = rng.standard_normal((1, 24, 64), np.float32) @ mixing
        sample = {"x": x} if name == "encoder" else {"input_ids": rng.integers(0, 512, (1, 24))}
        np.savez(folder / f"{name}-data" / f"{number}.npz", **sample)
