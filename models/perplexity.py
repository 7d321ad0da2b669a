"""Perplexity of an ONNX causal language model on a text, as it is or with its MatMul weights rounded.

    python models/text.py /tmp/text
    python models/perplexity.py models/demo /tmp/text/dev.txt
    python models/perplexity.py models/demo /tmp/text/dev.txt --bits 3 --group 32

Rounding here is the plainest there is, asymmetric round-to-nearest written back as float32: a yardstick for the
quantizers this repository is about, which it deliberately does not use.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


def token_rows(model_dir: Path, text: str, tokens: int, context: int) -> Ids:
    """Return the text's first ids as whole windows `[B, L]`, at most `tokens` of them."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    rows = min(tokens, len(ids)) // context
    return ids[: rows * context].reshape(rows, context)


def feeds(session: ort.InferenceSession, ids: Ids) -> dict[str, np.ndarray]:
    """Return the model's inputs for ids `[B, L]` and an empty past."""
    batch, length = ids.shape
    values: dict[str, np.ndarray] = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
    }
    for past in (i for i in session.get_inputs() if i.name.startswith("past_key_values.")):
        _, heads, _, size = past.shape
        values[past.name] = np.zeros((batch, heads, 0, size), np.float32)
    return values


def perplexity(model: onnx.ModelProto, rows: Ids) -> float:
    """Return exp of the mean next-token loss over windows `[B, L]`, each read from an empty past."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    losses = []
    for row in rows:
        logits = session.run(["logits"], feeds(session, row[None]))[0][0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(row) - 1), row[1:]])
    return float(np.exp(np.mean(losses)))


def round_to_nearest(weight: Floats, bits: int, group: int) -> Floats:
    """Return a weight `[K, N]` on a grid of `2**bits` levels per `group` rows, zero being one of the levels."""
    rounded = np.empty_like(weight)
    for start in range(0, weight.shape[0], group):
        part = weight[start : start + group]
        low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
        scale = np.where(high > low, (high - low) / (2**bits - 1), 1)
        zero = np.rint(-low / scale)
        rounded[start : start + group] = (np.clip(np.rint(part / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return rounded


def round_matmuls(model: onnx.ModelProto, bits: int, group: int) -> int:
    """Round every constant MatMul weight of a model in place and return how many there were.

    The head's weight is the embedding, transposed; only the head's own copy of it is rounded.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    rounded = 0
    for node in (n for n in model.graph.node if n.op_type == "MatMul"):
        name = node.input[1]
        if name in tensors:
            weight = round_to_nearest(onnx.numpy_helper.to_array(tensors[name]), bits, group)
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(weight, name))
        elif transposed.get(name) in tensors:
            weight = round_to_nearest(onnx.numpy_helper.to_array(tensors[transposed[name]]).T, bits, group)
            node.input[1] = f"{name}_rounded"
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.input[1]))
        else:  # the product of two activations
            continue
        rounded += 1
    return rounded


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description="Perplexity of an exported causal language model on a text.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--bits", type=int, help="round MatMul weights to this many bits first")
    parser.add_argument("--group", type=int, default=32)
    args = parser.parse_args()
    model = onnx.load(args.model_dir / "model.onnx")
    rows = token_rows(args.model_dir, args.text.read_text(encoding="utf-8"), args.tokens, args.context)
    rounded = round_matmuls(model, args.bits, args.group) if args.bits else 0
    print(json.dumps({"perplexity": round(perplexity(model, rows), 3), "tokens": rows.size, "rounded": rounded}))


if __name__ == "__main__":
    main()
