"""Judge the weights that another tool ends with: put into our float ONNX file, by our own judge; prints one row.

    python tools/peers/judge_weights.py MODEL.onnx WEIGHTS.npz --dev dev.txt [--rows 8] [--seqlen 512] [--rtn KL]

WEIGHTS maps names of PyTorch modules (`model.layers.0.self_attn.q_proj`) to matrices `[K, N]`. Those of the checkpoint
itself must give a KL of 0 to rounding, which tells that the route is right.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_woq import Recipe, evaluate
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save


def module_of(node_name: str) -> str:
    """`/model/layers.0/self_attn/q_proj/MatMul` -> `model.layers.0.self_attn.q_proj`."""
    return ".".join(node_name.strip("/").split("/")[:-1])


def main() -> None:
    """Reads the command line and prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rtn", type=float, help="KL of RTN on the same text: prints the gap closed")
    given = parser.parse_args()
    model = load(given.model)
    groups, _ = find_linear_groups(model, Recipe("rtn", lm_head=False))
    replaced = 0
    with np.load(given.weights, allow_pickle=False) as weights:
        for linear in (linear for group in groups for linear in group.linears):
            new = weights[module_of(linear.node_name)].astype(np.float32)
            if new.shape != (linear.k, linear.n):
                raise SystemExit(f"{linear.node_name}: {new.shape} instead of {(linear.k, linear.n)}")
            value = model.ir.graph.initializers[linear.weight_name]
            value.const_value = ir.Tensor(np.ascontiguousarray(new), name=linear.weight_name)
            replaced += 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        save(model, out, metadata={})
        found = evaluate(
            out, given.model, given.dev, samples=given.rows, seqlen=given.seqlen, tokenizer=given.model.parent
        )
    gap = "" if given.rtn is None else f"  closed {1 - found.kl / given.rtn:.3f}"
    kl = f"KL {found.kl:.6f} ± {found.kl_se:.4f}"
    print(f"{given.weights.stem}: {replaced} weights, {kl}{gap}  top-1 {found.top1:.4f}")


if __name__ == "__main__":
    main()
