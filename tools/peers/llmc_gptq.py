"""GPTQ by llm-compressor in PyTorch, in an environment of its own; prints one line of JSON.

    python -m venv VENV && VENV/bin/pip install torch llmcompressor
    VENV/bin/python tools/peers/llmc_gptq.py CHECKPOINT IDS.npz [--threads 1] [--weights WEIGHTS.npz]

CHECKPOINT is a Hugging Face folder: `checkpoint.py` writes that of the model we compare on. Act-order with static
groups, 4 bits, groups of 32, asymmetric, the head left float. Saving is not in the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="save what the Linears end with, for judge_weights.py")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = np.load(arguments.ids)["input_ids"]
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    loaded = time.monotonic() - start
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    recipe = GPTQModifier(
        actorder="static", ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    wall, cpu = time.monotonic(), time.process_time()
    oneshot(
        model=model, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids)
    )  # fmt: skip
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    if arguments.weights:
        linears = {n: m for n, m in model.named_modules() if n.split(".")[-1].endswith("_proj")}
        np.savez(arguments.weights, **{n: m.weight.detach().float().numpy().T for n, m in linears.items()})
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "load": loaded, "samples": ids.shape, "rss": rss}))


if __name__ == "__main__":
    main()
