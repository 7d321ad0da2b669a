"""auto-round in PyTorch, in an environment of its own; saves the weights it ends with and prints one line of JSON.

    python -m venv VENV && VENV/bin/pip install torch auto-round
    VENV/bin/python tools/peers/autoround.py CHECKPOINT IDS.npz WEIGHTS.npz [--iters 200] [--threads 1]

CHECKPOINT is what `checkpoint.py` writes, IDS what `ids.py` does. 4 bits, groups of 32, asymmetric, the head
left float. WEIGHTS holds every quantized Linear as `[K, N]`, to be judged by `judge_weights.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    ids = torch.tensor(np.load(given.ids)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    wall, cpu = time.monotonic(), time.process_time()
    tool = AutoRound(
        model, tokenizer, bits=4, group_size=32, sym=False, iters=given.iters, batch_size=given.batch,
        seqlen=ids.shape[1], nsamples=len(ids), dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        device_map="cpu", amp=False, seed=0,
    )  # fmt: skip
    done, _ = tool.quantize()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    linears = {n: m for n, m in done.named_modules() if hasattr(m, "weight") and n.split(".")[-1].endswith("_proj")}
    np.savez(given.weights, **{n: m.weight.detach().float().numpy().T for n, m in linears.items()})
    print(json.dumps({"tool": "auto-round", "iters": given.iters, "wall": wall, "cpu": cpu, "linears": len(linears)}))


if __name__ == "__main__":
    main()
