"""The graph of a Llama decoder as exporters write it, its weights only named: `llama.py` stores them.

`decoder` gives it in two styles. `optimum`: one operator at a time as torch's exporter does, RMS norm and rotary
embedding written out, the mask made from attention_mask, key-value heads repeated by Expand; half-precision models go
through float32 where transformers does (norms, rotary angles, softmax). `genai`: as onnxruntime-genai's builder does,
with q, k and v in one weight, GroupQueryAttention and SkipSimplifiedLayerNormalization.

Letters in comments: B batch, T tokens fed, P tokens in the past, S = P + T, H heads, G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama decoder."""

    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int = 2048
    epsilon: float = 1e-5
    theta: float = 10000.0

    @property
    def head(self) -> int:
        """Channels per attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Tensor:
    """An initializer: a `value` that is known, or a "normal" or "norm" weight of `dims` to be drawn."""

    name: str
    dims: tuple[int, ...] = ()
    kind: str = "constant"
    deviation: float = 0.0
    value: np.ndarray | None = None


@dataclass
class Decoder:
    """A graph being written: nodes in order, and the tensors they read."""

    shape: Shape
    dtype: np.dtype
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    @property
    def half(self) -> bool:
        """Whether some values have to go through float32."""
        return self.dtype == np.float16

    def op(self, name: str, op_type: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds the node `/model/NAME/OP`, or with the outputs given; returns its first output."""
        node = f"/model/{name}/{op_type}"
        made = list(outputs) or [f"{node}_output_0"]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=node, **attributes))
        return made[0]

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """A small tensor that is known; asked for again under the same name, it is the same."""
        return self._add(Tensor(name, value=np.asarray(value, dtype)))

    def weight(self, name: str, *dims: int, residual: bool = False) -> str:
        """A normal weight; `residual` where its product is added to the residual stream."""
        deviation = 0.02 / np.sqrt(2 * self.shape.layers) if residual else 0.02
        return self._add(Tensor(f"model.{name}.weight", dims, "normal", float(deviation)))

    def gamma(self, name: str) -> str:
        """The weight of a norm."""
        return self._add(Tensor(f"model.{name}.weight", (self.shape.hidden,), "norm"))

    def linear(self, name: str, value: str, *dims: int, residual: bool = False) -> str:
        """The product of `value` and a weight `dims` [K, N]."""
        return self.op(name, "MatMul", value, self.weight(name, *dims, residual=residual))

    def cast(self, name: str, value: str, dtype: Any) -> str:
        """`value` in another type."""
        return self.op(name, "Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _add(self, tensor: Tensor) -> str:
        self.tensors.setdefault(tensor.name, tensor)
        return tensor.name


def decoder(shape: Shape, dtype: np.dtype, style: str) -> Decoder:
    """The whole decoder: token ids and a past in, logits [B, T, V] and the present out."""
    g = Decoder(shape, dtype)
    _signature(g, style)
    hidden = g.op("embed_tokens", "Gather", g.weight("embed_tokens", shape.vocab, shape.hidden), "input_ids")
    final = (_genai if style == "genai" else _optimum)(g, hidden)
    head = g.weight("lm_head", shape.hidden, shape.vocab)
    g.op("lm_head", "MatMul", final, head, outputs=["logits"])
    return g


def _signature(g: Decoder, style: str) -> None:
    kind = helper.np_dtype_to_tensor_dtype(g.dtype)
    tokens = ["batch_size", "sequence_length"]
    total = "past_sequence_length + sequence_length" if style == "optimum" else "total_sequence_length"
    integers = {"input_ids": tokens, "attention_mask": ["batch_size", total]}
    if style == "optimum":
        integers["position_ids"] = tokens
    value = helper.make_tensor_value_info
    g.inputs += [value(name, TensorProto.INT64, dims) for name, dims in integers.items()]
    g.outputs.append(value("logits", kind, [*tokens, g.shape.vocab]))
    for layer in range(g.shape.layers):
        for what in ("key", "value"):
            dims = ["batch_size", g.shape.kv_heads, "past_sequence_length", g.shape.head]
            g.inputs.append(value(f"past_key_values.{layer}.{what}", kind, dims))
            g.outputs.append(value(f"present.{layer}.{what}", kind, [*dims[:2], total, dims[3]]))


def _optimum(g: Decoder, hidden: str) -> str:
    """Every layer, one operator at a time; returns the last norm's output."""
    mask = _mask(g)
    cos, sin = _rotary(g)
    for layer in range(g.shape.layers):
        name = f"layers.{layer}"
        attended = _attention(g, layer, _rms_norm(g, f"{name}.input_layernorm", hidden), mask, cos, sin)
        hidden = g.op(f"{name}", "Add", hidden, attended)
        normed = _rms_norm(g, f"{name}.post_attention_layernorm", hidden)
        hidden = g.op(f"{name}.mlp", "Add", hidden, _mlp(g, f"{name}.mlp", normed))
    return _rms_norm(g, "norm", hidden)


def _mask(g: Decoder) -> str:
    """[B, 1, T, S]: 0 where a query may see a key, the least finite number elsewhere."""
    first, zero, one = (g.constant(f"const_{n}", n) for n in (2, 0, 1))
    axis = [g.constant(f"axes_{n}", [n]) for n in range(3)]
    past = g.op("mask.past", "Gather", g.op("mask.past", "Shape", "past_key_values.0.key"), first)
    fed = g.op("mask.fed", "Gather", g.op("mask.fed", "Shape", "input_ids"), one)
    total = g.op("mask.total", "Add", past, fed)
    queries = g.op("mask.query", "Unsqueeze", g.op("mask.query", "Range", past, total, one), axis[1])  # [T, 1]
    keys = g.op("mask.key", "Unsqueeze", g.op("mask.key", "Range", zero, total, one), axis[0])  # [1, S]
    causal = g.op("mask.causal", "LessOrEqual", keys, queries)
    counted = g.cast("mask.counted", "attention_mask", bool)
    counted = g.op("mask.heads", "Unsqueeze", g.op("mask.rows", "Unsqueeze", counted, axis[1]), axis[2])
    seen = g.op("mask.seen", "And", causal, counted)
    lowest = g.constant("lowest", np.finfo(g.dtype).min, g.dtype)
    return g.op("mask", "Where", seen, g.constant("nothing", 0, g.dtype), lowest)


def _rotary(g: Decoder) -> tuple[str, str]:
    """Cosines and sines [B, 1, T, d] of position × frequency."""
    frequencies = g.shape.theta ** -(np.arange(0, g.shape.head, 2) / g.shape.head)
    table = g.constant("rotary_emb.inv_freq", frequencies[None, :, None], np.float32)
    one = g.constant("axes_1", [1])
    batch = g.op("rotary_emb.batch", "Gather", g.op("rotary_emb", "Shape", "position_ids"), g.constant("axes_0", [0]))
    dims = g.op("rotary_emb.dims", "Concat", batch, one, one, axis=0)
    table = g.op("rotary_emb", "Expand", table, dims)  # [B, d/2, 1]
    positions = g.cast("rotary_emb", g.op("rotary_emb", "Unsqueeze", "position_ids", one), np.float32)  # [B, 1, T]
    angles = g.op("rotary_emb", "Transpose", g.op("rotary_emb", "MatMul", table, positions), perm=[0, 2, 1])
    angles = g.op("rotary_emb", "Concat", angles, angles, axis=-1)
    waves = []
    for wave in ("Cos", "Sin"):
        name = f"rotary_emb.{wave.lower()}"
        value = g.op(name, wave, angles)
        value = g.cast(name, value, g.dtype) if g.half else value
        waves.append(g.op(name, "Unsqueeze", value, one))
    return waves[0], waves[1]


def _rms_norm(g: Decoder, name: str, value: str) -> str:
    """x / √(mean x² + ε) · γ, in float32 as transformers does it."""
    wide = g.cast(f"{name}.wide", value, np.float32) if g.half else value
    squares = g.op(name, "Pow", wide, g.constant("two", 2, np.float32))
    mean = g.op(name, "ReduceMean", squares, axes=[-1], keepdims=1)
    root = g.op(name, "Sqrt", g.op(name, "Add", mean, g.constant("epsilon", g.shape.epsilon, np.float32)))
    inverse = g.op(name, "Div", g.constant("unit", 1, np.float32), root)
    normed = g.op(f"{name}.normed", "Mul", wide, inverse)
    normed = g.cast(f"{name}.narrow", normed, g.dtype) if g.half else normed
    return g.op(name, "Mul", g.gamma(name), normed)


def _attention(g: Decoder, layer: int, value: str, mask: str, cos: str, sin: str) -> str:
    s, name = g.shape, f"layers.{layer}.self_attn"

    def heads(what: str, count: int) -> str:
        """One projection as [B, count, T, d]."""
        part = f"{name}.{what}_proj"
        product = g.linear(part, value, s.hidden, count * s.head)
        split = g.op(part, "Reshape", product, g.constant(f"heads_{count}", [0, 0, count, s.head]))
        return g.op(part, "Transpose", split, perm=[0, 2, 1, 3])

    query = _rotated(g, f"{name}.q_rotary", heads("q", s.heads), cos, sin)
    key = _rotated(g, f"{name}.k_rotary", heads("k", s.kv_heads), cos, sin)
    kept = []
    for what, new in (("key", key), ("value", heads("v", s.kv_heads))):
        past, present = f"past_key_values.{layer}.{what}", f"present.{layer}.{what}"
        kept.append(
            _repeated(g, f"{name}.{what}", g.op(f"{name}.{what}", "Concat", past, new, axis=2, outputs=[present]))
        )
    turned = g.op(f"{name}.key_turned", "Transpose", kept[0], perm=[0, 1, 3, 2])
    scores = g.op(f"{name}.scores", "MatMul", query, turned)  # [B, H, T, S]
    scores = g.op(f"{name}.scores", "Mul", scores, g.constant("scaling", s.head**-0.5, g.dtype))
    scores = g.op(f"{name}.scores", "Add", scores, mask)
    scores = g.cast(f"{name}.scores_wide", scores, np.float32) if g.half else scores
    weights = g.op(name, "Softmax", scores, axis=-1)
    weights = g.cast(f"{name}.weights", weights, g.dtype) if g.half else weights
    mixed = g.op(f"{name}.mixed", "Transpose", g.op(f"{name}.mixed", "MatMul", weights, kept[1]), perm=[0, 2, 1, 3])
    mixed = g.op(f"{name}.mixed", "Reshape", mixed, g.constant("merged", [0, 0, s.hidden]))
    return g.linear(f"{name}.o_proj", mixed, s.hidden, s.hidden, residual=True)


def _rotated(g: Decoder, name: str, value: str, cos: str, sin: str) -> str:
    """x·cos + (−x₂, x₁)·sin, for x = (x₁, x₂) halved along the channels [B, n, T, d]."""
    half, end, axis = g.constant("half", [g.shape.head // 2]), g.constant("end", [2**62]), g.constant("axes_3", [3])
    low = g.op(f"{name}.low", "Slice", value, g.constant("axes_0", [0]), half, axis)
    high = g.op(f"{name}.high", "Slice", value, half, end, axis)
    swapped = g.op(name, "Concat", g.op(name, "Neg", high), low, axis=-1)
    return g.op(name, "Add", g.op(f"{name}.cos", "Mul", value, cos), g.op(f"{name}.sin", "Mul", swapped, sin))


def _repeated(g: Decoder, name: str, value: str) -> str:
    """[B, G, S, d] with every key-value head as often as query heads read it: [B, H, S, d]."""
    repeats = g.shape.heads // g.shape.kv_heads
    if repeats == 1:
        return value
    wide = g.op(name, "Unsqueeze", value, g.constant("axes_2", [2]))
    wide = g.op(name, "Expand", wide, g.constant("repeats", [1, 1, repeats, 1, 1]))
    return g.op(name, "Reshape", wide, g.constant("all_heads", [0, g.shape.heads, -1, g.shape.head]))


def _mlp(g: Decoder, name: str, value: str) -> str:
    hidden, ff = g.shape.hidden, g.shape.ff
    gate = g.linear(f"{name}.gate_proj", value, hidden, ff)
    act = g.op(f"{name}.act_fn", "Mul", gate, g.op(f"{name}.act_fn", "Sigmoid", gate))
    product = g.op(name, "Mul", act, g.linear(f"{name}.up_proj", value, hidden, ff))
    return g.linear(f"{name}.down_proj", product, ff, hidden, residual=True)


def _genai(g: Decoder, residual: str) -> str:
    """Every layer in fused operators; returns the last norm's output."""
    s, microsoft = g.shape, {"domain": "com.microsoft"}
    counted = g.op("attn_mask", "ReduceSum", "attention_mask", g.constant("axes_1", [1]), keepdims=0)
    last = g.cast("attn_mask.last", g.op("attn_mask", "Sub", counted, g.constant("axes_1", [1])), np.int32)
    total = g.op("attn_mask", "Gather", g.op("attn_mask", "Shape", "attention_mask"), g.constant("const_1", 1))
    total = g.cast("attn_mask.total", total, np.int32)
    angles = np.arange(s.positions)[:, None] * s.theta ** -(np.arange(0, s.head, 2) / s.head)
    tables = g.constant("cos_cache", np.cos(angles), g.dtype), g.constant("sin_cache", np.sin(angles), g.dtype)
    grouped = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "scale": s.head**-0.5, "do_rotary": 1} | microsoft
    update = ""
    for layer in range(s.layers):
        name = f"layers.{layer}"
        normed, residual = _skip_norm(g, f"{name}.input_layernorm", residual, update)
        mixed = g.linear(f"{name}.attn.qkv_proj", normed, s.hidden, (s.heads + 2 * s.kv_heads) * s.head)
        past = [f"past_key_values.{layer}.{what}" for what in ("key", "value")]
        present = [f"present.{layer}.{what}" for what in ("key", "value")]
        made = [f"/model/{name}/attn/GroupQueryAttention/output_0", *present]
        mixed = g.op(f"{name}.attn", "GroupQueryAttention", mixed, "", "", *past, last, total, *tables,
                     outputs=made, **grouped)  # fmt: skip
        update = g.linear(f"{name}.attn.o_proj", mixed, s.hidden, s.hidden, residual=True)
        normed, residual = _skip_norm(g, f"{name}.post_attention_layernorm", residual, update)
        update = _mlp(g, f"{name}.mlp", normed)
    return _skip_norm(g, "norm", residual, update)[0]


def _skip_norm(g: Decoder, name: str, residual: str, update: str) -> tuple[str, str]:
    """The norm of residual + update, and that sum; without an update, the norm of the residual and itself."""
    attributes = {"epsilon": g.shape.epsilon}
    if not update:
        normed = g.op(
            name, "SimplifiedLayerNormalization", residual, g.gamma(name), axis=-1, stash_type=1, **attributes
        )
        return normed, residual
    made = [f"/model/{name}/output_0", "", "", f"/model/{name}/output_3"]
    if name == "norm":
        made = made[:1]
    normed = g.op(name, "SkipSimplifiedLayerNormalization", residual, update, g.gamma(name),
                  outputs=made, domain="com.microsoft", **attributes)  # fmt: skip
    return normed, made[-1]
