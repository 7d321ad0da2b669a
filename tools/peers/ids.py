"""The tokens that onnx-woq calibrates on, for the other tools: writes `input_ids [samples, seqlen]`.

python tools/peers/ids.py MODEL.onnx TEXT IDS.npz [--samples 32] [--seqlen 512]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from onnx_woq.graph.io.model import load
from onnx_woq.runtime.data.feeds import feeds, model_inputs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    found = feeds(
        given.text, model_inputs(load(given.model)), samples=given.samples, seqlen=given.seqlen, exact_length=True,
        tokenizer=None, model_dir=given.model.parent, at_most=False,
    )  # fmt: skip
    np.savez(given.ids, input_ids=np.concatenate([feed["input_ids"] for feed in found]))
