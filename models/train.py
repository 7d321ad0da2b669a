"""Train the demo model from nothing on this Python's own documentation and export it to ONNX.

    python models/train.py                    # about half an hour on one core; writes models/demo
    python models/train.py --steps 600        # a rough model in a few minutes

Needs torch, transformers, tokenizers and optimum-onnx; nothing is downloaded. Every random choice is seeded; the
result still depends on the Python version (its text), on the libraries' versions and on the processor.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import text
import torch
from optimum.exporters.onnx import main_export
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
SHIPPED = ("model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the trained model becomes, besides the text."""

    steps: int = 6000
    tokens_per_step: int = 2048
    short: int = 128  # tokens per sequence, at first
    long: int = 512  # tokens per sequence for the last part, so that the whole context is trained
    long_share: float = 0.2
    peak_lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    vocab_size: int = 1280
    seed: int = 0
    threads: int = 1  # sums depend on it, so the same number everywhere

    def sequence_length(self, step: int) -> int:
        """Return the number of tokens per sequence at a step."""
        return self.long if step >= self.steps * (1 - self.long_share) else self.short

    def lr(self, step: int) -> float:
        """Return the learning rate: linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def train_tokenizer(documents: list[str], vocab_size: int) -> GPT2TokenizerFast:
    """Return a byte-level BPE tokenizer in GPT-2's manner, so any text has ids and comes back unchanged."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)


def token_stream(tokenizer: GPT2TokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return the documents' ids `[T]`, each document after an end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    return torch.tensor([i for e in encoded for i in (tokenizer.eos_token_id, *e.ids)])


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield ids `[B, L]`: windows of the stream in random order, cut anew, at a new offset, for every pass over it."""
    rng = np.random.default_rng(recipe.seed)
    step = 0
    while step < recipe.steps:
        length = recipe.sequence_length(step)
        rows = recipe.tokens_per_step // length
        starts = np.arange(rng.integers(length), len(stream) - length, length)
        rng.shuffle(starts)
        for i in range(0, len(starts) - rows + 1, rows):
            if step == recipe.steps or recipe.sequence_length(step) != length:
                break
            yield torch.stack([stream[s : s + length] for s in starts[i : i + rows]])
            step += 1


def build_model(tokenizer: GPT2TokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Return an untrained model.

    Its widths, 160 and 416, are multiples of 32 but not of 128, so groups of 128 weights end in a short group.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        max_position_embeddings=recipe.long,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> None:
    """Train in place with AdamW on next-token loss, logging the loss on held-out ids now and then."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=True)
    started, running = time.monotonic(), 0.0
    for step, ids in enumerate(batches(stream, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            logger.info("step %d  train %.3f  %.0f s", step + 1, running, time.monotonic() - started)
        if step % 1000 == 999 or step == recipe.steps - 1:
            logger.info("step %d  held out %.3f", step + 1, mean_loss(model, held_out, recipe.long))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int, rows: int = 32) -> float:
    """Return the next-token loss in nats on the stream's first windows."""
    model.eval()
    windows = stream[: len(stream) // length * length].view(-1, length)[:rows]
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() for w in windows.split(16)]
    model.train()
    return float(np.mean(losses))


def export(model: LlamaForCausalLM, tokenizer: GPT2TokenizerFast, out_dir: Path) -> None:
    """Write the ONNX graph with a key-value cache, the configuration and the tokenizer into a directory."""
    model.eval()
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, exported = Path(scratch, "checkpoint"), Path(scratch, "exported")
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        main_export(
            str(checkpoint), str(exported), task="text-generation-with-past", opset=18, library_name="transformers"
        )
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            shutil.copy(exported / name, out_dir / name)


def main() -> None:
    """Train, export, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe(steps=args.steps)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)

    documents = text.parts(text.documents())
    tokenizer = train_tokenizer(documents["train"], recipe.vocab_size)
    stream, held_out = token_stream(tokenizer, documents["train"]), token_stream(tokenizer, documents["calib"])
    model = build_model(tokenizer, recipe)
    fit(model, stream, held_out, recipe)
    export(model, tokenizer, args.out)
    facts = {
        "parameters": model.num_parameters(),
        "train tokens": len(stream),
        "tokens seen": recipe.steps * recipe.tokens_per_step,
        "model.onnx bytes": (args.out / "model.onnx").stat().st_size,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
