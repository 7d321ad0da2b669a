"""auto-round in PyTorch, in an environment of its own; saves the weights it ends with and prints one line of JSON.

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 auto-round==0.16.1
    VENV/bin/python tools/peers/autoround.py CHECKPOINT IDS.npz WEIGHTS.npz [--iters 200] [--threads 1]

CHECKPOINT is what `checkpoint.py` writes, IDS what `ids.py` does. 4 bits, groups of 32, asymmetric, the head
left float, auto-round's own defaults but for bfloat16, which would round all weights (`amp=False`). WEIGHTS holds every
quantized Linear as `[K, N]`, to be judged by `judge_weights.py`.

Every finished decoder layer is kept in the folder WEIGHTS.d with a time stamp in WEIGHTS.d/progress.jsonl; the same
command goes on after the last of them (the batches it then draws are others: it is not bit for bit the same run). The
CPU seconds of all its attempts are added up. `--stop-after N` ends after N layers, and WEIGHTS then holds those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch


class Enough(Exception):
    """As many layers as were asked for."""


class Rows(torch.utils.data.DataLoader):
    """Calibration rows whose name does not change from run to run: auto-round resumes only on the same data."""

    def __repr__(self) -> str:
        return f"{len(self.dataset)} rows"


def cpu() -> float:
    """Seconds of this process and of the compilers it started."""
    kinds = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in kinds)


class Keeper:
    """Keeps each layer as it is finished, and what it cost.

    Attributes:
        folder: WEIGHTS.d.
        spent: CPU seconds of earlier attempts, up to the last layer they finished.
    """

    def __init__(self, folder: Path, model: torch.nn.Module, stop_after: int | None) -> None:
        self.folder, self.model, self.stop_after = folder, model, stop_after
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "progress.jsonl"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.spent = json.loads(lines[-1])["cpu"] if lines else 0.0
        self.begin = cpu()

    def total(self) -> float:
        """CPU seconds of all attempts."""
        return self.spent + cpu() - self.begin

    def keep(self, block: str) -> None:
        """Called when auto-round has put a layer's final weights in place."""
        linears = {n: m for n, m in self.model.get_submodule(block).named_modules() if n.endswith("_proj")}
        new = {f"{block}.{n}": m.weight.detach().float().numpy().T for n, m in linears.items()}
        np.savez(self.folder / f"{block}.npz", **new)
        line = {"time": time.strftime("%F %T"), "block": block, "linears": len(new), "cpu": round(self.total(), 1)}
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        if self.stop_after is not None and len(list(self.folder.glob("*.npz"))) >= self.stop_after:
            raise Enough

    def weights(self) -> dict[str, np.ndarray]:
        """All that was kept."""
        new: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as found:
                new |= dict(found)
        return new


def tune(given: argparse.Namespace, keeper: Keeper) -> None:
    """Runs auto-round on `keeper.model`.

    Raises:
        Enough: `--stop-after` layers are done.
    """
    from auto_round import AutoRound
    from auto_round.utils.resume import ResumeState
    from transformers import AutoTokenizer

    done = ResumeState.mark_block_done

    def mark(self: ResumeState, block: str, *state: object) -> None:
        done(self, block, *state)
        keeper.keep(block)

    ResumeState.mark_block_done = mark
    ids = torch.tensor(np.load(given.ids)["input_ids"])
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    AutoRound(
        keeper.model, AutoTokenizer.from_pretrained(given.checkpoint), bits=4, group_size=32, sym=False,
        iters=given.iters, batch_size=given.batch, seqlen=ids.shape[1], nsamples=len(ids),
        dataset=Rows(rows, batch_size=None), device_map="cpu", amp=False, seed=0, enable_torch_compile=given.compile,
    ).quantize()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stop-after", type=int, metavar="N")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    folder = given.weights.with_suffix(".d")
    os.environ["AR_RESUME_DIR"] = str(folder / "resume")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)
    keeper = Keeper(folder, model, given.stop_after)
    wall = time.monotonic()
    with contextlib.suppress(Enough):
        tune(given, keeper)
    new = keeper.weights()
    np.savez(given.weights, **new)
    figures = {"wall": time.monotonic() - wall, "cpu": keeper.total(), "linears": len(new)}
    print(json.dumps({"tool": f"auto-round {given.iters}", **figures}))


if __name__ == "__main__":
    main()
