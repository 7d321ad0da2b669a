"""Small models that stress one thing each, written with `onnx.helper` alone.

Weights and activations are correlated (random low-rank mixing plus a little noise), as trained ones are: on white noise
every calibrated method equals rounding to nearest and a test of it proves nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, WIDE, LONGEST = 256, 64, 160, 64
F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
I64, BOOL = TensorProto.INT64, TensorProto.BOOL


def mixing(seed: int, rows: int, columns: int, rank: int = 12, noise: float = 0.15) -> np.ndarray:
    """A float32 matrix `[rows, columns]` of low rank plus noise, entries of variance about 1."""
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) / np.sqrt(rank)
    return (smooth + noise * rng.normal(size=(rows, columns))).astype(np.float32)


def weight(seed: int, rows: int, columns: int) -> np.ndarray:
    """A float32 weight `[rows, columns]` that keeps the size of what passes through it."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)


def correlated(seed: int, tokens: int, width: int, rank: int = 6, noise: float = 0.05) -> np.ndarray:
    """Activations `[tokens, width]` that live close to a subspace, a few channels larger than the rest."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(12345 + width).normal(size=(rank, width)) / np.sqrt(rank)
    x = rng.normal(size=(tokens, rank)) @ basis + noise * rng.normal(size=(tokens, width))
    return (x * np.linspace(0.3, 3.0, width)).astype(np.float32)


class Net:
    """A graph under construction: constants and nodes by value name."""

    def __init__(self, named: bool = True) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.named = named

    def const(self, name: str, array: np.ndarray, dtype: int | None = None) -> str:
        if dtype is None or dtype == helper.np_dtype_to_tensor_dtype(array.dtype):
            self.tensors.append(numpy_helper.from_array(array, name))
        else:
            target = helper.tensor_dtype_to_np_dtype(dtype)
            self.tensors.append(numpy_helper.from_array(array.astype(target), name))
        return name

    def op(self, kind: str, *inputs: str, out: str, domain: str = "", **attributes: Any) -> str:
        name = f"node/{out}" if self.named else ""
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=name, domain=domain, **attributes))
        return out

    def matmul(self, x: str, w: np.ndarray, out: str, weight_name: str = "", dtype: int | None = None) -> str:
        return self.op("MatMul", x, self.const(weight_name or f"W_{out}", w, dtype), out=out)

    def norm(self, x: str, gamma: np.ndarray, out: str) -> str:
        """RMSNorm as exporters write it out; no operator that changed between opset 13 and 25."""
        two, eps = self.const(f"{out}_two", np.float32(2)), self.const(f"{out}_eps", np.float32(1e-5))
        square = self.op("Pow", x, two, out=f"{out}_square")
        width = self.const(f"{out}_width", np.float32(len(gamma)))
        axes = self.const(f"{out}_axes", np.array([-1], np.int64))
        mean = self.op("Div", self.op("ReduceSum", square, axes, out=f"{out}_sum"), width, out=f"{out}_mean")
        root = self.op("Sqrt", self.op("Add", mean, eps, out=f"{out}_shift"), out=f"{out}_root")
        unit = self.op("Div", x, root, out=f"{out}_unit")
        return self.op("Mul", unit, self.const(f"{out}_gamma", gamma.astype(np.float32)), out=out)

    def save(
        self,
        path: Path,
        inputs: Mapping[str, tuple[int, Sequence[int | str]]],
        outputs: Mapping[str, tuple[int, Sequence[int | str] | None]],
        *,
        opset: int = 17,
        external: str = "",
        functions: Sequence[onnx.FunctionProto] = (),
        domains: Sequence[str] = (),
        check: bool = True,
    ) -> Path:
        """Writes and checks the model; `check` off for operators that ONNX Runtime has in ONNX's own domain."""
        graph = helper.make_graph(
            self.nodes,
            "zoo",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
            initializer=self.tensors,
        )
        imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(f.domain, 1) for f in functions]
        imports += [helper.make_opsetid(domain, 1) for domain in domains]
        model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
        model.ir_version = 8 if opset < 19 else 10
        path.parent.mkdir(parents=True, exist_ok=True)
        if external:
            options = {"all_tensors_to_one_file": True, "location": external, "size_threshold": 512}
            onnx.save(model, path, save_as_external_data=True, **options)
        else:
            onnx.save(model, path)
        if check:
            onnx.checker.check_model(str(path), full_check=True)
        return path


def language_model(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    tied: bool = False,
    external: str = "",
    opset: int = 17,
    projections: str = "qkv",
) -> Path:
    """A causal transformer: input_ids, attention_mask, position_ids -> logits [batch, seq, VOCAB].

    Per layer: q/k/v from one norm, o, gate and up from another, down. `tied` reads the head through a Transpose of the
    embedding. `projections` is the order of the nodes of q, k and v.
    """
    net = Net()
    table = net.const("embedding", mixing(seed, VOCAB, HIDDEN))
    positions = net.const("positions", 0.2 * mixing(seed + 1, LONGEST, HIDDEN))
    h = net.op("Gather", table, "input_ids", out="tokens")
    h = net.op("Add", h, net.op("Gather", positions, "position_ids", out="places"), out="h")
    late = np.triu(np.full((LONGEST, LONGEST), -1e4, np.float32), 1)
    zero, one = net.const("zero", np.array([0, 0], np.int64)), net.const("one", np.array([1], np.int64))
    shape = net.op("Shape", "input_ids", out="shape")
    length = net.op("Gather", shape, one, out="length")
    ends = net.op("Concat", length, length, out="ends", axis=0)
    mask = net.op("Slice", net.const("late", late), zero, ends, out="causal")
    present = net.op("Cast", "attention_mask", out="present", to=F32)
    absent = net.op("Sub", net.const("unit", np.float32(1)), present, out="absent")
    absent = net.op("Mul", absent, net.const("low", np.float32(-1e4)), out="hidden_low")
    mask = net.op("Add", mask, net.op("Unsqueeze", absent, one, out="hidden_row"), out="mask")
    gamma = np.linspace(0.5, 2.0, HIDDEN)
    for layer in range(layers):
        p, s = f"layer{layer}.", seed + 100 * (layer + 1)
        x = net.norm(h, gamma, f"{p}norm1")
        made = {n: net.matmul(x, weight(s + "qkv".index(n), HIDDEN, HIDDEN), p + n) for n in projections}
        q, k, v = (made[n] for n in "qkv")
        scores = net.op("MatMul", q, net.op("Transpose", k, out=f"{p}kt", perm=[0, 2, 1]), out=f"{p}scores")
        scores = net.op("Mul", scores, net.const(f"{p}scale", np.float32(HIDDEN**-0.5)), out=f"{p}scaled")
        share = net.op("Softmax", net.op("Add", scores, mask, out=f"{p}masked"), out=f"{p}share", axis=-1)
        mixed = net.op("MatMul", share, v, out=f"{p}mixed")
        h = net.op("Add", h, net.matmul(mixed, weight(s + 3, HIDDEN, HIDDEN), f"{p}o"), out=f"{p}h1")
        x = net.norm(h, gamma[::-1], f"{p}norm2")
        gate = net.op("Sigmoid", net.matmul(x, weight(s + 4, HIDDEN, WIDE), f"{p}gate"), out=f"{p}open")
        up = net.op("Mul", gate, net.matmul(x, weight(s + 5, HIDDEN, WIDE), f"{p}up"), out=f"{p}wide")
        h = net.op("Add", h, net.matmul(up, weight(s + 6, WIDE, HIDDEN), f"{p}down"), out=f"{p}h2")
    h = net.norm(h, gamma, "final")
    if tied:
        net.op("MatMul", h, net.op("Transpose", table, out="head", perm=[1, 0]), out="logits")
    else:
        net.matmul(h, 2.5 * weight(seed + 7, HIDDEN, VOCAB), "logits", "head")
    ids = (I64, ["batch", "seq"])
    return net.save(
        path,
        {"input_ids": ids, "attention_mask": ids, "position_ids": ids},
        {"logits": (F32, ["batch", "seq", VOCAB])},
        opset=opset,
        external=external,
    )


def token_ids(samples: int, length: int = 24, seed: int = 0) -> list[np.ndarray]:
    """`samples` rows of token ids [1, length], all different, some tokens far more frequent than others."""
    rng = np.random.default_rng(seed)
    return [np.minimum(rng.geometric(0.03, size=(1, length)), VOCAB - 1).astype(np.int64) for _ in range(samples)]


def lm_feeds(rows: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """All three inputs of `language_model` for rows of ids."""
    return [
        {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(),
        }
        for ids in rows
    ]


def array_folder(folder: Path, name: str, arrays: Sequence[np.ndarray]) -> Path:
    """Writes one .npz per sample and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        np.savez(folder / f"{i:04}.npz", **{name: array})
    return folder


def encoder(path: Path, *, seed: int = 0, external: str = "", named: bool = True, opset: int = 17) -> Path:
    """Float input x [batch, seq, HIDDEN] -> y: a MatMul fed by the graph input, two behind a norm, one that feeds y."""
    net = Net(named)
    first = net.matmul("x", weight(seed + 1, HIDDEN, HIDDEN), "first")
    x = net.norm(first, np.linspace(0.5, 2.0, HIDDEN), "norm")
    a = net.op("Relu", net.matmul(x, weight(seed + 2, HIDDEN, WIDE), "left"), out="left_on")
    b = net.op("Sigmoid", net.matmul(x, weight(seed + 3, HIDDEN, WIDE), "right"), out="right_on")
    net.matmul(net.op("Mul", a, b, out="product"), weight(seed + 4, WIDE, 48), "y")
    return net.save(
        path,
        {"x": (F32, ["batch", "seq", HIDDEN])},
        {"y": (F32, ["batch", "seq", 48])},
        external=external,
        opset=opset,
    )


def float_feeds(samples: int, length: int = 24, seed: int = 0, width: int = HIDDEN) -> list[dict[str, np.ndarray]]:
    """Correlated float inputs for the models with an input x [batch, seq, width]."""
    return [{"x": correlated(seed * 1000 + i, length, width)[None]} for i in range(samples)]


def siblings(path: Path, weights: Mapping[str, np.ndarray], *, norm: bool = False) -> Path:
    """x -> every weight [K, N] at once, each an output of its own: the calibrated loss can be read off the outputs."""
    k = len(next(iter(weights.values())))
    net = Net()
    x = net.norm("x", np.linspace(0.5, 2.0, k), "norm") if norm else "x"
    for name, w in weights.items():
        net.matmul(x, w, name)
    outputs = {name: (F32, ["batch", "seq", w.shape[1]]) for name, w in weights.items()}
    return net.save(path, {"x": (F32, ["batch", "seq", k])}, outputs)


def chain(path: Path, widths: Sequence[int] = (600, 144, 37, 19, 1), *, dtype: int = F32, opset: int = 17) -> Path:
    """x [batch, widths[0]] -> MatMul -> … ; every value in between is an output, h0 being the first."""
    net, x, outputs = Net(), "x", {}
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        x = net.matmul(x, weight(i, k, n), f"h{i}", dtype=dtype)
        outputs[x] = (dtype, ["batch", n])
    return net.save(path, {"x": (dtype, ["batch", widths[0]])}, outputs, opset=opset)


def gemms(path: Path) -> Path:
    """Every form of Gemm that is a linear layer; a [batch, 40] -> outputs g0 … g9."""
    net, outputs = Net(), {}
    rng = np.random.default_rng(3)
    biases = {
        "row": rng.normal(size=24),
        "line": rng.normal(size=(1, 24)),
        "one": rng.normal(size=1),
        "scalar": rng.normal(),
    }
    forms = [(t, None, 1.0, 1.0) for t in (0, 1)]
    forms += [(t, b, 1.0, 1.0) for t in (0, 1) for b in ("row", "line")]
    forms += [(0, "one", 1.0, 1.0), (1, "scalar", 1.0, 1.0), (0, "row", 0.5, 2.0), (1, "row", -1.5, 0.25)]
    for i, (trans, bias, alpha, beta) in enumerate(forms):
        w = weight(20 + i, 40, 24)
        args = ["a", net.const(f"W{i}", w.T if trans else w)]
        if bias:
            args.append(net.const(f"C{i}", np.asarray(biases[bias], np.float32)))
        net.op("Gemm", *args, out=f"g{i}", transB=trans, alpha=alpha, beta=beta)
        outputs[f"g{i}"] = (F32, ["batch", 24])
    return net.save(path, {"a": (F32, ["batch", 40])}, outputs)


def constants(path: Path) -> Path:
    """Weights behind Constant, Transpose, Cast, Identity and leading 1-dims, and one read through two inputs."""
    net, k, n = Net(), 48, 40
    tensor = numpy_helper.from_array(weight(1, k, n), "")
    net.nodes.append(helper.make_node("Constant", [], ["W_constant"], name="node/constant", value=tensor))
    net.op("MatMul", "x", "W_constant", out="by_constant")
    net.op("Transpose", net.const("W_t", weight(2, n, k)), out="W_turned", perm=[1, 0])
    net.op("MatMul", "x", "W_turned", out="by_transpose")
    net.op("Cast", net.const("W_half", weight(3, k, n), F16), out="W_wide", to=F32)
    net.op("MatMul", "x", "W_wide", out="by_cast")
    net.op("Cast", net.const("W_brain", weight(4, k, n), BF16), out="W_wide2", to=F32)
    net.op("MatMul", "x", "W_wide2", out="by_cast_bf16")
    net.op("Identity", net.const("W_same", weight(5, k, n)), out="W_alias")
    net.op("MatMul", "x", "W_alias", out="by_identity")
    net.matmul("x", weight(6, k, n)[None], "by_squeeze")
    shared = net.const("W_shared", weight(7, k, n))
    net.op("MatMul", "x", shared, out="shared_1")
    net.op("MatMul", net.op("Relu", "x", out="relu"), shared, out="shared_2")
    names = ("constant", "transpose", "cast", "cast_bf16", "identity", "squeeze")
    outputs = {f"by_{name}": (F32, ["b", "s", n]) for name in names} | {
        f"shared_{i}": (F32, ["b", "s", n]) for i in (1, 2)
    }
    return net.save(path, {"x": (F32, ["b", "s", k])}, outputs)


def branches(path: Path, *, same_names: bool = False) -> Path:
    """x, flag -> If(flag: x·A, else relu(x)·B) -> ·C. `same_names`: both bodies call their values alike."""
    k, net = 48, Net()
    bodies = []
    for which, (name, seed) in enumerate((("yes", 1), ("no", 2))):
        w, out = ("W", "body_out") if same_names else (f"W_{name}", f"{name}_out")
        inner = Net()
        inner.const(w, weight(seed, k, k))
        inner.op("MatMul", inner.op("Relu", "x", out=f"{name}_relu") if which else "x", w, out=out)
        value = helper.make_tensor_value_info(out, F32, None)
        bodies.append(helper.make_graph(inner.nodes, name, [], [value], initializer=inner.tensors))
    chosen = net.op("If", "flag", out="chosen", then_branch=bodies[0], else_branch=bodies[1])
    net.matmul(chosen, weight(3, k, 24), "y")
    return net.save(path, {"x": (F32, ["b", "s", k]), "flag": (BOOL, [])}, {"y": (F32, ["b", "s", 24])})


def loop(path: Path) -> Path:
    """x -> three times tanh(h·A) in a Loop body -> ·B."""
    k, net, body = 48, Net(), Net()
    body.op("Identity", "go_in", out="go_out")
    body.op("Tanh", body.matmul("h_in", weight(1, k, k), "step"), out="h_out")
    graph = helper.make_graph(
        body.nodes,
        "body",
        [
            helper.make_tensor_value_info("i", I64, []),
            helper.make_tensor_value_info("go_in", BOOL, []),
            helper.make_tensor_value_info("h_in", F32, None),
        ],
        [helper.make_tensor_value_info("go_out", BOOL, []), helper.make_tensor_value_info("h_out", F32, None)],
        initializer=body.tensors,
    )
    times, go = net.const("times", np.int64(3)), net.const("go", np.bool_(True))
    net.matmul(net.op("Loop", times, go, "x", out="looped", body=graph), weight(2, k, 24), "y")
    return net.save(path, {"x": (F32, ["b", "s", k])}, {"y": (F32, ["b", "s", 24])})


def functions(path: Path) -> Path:
    """Two calls of a model-local function relu(x·w), its weight an argument."""
    call = helper.make_function(
        "local",
        "Linear",
        ["a", "w"],
        ["r"],
        [helper.make_node("MatMul", ["a", "w"], ["p"]), helper.make_node("Relu", ["p"], ["r"])],
        [helper.make_opsetid("", 17)],
    )
    net = Net()
    h = net.op("Linear", "x", net.const("W1", weight(1, 48, 40)), out="h", domain="local")
    net.op("Linear", h, net.const("W2", weight(2, 40, 24)), out="y", domain="local")
    return net.save(path, {"x": (F32, ["b", "s", 48])}, {"y": (F32, ["b", "s", 24])}, functions=[call])


def leftovers(path: Path) -> Path:
    """Two eligible products, `good` and `turned`, among others that cannot be quantized."""
    k, net = 48, Net()
    net.matmul("x", weight(1, k, 32), "good")
    net.op("MatMul", "x", "other", out="no_constant")
    net.matmul("x", np.stack([weight(2, k, 32), weight(3, k, 32)]), "batched")
    net.op(
        "Gemm",
        net.op("Transpose", "a", out="at", perm=[1, 0]),
        net.const("W_ta", weight(4, k, 8)),
        out="turned",
        transA=1,
    )
    outputs = {
        "good": (F32, [2, "s", 32]),
        "no_constant": (F32, [2, "s", 8]),
        "batched": (F32, [2, "s", 32]),
        "turned": (F32, ["rows", 8]),
    }
    inputs = {"x": (F32, [2, "s", k]), "other": (F32, [2, k, 8]), "a": (F32, ["rows", k])}
    return net.save(path, inputs, outputs)


def no_weights(path: Path) -> Path:
    """A model without any eligible MatMul."""
    net = Net()
    net.op("MatMul", "x", "y", out="z")
    return net.save(path, {"x": (F32, [4, 8]), "y": (F32, [8, 4])}, {"z": (F32, [4, 4])})


def broken_activations(path: Path) -> Path:
    """x -> Sqrt -> MatMul: negative inputs make the value `root` NaN."""
    net = Net()
    net.matmul(net.op("Sqrt", "x", out="root"), weight(1, 48, 32), "y")
    return net.save(path, {"x": (F32, ["b", "s", 48])}, {"y": (F32, ["b", "s", 32])})


def byte_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 256 tokens without merges, in the files that Hugging Face tokenizers have."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (256 + i for i in range(256))
    vocab = {chr(b if b in printable else next(rest)): b for b in range(256)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": LONGEST})
    )
