"""The generator of Llama-shaped models against a forward pass in plain numpy, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from llama import SHAPES, byte_size, write_llama  # noqa: E402

TINY = SHAPES["tiny"]
STYLES = ("optimum", "genai")


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """Every initializer in float64 by name, `model.` and `.weight` left off."""
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {n.removeprefix("model.").removesuffix(".weight"): a.astype(np.float64) for n, a in arrays.items()}


def forward(
    w: dict[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, s=TINY
) -> np.ndarray:
    """Logits [B, T, V] by the formulas, one head at a time."""
    norm = lambda x, gamma: x / np.sqrt((x * x).mean(-1, keepdims=True) + s.epsilon) * gamma  # noqa: E731
    angles = positions[:, :, None] / s.theta ** (np.arange(0, s.head, 2) / s.head)  # [B, T, d/2]

    def rotate(x):  # [B, T, d]
        turned = (x[..., : s.head // 2] + 1j * x[..., s.head // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    steps = np.arange(tokens.shape[1])
    seen = (steps[None, :] <= steps[:, None])[None] & (mask[:, None, :] != 0)  # [B, T, T]
    x = w["embed_tokens"][tokens]
    for layer in range(s.layers):
        p = f"layers.{layer}"
        y = norm(x, w[f"{p}.input_layernorm"])
        if f"{p}.attn.qkv_proj" in w:
            sizes = np.cumsum([s.heads, s.kv_heads]) * s.head
            q, k, v = np.split(y @ w[f"{p}.attn.qkv_proj"], sizes, axis=-1)
            out = w[f"{p}.attn.o_proj"]
        else:
            q, k, v = (y @ w[f"{p}.self_attn.{part}_proj"] for part in "qkv")
            out = w[f"{p}.self_attn.o_proj"]
        mixed = []
        for head in range(s.heads):
            of = lambda t, h: t[..., h * s.head : (h + 1) * s.head]  # noqa: E731
            group = head * s.kv_heads // s.heads
            scores = rotate(of(q, head)) @ rotate(of(k, group)).transpose(0, 2, 1) / np.sqrt(s.head)
            scores = np.where(seen, scores, -1e30)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(share / share.sum(-1, keepdims=True) @ of(v, group))
        x = x + np.concatenate(mixed, axis=-1) @ out
        y = norm(x, w[f"{p}.post_attention_layernorm"])
        gate, up = y @ w[f"{p}.mlp.gate_proj"], y @ w[f"{p}.mlp.up_proj"]
        x = x + gate / (1 + np.exp(-gate)) * up @ w[f"{p}.mlp.down_proj"]
    return norm(x, w["norm"]) @ w["lm_head"]


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options)


def feeds(run: ort.InferenceSession, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, past=None):
    """What the model wants, with an empty past unless there is one."""
    feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    for info in run.get_inputs():
        if info.name.startswith("past"):
            dtype = np.float16 if "16" in info.type else np.float32
            empty = np.zeros((len(tokens), info.shape[1], 0, info.shape[3]), dtype)
            feed[info.name] = empty if past is None else past[info.name.replace("past_key_values", "present")]
    return {info.name: feed[info.name] for info in run.get_inputs()}


@pytest.fixture(scope="module", params=STYLES)
def tiny(request, tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp(request.param), TINY, dtype="float32", style=request.param,
                       shard_size=100_000)  # fmt: skip


def sample(rows: int = 2, length: int = 11):
    tokens = np.random.default_rng(1).integers(0, TINY.vocab, (rows, length))
    return tokens, np.ones_like(tokens), np.tile(np.arange(length), (rows, 1))


def test_logits_are_those_of_the_formulas(tiny):
    tokens, mask, positions = sample()
    run = session(tiny)
    logits = run.run(["logits"], feeds(run, tokens, mask, positions))[0]
    expected = forward(weights_of(tiny), tokens, mask, positions)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_padding_on_the_left_is_not_looked_at(tmp_path):
    """Only in the optimum style: fused attention takes padding on the right alone."""
    path = write_llama(tmp_path, TINY, dtype="float32")
    tokens, mask, _ = sample()
    mask[0, :4] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    run = session(path)
    logits = run.run(["logits"], feeds(run, tokens, mask, positions))[0]
    expected = forward(weights_of(path), tokens, mask, positions)
    np.testing.assert_allclose(logits[mask != 0], expected[mask != 0], atol=1e-4, rtol=0)


def test_a_past_continues_where_it_ended(tiny):
    tokens, mask, positions = sample(rows=1)
    run = session(tiny)
    whole = run.run(["logits"], feeds(run, tokens, mask, positions))[0]
    names = [output.name for output in run.get_outputs()]
    past = dict(zip(names, run.run(names, feeds(run, tokens[:, :7], mask[:, :7], positions[:, :7])), strict=True))
    for step in range(7, tokens.shape[1]):
        one = slice(step, step + 1)
        feed = feeds(run, tokens[:, one], mask[:, : step + 1], positions[:, one], past)
        past = dict(zip(names, run.run(names, feed), strict=True))
        np.testing.assert_allclose(past["logits"][:, 0], whole[:, step], atol=1e-4, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_half_precision_stays_sane_over_many_layers(tmp_path, style):
    shape = replace(TINY, layers=32)
    path = write_llama(tmp_path, shape, dtype="float16", style=style)
    tokens, mask, positions = sample()
    run = session(path)
    logits = run.run(["logits"], feeds(run, tokens, mask, positions))[0]
    expected = forward(weights_of(path), tokens, mask, positions, shape)
    assert logits.dtype == np.float16
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_shards_are_small_pages_apart_and_full_of_different_normals(tiny):
    files = sorted(tiny.parent.glob("model.onnx_data*"))
    assert len(files) > 3
    model = onnx.load(tiny, load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert {place["location"] for place in places} == {file.name for file in files}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)
    largest = max(int(place["length"]) for place in places)
    assert all(file.stat().st_size <= max(100_000, largest) for file in files)
    w = weights_of(tiny)
    for name in ("layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj", "lm_head"):
        assert np.linalg.matrix_rank(w[name]) == TINY.hidden
        assert abs(w[name].std() / 0.02 - 1) < 0.05
    assert not np.array_equal(w["layers.0.mlp.gate_proj"], w["layers.1.mlp.gate_proj"])
    assert abs(w["layers.0.mlp.down_proj"].std() / (0.02 / np.sqrt(2 * TINY.layers)) - 1) < 0.05


def test_the_same_seed_gives_the_same_model_and_another_one_another(tmp_path):
    one, same, other = (write_llama(tmp_path / str(i), TINY, seed=seed) for i, seed in enumerate((0, 0, 1)))
    data = [path.with_name("model.onnx_data").read_bytes() for path in (one, same, other)]
    assert data[0] == data[1] != data[2]
    with pytest.raises(FileExistsError):
        write_llama(tmp_path / "0", TINY)


@pytest.mark.slow
def test_a_gigabyte_is_written_in_little_memory(tmp_path):
    """1.1 GB of weights; the process, interpreter and onnx included, takes less than 300 MB."""
    # Asked from inside: what the system says of a child counts the copy of this process that it began as.
    code = """if True:
        import pathlib, runpy, sys
        sys.argv = sys.argv[1:]
        sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
    """
    command = [sys.executable, "-c", code, TOOLS / "llama.py", tmp_path, "--shape", "1.1b", "--layers", "3"]
    child = subprocess.run(
        [*command, "--dtype", "float32", "--shard-size", "300MB"], stdout=subprocess.PIPE, text=True, check=False
    )
    files = list(tmp_path.glob("model.onnx_data*"))
    size = sum(file.stat().st_size for file in files)
    assert child.returncode == 0
    assert size > 1e9
    assert len(files) >= 4
    assert int(child.stdout.split()[-1]) * 1024 < 300e6
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    for file in files:
        file.unlink()


def test_sizes_are_read_with_their_unit():
    assert [byte_size(text) for text in ("2GB", "1.5mb", "4096")] == [2 * 10**9, 1_500_000, 4096]
