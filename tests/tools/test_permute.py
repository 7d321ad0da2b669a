"""Permuting a checkpoint: the same function, other blocks, the documented order of draws."""

import runpy
from pathlib import Path

import numpy as np
import pytest

PERMUTE = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "permute.py"))
permute_llama, lattice_share = PERMUTE["permute_llama"], PERMUTE["lattice_share"]

LAYERS, HEADS, KV_HEADS, HEAD_DIM = (
    2,
    4,
    2,
    64,
)  # o_proj's blocks of 32 are mixed inside a head, so it needs two of them
HIDDEN, INTERMEDIATE, VOCAB = 128, 96, 50
MODULES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def on_lattice(rng, out, inputs):
    """A weight `[out, in]` whose every block of 32 inputs has its own scale and 16 levels."""
    scale = rng.uniform(0.5, 2, (out, inputs // 32, 1)) / (8 * np.sqrt(inputs))
    return (scale * (rng.integers(0, 16, (out, inputs // 32, 32)) - 7.5)).reshape(out, inputs)


@pytest.fixture
def weights():
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(VOCAB, HIDDEN))
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {f"{prefix}.{name}.weight": on_lattice(rng, *shape) for name, shape in MODULES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = rng.uniform(0.5, 2, HIDDEN)
    weights["model.norm.weight"] = rng.uniform(0.5, 2, HIDDEN)
    weights["lm_head.weight"] = embedding
    return weights


def rms_norm(x, gamma):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gamma


def rotate(x):
    """Rotary position embedding of `x [T, H, d]`, in halves as Hugging Face's Llama has it."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate(
        [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], axis=-1
    )


def forward(weights, tokens):
    """Logits `[T, V]` of a Llama for `tokens [T]`."""
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        w = {name.split(".")[-2]: weight for name, weight in weights.items() if f"layers.{layer}." in name}
        h = rms_norm(x, w["input_layernorm"])
        q = rotate((h @ w["q_proj"].T).reshape(len(x), HEADS, HEAD_DIM))
        k = rotate((h @ w["k_proj"].T).reshape(len(x), KV_HEADS, HEAD_DIM)).repeat(HEADS // KV_HEADS, axis=1)
        v = (h @ w["v_proj"].T).reshape(len(x), KV_HEADS, HEAD_DIM).repeat(HEADS // KV_HEADS, axis=1)
        score = np.einsum("thd,uhd->htu", q, k) / np.sqrt(HEAD_DIM)
        score[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        attention = np.exp(score - score.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + np.einsum("htu,uhd->thd", attention, v).reshape(len(x), -1) @ w["o_proj"].T
        h = rms_norm(x, w["post_attention_layernorm"])
        gate = h @ w["gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"].T)) @ w["down_proj"].T
    return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def permuted(weights):
    return permute_llama(weights, HEADS, KV_HEADS, np.random.default_rng(0))


def test_the_function_stays(weights):
    tokens = np.random.default_rng(2).integers(0, VOCAB, 16)
    expected = forward(weights, tokens)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(forward(permuted(weights), tokens), expected, rtol=0, atol=1e-10)


def test_the_forward_pass_notices_a_channel_out_of_place(weights):
    tokens = np.random.default_rng(2).integers(0, VOCAB, 16)
    expected = forward(weights, tokens)
    for name, weight in permuted(weights).items():
        broken = permuted(weights) | {name: np.roll(weight, 1, axis=-1)}
        assert np.abs(forward(broken, tokens) - expected).max() > 1e-3, name


def test_tied_weights_stay_equal_and_the_input_is_untouched(weights):
    before = {name: weight.copy() for name, weight in weights.items()}
    after = permuted(weights)
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert after.keys() == before.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, before[name])


def test_a_head_that_is_not_stored_is_not_invented(weights):
    del weights["lm_head.weight"]
    assert "lm_head.weight" not in permuted(weights)


def test_no_block_keeps_its_lattice(weights):
    for name, weight in permuted(weights).items():
        if "_proj" in name:
            assert lattice_share(weights[name]) == 1, name
            assert lattice_share(weight) < 0.02, name


def test_draws_residual_then_each_layer_feed_forward_then_values_of_each_head(weights):
    rng = np.random.default_rng(0)
    after = permuted(weights)
    residual = rng.permutation(HIDDEN)
    np.testing.assert_array_equal(after["model.norm.weight"], weights["model.norm.weight"][residual])
    for layer in range(LAYERS):
        gate, v = f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.self_attn.v_proj.weight"
        feed_forward = rng.permutation(INTERMEDIATE)
        np.testing.assert_array_equal(after[gate], weights[gate][feed_forward][:, residual])
        for head in range(KV_HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            value = rng.permutation(HEAD_DIM)
            np.testing.assert_array_equal(after[v][rows], weights[v][rows][value][:, residual])


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.bias", "model.layers.0.mlp.router.weight"])
def test_refuses_a_weight_it_has_no_rule_for(weights, name):
    weights[name] = np.zeros(HIDDEN)
    with pytest.raises(ValueError, match=name):
        permuted(weights)
