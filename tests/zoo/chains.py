"""Products in a row and a small language model with a past, and numpy forms of what flows in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.zoo.nodes import FLOAT16, INT64, graph, node, random, value, write

K = 32
WIDTHS = {"A": (K, 48), "B": (48, K), "C": (K, 40), "D": (40, K), "E": (K, K)}
WEIGHTS = {name: random(*shape, seed=i) / 6 for i, (name, shape) in enumerate(WIDTHS.items())}
GAMMA = 1 + random(K, seed=9) / 8


def chain(path: Path, dtype: type[np.floating] = np.float32, external: bool = False) -> Path:
    """Two residual blocks and a head: `r = x + tanh(x·g@A)@B`, `s = r + tanh(r·g@C)@D`, `y = s@E`."""
    nodes = [
        node("Mul", ["x", "g1"], ["n1"]),
        node("MatMul", ["n1", "A"], ["a"], name="a"),
        node("Tanh", ["a"], ["ta"]),
        node("MatMul", ["ta", "B"], ["b"], name="b"),
        node("Add", ["x", "b"], ["r"]),
        node("Mul", ["r", "g2"], ["n2"]),
        node("MatMul", ["n2", "C"], ["c"], name="c"),
        node("Tanh", ["c"], ["tc"]),
        node("MatMul", ["tc", "D"], ["d"], name="d"),
        node("Add", ["r", "d"], ["s"]),
        node("MatMul", ["s", "E"], ["y"], name="e"),
    ]
    kind = FLOAT16 if dtype == np.float16 else 1
    weights = {name: w.astype(dtype) for name, w in {**WEIGHTS, "g1": GAMMA, "g2": GAMMA}.items()}
    main = graph(nodes, [value("x", ("b", "t", K), kind)], [value("y", ("b", "t", K), kind)], weights)
    return write(path, main, external=external)


def chain_inputs(x: np.ndarray, weights: dict[str, np.ndarray] = WEIGHTS) -> dict[str, np.ndarray]:
    """What flows into each weight of `chain` for `x [..., K]`, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = x.astype(np.float64)
    n1 = x * GAMMA
    ta = np.tanh(n1 @ w["A"])
    r = x + ta @ w["B"]
    n2 = r * GAMMA
    tc = np.tanh(n2 @ w["C"])
    return {"A": n1, "B": ta, "C": n2, "D": tc, "E": r + tc @ w["D"]}


VOCABULARY = 64


def language_model(path: Path, *, past: bool = True, positions: bool = True, types: bool = False) -> Path:
    """Embedding, one MatMul, a running mean over the past and the tokens before, and logits; masks are ignored."""
    ids = value("input_ids", ("batch_size", "sequence_length"), INT64)
    inputs = [ids, value("attention_mask", ("batch_size", "total_length"), INT64)]
    nodes = [
        node("Gather", ["table", "input_ids"], ["h0"]),
        node("MatMul", ["h0", "W"], ["k"], name="w"),
        node("Cast", ["attention_mask"], ["m"], to=1),
        node("ReduceMin", ["m"], ["one"], keepdims=0),
    ]
    last = "k"
    outputs = [value("logits", ("batch_size", "sequence_length", VOCABULARY))]
    if positions:
        inputs.append(value("position_ids", ("batch_size", "sequence_length"), INT64))
        nodes += [node("Gather", ["places", "position_ids"], ["p"]), node("Add", [last, "p"], ["kp"])]
        last = "kp"
    if types:
        inputs.append(value("token_type_ids", ("batch_size", "sequence_length"), INT64))
        nodes += [node("Gather", ["types", "token_type_ids"], ["y"]), node("Add", [last, "y"], ["ky"])]
        last = "ky"
    if past:
        inputs.append(value("past_key_values.0.key", ("batch_size", 1, "past_length", K)))
        nodes += [
            node("Unsqueeze", [last, "axis"], ["k4"]),
            node("Concat", ["past_key_values.0.key", "k4"], ["present.0.key"], axis=2),
        ]
        outputs.append(value("present.0.key", ("batch_size", 1, "total_length", K)))
    nodes.append(node("MatMul", [last, "head"], ["logits"], name="head"))
    weights = {
        "table": random(VOCABULARY, K, seed=1),
        "W": random(K, K, seed=2) / 6,
        "places": random(256, K, seed=3),
        "types": random(2, K, seed=4),
        "head": random(K, VOCABULARY, seed=5) / 3,
        "axis": np.array([1], np.int64),
    }
    used = {name for n in nodes for name in n.input}
    return write(path, graph(nodes, inputs, outputs, {k: w for k, w in weights.items() if k in used}))


def byte_tokenizer(folder: Path, *, closing: bool = False) -> Path:
    """A tokenizer.json that maps the letters a–z, space and a few signs to ids below the vocabulary's size."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz .,\n'!?"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def letter_ids(text: str) -> list[int]:
    """What `byte_tokenizer` gives, without special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz .,\n'!?"
    return [letters.index(c) + 3 if c in letters else 0 for c in text]
