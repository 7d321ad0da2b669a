"""Small models with layers, as exporters write them: decoders, encoders, pairs, merged branches, and what has none.

All are made of `onnx.helper` calls. Every builder writes `path` and returns it; the `*_feed` functions make inputs for
them. Names of weights and values say their layer: "layer2.q.weight".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, helper

from tests.zoo.layers import HEAD, HEADS, I32, LONGEST, MS, VOCAB, WIDE, D, Layers
from tests.zoo.small import BOOL, F16, F32, I64, Net, weight

Feed = dict[str, np.ndarray]


def _hide(net: Layers, blocked: str, out: str) -> str:
    """0 where attention may look, nearly the lowest number where `blocked`: a row that sees nothing sees all alike."""
    low = net.const("low", np.float32(-6e4 if net.dtype == F16 else -3e38))
    zero = net.const("none", np.float32(0))
    return net.op("Where", blocked, low, zero, out=out)


def _causal_mask(net: Layers, past: str) -> str:
    """[B, 1, T, past + T] from attention_mask, the ids' shape and the past's shape."""
    zero = net.const("zero", np.int64(0))
    at = lambda source, axis, out: net.op(  # noqa: E731
        "Gather", net.op("Shape", source, out=f"{out}_shape"), net.const(f"axis{axis}", np.int64(axis)), out=out
    )
    length, before = at("input_ids", 1, "length"), at(past, 2, "before") if past else zero
    total = net.op("Add", length, before, out="total")
    step = net.const("step", np.int64(1))
    rows = net.op("Unsqueeze", net.op("Range", before, total, step, out="rows"), net.ints(1), out="rows_2d")
    columns = net.op("Range", zero, total, step, out="columns")
    late = net.op("Greater", columns, rows, out="late")
    absent = net.op("Equal", "attention_mask", zero, out="absent")
    absent = net.op("Unsqueeze", absent, net.ints(1, 2), out="absent_4d")
    return _hide(net, net.op("Or", late, absent, out="blocked"), "mask")


def _rotary(net: Layers) -> tuple[str, str]:
    """cos and sin [B, 1, T, head] from position_ids, in float32 and then cast."""
    where = net.op("Unsqueeze", net.op("Cast", "position_ids", out="pos_float", to=F32), net.ints(2), out="pos_3d")
    inv = net.const("inv_freq", (1e4 ** -(np.arange(0, HEAD, 2) / HEAD)).astype(np.float32), F32)
    angle = net.op("Mul", where, inv, out="angle")
    both = net.op("Concat", angle, angle, out="angles", axis=-1)
    tables = [
        net.op(
            "Unsqueeze",
            net.op("Cast", net.op(kind, both, out=f"raw_{kind}"), out=f"cast_{kind}", to=net.dtype),
            net.ints(1),
            out=kind.lower(),
        )
        for kind in ("Cos", "Sin")
    ]
    return tables[0], tables[1]


def _rotate(net: Layers, x: str, cos: str, sin: str, out: str) -> str:
    half, last = net.ints(HEAD // 2), net.ints(-1)
    left = net.op("Slice", x, net.ints(0), half, last, out=f"{out}_left")
    right = net.op("Slice", x, half, net.ints(HEAD), last, out=f"{out}_right")
    turned = net.op("Concat", net.op("Neg", right, out=f"{out}_neg"), left, out=f"{out}_turned", axis=-1)
    one, two = net.op("Mul", x, cos, out=f"{out}_cos"), net.op("Mul", turned, sin, out=f"{out}_sin")
    return net.op("Add", one, two, out=out)


def decoder_body(net: Layers, layers: int, *, past: bool, tied: bool = False) -> dict[str, str]:
    """The nodes of a decoder; output name -> the value that holds it."""
    mask = _causal_mask(net, "past_key_values.0.key" if past else "")
    cos, sin = _rotary(net)
    shape, h, outputs = net.head_shape(), net.embed(), {}
    for layer in range(layers):
        p, s = f"layer{layer}.", 100 * (layer + 1)
        x = net.rms_norm(h, f"{p}norm1")
        q, k, v = (net.heads(net.linear(x, p + n, D, D, s + i), p + n + "_heads", shape) for i, n in enumerate("qkv"))
        q, k = _rotate(net, q, cos, sin, f"{p}q_rot"), _rotate(net, k, cos, sin, f"{p}k_rot")
        held = {}
        for name, new in (("key", k), ("value", v)):
            out = f"present.{layer}.{name}"
            old = f"past_key_values.{layer}.{name}"
            held[name] = net.op("Concat", old, new, out=out, axis=2) if past else net.op("Identity", new, out=out)
            outputs[out] = held[name]
        o = net.linear(net.attend(q, held["key"], held["value"], mask, p), f"{p}o", D, D, s + 3)
        h = net.op("Add", h, o, out=f"{p}h1")
        h = net.op("Add", h, net.gated(net.rms_norm(h, f"{p}norm2"), p, s), out=f"{p}h2")
    h = net.rms_norm(h, "final")
    if tied:
        outputs["logits"] = net.op(
            "MatMul", h, net.op("Transpose", "embedding", out="turned", perm=[1, 0]), out="logits"
        )
    else:
        outputs["logits"] = net.linear(h, "logits", D, VOCAB, 9)
    return outputs


def _ids_inputs(*names: str) -> dict[str, tuple[int, list[str]]]:
    widths = {"attention_mask": "total"}
    return {name: (I64, ["batch", widths.get(name, "seq")]) for name in names}


def _cache(layers: int, dtype: int, name: str, length: str) -> dict[str, tuple[int, list[Any]]]:
    return {
        f"{name}.{i}.{kv}": (dtype, ["batch", HEADS, length, HEAD]) for i in range(layers) for kv in ("key", "value")
    }


def decoder(
    path: Path, *, opset: int = 17, layers: int = 4, dtype: int = F32, tied: bool = False, external: str = ""
) -> Path:
    """As optimum exports it: ids, mask, positions and past in, logits and present out; rotary tables inside."""
    net = Layers(dtype, opset)
    decoder_body(net, layers, past=True, tied=tied)
    inputs = _ids_inputs("input_ids", "attention_mask", "position_ids") | _cache(
        layers, dtype, "past_key_values", "past"
    )
    outputs = {"logits": (dtype, ["batch", "seq", VOCAB])} | _cache(layers, dtype, "present", "total")
    return net.save(path, inputs, outputs, opset=opset, external=external)


def merged_decoder(path: Path, *, layers: int = 3) -> Path:
    """Optimum's merged decoder: one If over use_cache_branch, its branches read the weights of the outer graph."""
    branches: list[GraphProto] = []
    outer = Layers()
    for name, past in (("with_past", True), ("without_past", False)):
        net = Layers(prefix=f"{name}/")
        net.tensors = outer.tensors
        made = decoder_body(net, layers, past=past)
        results = [helper.make_tensor_value_info(value, F32, None) for value in made.values()]
        branches.append(helper.make_graph(net.nodes, name, [], results))
    outer.several("If", ["use_cache_branch"], list(made), then_branch=branches[0], else_branch=branches[1])
    inputs = _ids_inputs("input_ids", "attention_mask", "position_ids") | _cache(layers, F32, "past_key_values", "past")
    inputs["use_cache_branch"] = (BOOL, [1])
    outputs = {"logits": (F32, ["batch", "seq", VOCAB])} | _cache(layers, F32, "present", "total")
    return outer.save(path, inputs, {name: outputs[name] for name in made}, opset=17)


def fused_decoder(path: Path, *, layers: int = 4, dtype: int = F32) -> Path:
    """As onnxruntime-genai builds it: GroupQueryAttention and Skip norms, so two streams run from layer to layer."""
    net = Layers(dtype)
    one = net.op("ReduceSum", "attention_mask", net.ints(1), out="lengths", keepdims=0)
    ends = net.op("Cast", net.op("Sub", one, net.ints(1), out="last"), out="seqlens_k", to=I32)
    total = net.op(
        "Gather", net.op("Shape", "attention_mask", out="mask_shape"), net.const("one", np.int64(1)), out="t"
    )
    total = net.op("Cast", total, out="total_length", to=I32)
    angle = np.outer(np.arange(LONGEST), 1e4 ** -(np.arange(0, HEAD, 2) / HEAD)).astype(np.float32)
    tables = net.const("cos_cache", np.cos(angle)), net.const("sin_cache", np.sin(angle))
    h = net.embed()
    x = net.op("SimplifiedLayerNormalization", h, net.gamma("layer0.norm1"), out="layer0.norm1", axis=-1, epsilon=1e-5)
    skip = {"domain": MS, "epsilon": 1e-5}
    for layer in range(layers):
        p, s = f"layer{layer}.", 100 * (layer + 1)
        q, k, v = (net.linear(x, p + n, D, D, s + i) for i, n in enumerate("qkv"))
        held = [f"{name}.{layer}.{kv}" for name in ("past_key_values", "present") for kv in ("key", "value")]
        context, *_ = net.several(
            "GroupQueryAttention", [q, k, v, *held[:2], ends, total, *tables], [f"{p}context", *held[2:]], MS,
            num_heads=HEADS, kv_num_heads=HEADS, do_rotary=1, scale=HEAD**-0.5,
        )  # fmt: skip
        o = net.linear(context, f"{p}o", D, D, s + 3)
        names = [f"{p}norm2", "", "", f"{p}h1"]
        x, _, _, h = net.several("SkipSimplifiedLayerNormalization", [h, o, net.gamma(f"{p}norm2")], names, **skip)
        down, after = net.gated(x, p, s), f"layer{layer + 1}.norm1" if layer + 1 < layers else "final"
        names = [after, "", "", f"{p}h2"] if layer + 1 < layers else [after]
        x, *rest = net.several("SkipSimplifiedLayerNormalization", [h, down, net.gamma(after)], names, **skip)
        h = rest[-1] if rest else h
    net.linear(x, "logits", D, VOCAB, 9)
    inputs = _ids_inputs("input_ids", "attention_mask") | _cache(layers, dtype, "past_key_values", "past")
    outputs = {"logits": (dtype, ["batch", "seq", VOCAB])} | _cache(layers, dtype, "present", "total")
    return net.save(path, inputs, outputs, opset=17, domains=[MS], check=False)


def bert(path: Path, *, layers: int = 4, fused: bool = False, dtype: int = F32, opset: int = 17) -> Path:
    """input_ids, attention_mask, token_type_ids -> last_hidden_state; norms after the sum, written out or fused."""
    net = Layers(dtype, opset)
    absent = net.op("Equal", "attention_mask", net.const("zero", np.int64(0)), out="absent")
    mask = _hide(net, net.op("Unsqueeze", absent, net.ints(1, 2), out="absent_4d"), "mask")
    kinds = net.op("Gather", net.const("types", weight(6, 2, D)), "token_type_ids", out="kinds")
    h = net.layer_norm(net.positions(net.op("Add", net.embed(), kinds, out="typed")), "embedding_norm")
    shape = net.head_shape()

    def joined(x: str, y: str, name: str) -> str:
        if not fused:
            return net.layer_norm(net.op("Add", x, y, out=f"{name}_sum"), name)
        parts = [x, y, net.gamma(name), net.beta(name)]
        return net.several("SkipLayerNormalization", parts, [name], MS, epsilon=1e-5)[0]

    for layer in range(layers):
        p, s = f"layer{layer}.", 100 * (layer + 1)
        parts = [net.linear(h, p + n, D, D, s + i, bias=True) for i, n in enumerate("qkv")]
        q, k, v = (net.heads(part, p + n + "_heads", shape) for n, part in zip("qkv", parts, strict=True))
        h = joined(h, net.linear(net.attend(q, k, v, mask, p), f"{p}o", D, D, s + 3, bias=True), f"{p}norm1")
        wide = net.linear(h, f"{p}up", D, WIDE, s + 4, bias=True)
        root = net.op("Div", wide, net.const("root2", np.float32(2**0.5)), out=f"{p}erf_in")
        erf = net.op("Add", net.op("Erf", root, out=f"{p}erf"), net.const("unit", np.float32(1)), out=f"{p}erf1")
        wide = net.op(
            "Mul", net.op("Mul", wide, erf, out=f"{p}gelu2"), net.const("half", np.float32(0.5)), out=f"{p}gelu"
        )
        h = joined(h, net.linear(wide, f"{p}down", WIDE, D, s + 5, bias=True), f"{p}norm2")
    net.op("Identity", h, out="last_hidden_state")
    inputs = _ids_inputs("input_ids", "attention_mask", "token_type_ids")
    outputs = {"last_hidden_state": (dtype, ["batch", "seq", D])}
    return net.save(path, inputs, outputs, opset=opset, domains=[MS] if fused else [])


def cross_decoder(path: Path, *, layers: int = 4, dtype: int = F32) -> Path:
    """The decoder of an encoder-decoder pair: cross attention on encoder_hidden_states in each layer, present out."""
    net = Layers(dtype)
    zero = net.const("zero", np.int64(0))
    absent = net.op("Equal", "encoder_attention_mask", zero, out="absent")
    cross_mask = _hide(net, net.op("Unsqueeze", absent, net.ints(1, 2), out="absent_4d"), "cross_mask")
    length = net.op("Gather", net.op("Shape", "input_ids", out="shape"), net.const("one", np.int64(1)), out="length")
    steps = net.op("Range", zero, length, net.const("one", np.int64(1)), out="steps")
    late = net.op("Greater", steps, net.op("Unsqueeze", steps, net.ints(1), out="rows"), out="late")
    own_mask = _hide(net, late, "own_mask")
    shape, free, outputs = net.head_shape(), net.ints(0, -1, HEADS, HEAD), {}
    h = net.positions(net.embed())
    for layer in range(layers):
        for part, mask, source in (("decoder", own_mask, ""), ("encoder", cross_mask, "encoder_hidden_states")):
            p, s = f"layer{layer}.{part}.", 100 * (layer + 1) + 20 * (part == "encoder")
            x = net.layer_norm(h, f"{p}norm")
            q = net.heads(net.linear(x, f"{p}q", D, D, s), f"{p}q_heads", shape)
            k, v = (
                net.heads(net.linear(source or x, p + n, D, D, s + i), f"present.{layer}.{part}.{name}", free)
                for i, (n, name) in enumerate((("k", "key"), ("v", "value")), 1)
            )
            outputs |= {k: (dtype, ["batch", HEADS, "any", HEAD]), v: (dtype, ["batch", HEADS, "any", HEAD])}
            o = net.linear(net.attend(q, k, v, mask, p), f"{p}o", D, D, s + 3)
            h = net.op("Add", h, o, out=f"{p}h")
        p, s = f"layer{layer}.", 100 * (layer + 1) + 40
        h = net.op("Add", h, net.gated(net.layer_norm(h, f"{p}norm"), p, s), out=f"{p}h2")
    net.linear(net.layer_norm(h, "final"), "logits", D, VOCAB, 9)
    inputs = {"input_ids": (I64, ["batch", "seq"]), "encoder_attention_mask": (I64, ["batch", "source"])}
    inputs["encoder_hidden_states"] = (dtype, ["batch", "source", D])
    return net.save(path, inputs, {"logits": (dtype, ["batch", "seq", VOCAB])} | outputs)


def loop_between(path: Path, *, layers: int = 4) -> Path:
    """Residual layers with a Loop in the middle, whose body reads a weight and a value of the outer graph."""
    net, body = Layers(), Net()
    h = "x"
    for layer in range(layers):
        p, s = f"layer{layer}.", 100 * (layer + 1)
        h = net.op("Add", h, net.gated(net.rms_norm(h, f"{p}norm"), p, s), out=f"{p}h")
        if layer == layers // 2 - 1:
            body.op("Identity", "go_in", out="go_out")
            turned = body.op("MatMul", "state_in", net.const("turn.weight", weight(5, D, D)), out="turn")
            body.op("Tanh", body.op("Add", turned, h, out="turn_sum"), out="state_out")
            states = [helper.make_tensor_value_info(n, F32, None) for n in ("state_in", "state_out")]
            flags = [helper.make_tensor_value_info(n, BOOL, []) for n in ("go_in", "go_out")]
            counter = helper.make_tensor_value_info("i", I64, [])
            graph = helper.make_graph(body.nodes, "body", [counter, flags[0], states[0]], [flags[1], states[1]])
            times, go = net.const("times", np.int64(3)), net.const("go", np.bool_(True))
            h = net.op("Loop", times, go, net.op("Relu", h, out="start"), out="looped", body=graph)
    net.linear(net.rms_norm(h, "final"), "y", D, 48, 9)
    return net.save(path, {"x": (F32, ["batch", "seq", D])}, {"y": (F32, ["batch", "seq", 48])})


def funnel(path: Path, widths: Sequence[int] = (64, 300, 40, 220, 96, 130, 24)) -> Path:
    """An MLP all of whose widths differ: no layer repeats."""
    net, h = Layers(), "x"
    kinds = ("Tanh", "Relu", "Sigmoid")
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        h = net.op(kinds[i % 3], net.linear(h, f"fc{i}", k, n, i, bias=i % 2 == 0), out=f"act{i}")
    net.op("Identity", h, out="y")
    return net.save(path, {"x": (F32, ["batch", "seq", widths[0]])}, {"y": (F32, ["batch", "seq", widths[-1]])})


def tangle(path: Path, *, streams: int = 5, layers: int = 3) -> Path:
    """Every stream of every layer reads all streams of all layers before: nowhere are few values alive."""
    net = Layers()
    known = [net.op("Tanh", net.linear("x", f"in{i}", D, D, i), out=f"s0_{i}") for i in range(streams)]
    rng = np.random.default_rng(1)
    for layer in range(1, layers + 1):
        fresh = []
        for i in range(streams):
            mix = net.op("Concat", *known, out=f"mix{layer}_{i}", axis=-1)
            gains = rng.normal(size=D * len(known)).astype(np.float32)
            mix = net.op("Mul", mix, net.const(f"gains{layer}_{i}", gains), out=f"scaled{layer}_{i}")
            width = D * len(known)
            fresh.append(
                net.op("Tanh", net.linear(mix, f"fc{layer}_{i}", width, D, 10 * layer + i), out=f"s{layer}_{i}")
            )
        known += fresh
    net.op("Concat", *known, out="y", axis=-1)
    return net.save(path, {"x": (F32, ["batch", "seq", D])}, {"y": (F32, ["batch", "seq", D * len(known)])})


def ids_feed(
    rows: int = 1, length: int = 6, *, past: int = 0, layers: int = 4, padded: int = 0, left: bool = False,
    dtype: int = F32, kind: str = "decoder", seed: int = 0,
) -> Feed:  # fmt: skip
    """Inputs of the models above: `rows` x `length` tokens after `past`; the last row has `padded` absent tokens.

    `kind`: "decoder", "fused" (no positions), "merged" (a flag, too), "bert" or "cross".
    """
    rng = np.random.default_rng(seed + 1000 * length + rows)
    real = helper.tensor_dtype_to_np_dtype(dtype)
    feed: Feed = {"input_ids": rng.integers(0, VOCAB, (rows, length))}
    mask = np.ones((rows, past + length), np.int64)
    if padded:
        mask[-1, slice(0, padded) if left else slice(past + length - padded, None)] = 0
    if kind == "cross":
        feed["encoder_hidden_states"] = rng.normal(size=(rows, past + length, D)).astype(real)
        return feed | {"encoder_attention_mask": mask}
    feed["attention_mask"] = mask
    if kind == "bert":
        return feed | {"token_type_ids": rng.integers(0, 2, (rows, length))}
    if kind != "fused":
        feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    for i in range(layers):
        for name in ("key", "value"):
            feed[f"past_key_values.{i}.{name}"] = rng.normal(size=(rows, HEADS, past, HEAD)).astype(real)
    return feed | ({"use_cache_branch": np.array([past > 0])} if kind == "merged" else {})


def ragged(kind: str = "decoder", *, left: bool | None = None, **options: Any) -> list[Feed]:
    """Feeds of several shapes, with padding and (where there is one) a past."""
    past = 0 if kind == "bert" else 3
    left = kind in ("decoder", "merged") if left is None else left
    shapes = [
        (1, 5, 0, 0),
        (2, 9, 0, 4),
        (1, 1, past, 0),
        (3, 1 if kind == "fused" else 4, past, 0 if kind == "fused" else 2),
    ]
    return [ids_feed(b, t, past=p, padded=a, left=left, kind=kind, seed=i, **options)
            for i, (b, t, p, a) in enumerate(shapes)]  # fmt: skip


def float_feed(rows: int, length: int, width: int = D, seed: int = 0) -> Feed:
    """Input x [rows, length, width]."""
    return {"x": np.random.default_rng(seed).normal(size=(rows, length, width)).astype(np.float32)}
