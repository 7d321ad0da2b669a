"""SmolLM2-135M with permuted channels: quality, one calibration for five presets, text that makes sense."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest

import onnx_woq.runtime.calibration.collect
from onnx_woq import evaluate, inspect, quantize, tune
from onnx_woq.core.stats import Stats
from onnx_woq.presets import TUNED, preset
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed.search import MIX

GENERATE = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder, file_name="model.onnx")
messages = [{"role": "user", "content": "What is the capital of France?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
out = model.generate(ids, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
"""


@pytest.fixture(scope="session")
def quantized(models, text, tmp_path_factory):
    """method -> folder: body in 4 bits g32 asym, head float, level 0, 16 × 512 tokens."""
    made = {}
    for method in ("rtn", "gptq", "awq"):
        made[method] = tmp_path_factory.mktemp(method)
        recipe = Recipe(method, lm_head=False, accuracy_level=0, nsamples=16, pad_max_length=512)
        quantize(models / "smollm2-permuted", made[method], recipe, text / "calib.txt")
    return made


@pytest.fixture(scope="session")
def divergence(quantized, models, text):
    return {
        method: evaluate(folder, models / "smollm2-permuted", text / "dev.txt", samples=8, seqlen=512)
        for method, folder in quantized.items()
    }


def test_gptq_loses_far_less_than_rtn(divergence):
    assert divergence["gptq"].kl < 0.65 * divergence["rtn"].kl
    assert divergence["awq"].kl < divergence["rtn"].kl


def test_best_loses_a_fraction_of_what_gptq_does(divergence, models, text, tmp_path):
    recipe = replace(preset("BEST_4BIT"), lm_head=False, accuracy_level=0, nsamples=16, pad_max_length=512)
    quantize(models / "smollm2-permuted", tmp_path / "best", recipe, text / "calib.txt")
    best = evaluate(tmp_path / "best", models / "smollm2-permuted", text / "dev.txt", samples=8, seqlen=512)
    assert best.kl < 0.26 * divergence["rtn"].kl
    assert best.kl < 0.6 * divergence["gptq"].kl


def test_a_mix_loses_less_than_the_best_uniform_model_of_its_size(models, text, tmp_path):
    """Head and embedding included, on other text than either was made with."""
    source, given = models / "smollm2-permuted", {"samples": 16, "seqlen": 512}
    best = preset("BEST_4BIT")
    uniform = replace(best, embedding=best.spec, accuracy_level=0)
    size = quantize(source, tmp_path / "uniform.onnx", uniform, text / "calib.txt", **given).bytes_after
    base = {"mixes": replace(MIX, accuracy_level=0)}
    out = tmp_path / "mix.onnx"
    tune(source, None, text / "calib.txt", configs=base, target_size=size, output=out, **given)
    assert sum(file.stat().st_size for file in tmp_path.glob("mix.onnx*")) <= size
    kl = {
        name: evaluate(tmp_path / f"{name}.onnx", source, text / "dev.txt", samples=8, seqlen=512, tokenizer=source).kl
        for name in ("uniform", "mix")
    }
    assert kl["mix"] < 0.6 * kl["uniform"]


def test_the_permutation_leaves_the_model_what_it_was(models, text):
    metrics = evaluate(models / "smollm2-permuted", models / "smollm2", text / "dev.txt", samples=2, seqlen=512)
    assert abs(metrics.kl) < 1e-6
    assert metrics.top1 > 0.998  # of 1024 tokens, one or two may be tied within float rounding


def test_every_body_matmul_is_found_and_the_tied_copy_is_counted(models):
    found = inspect(models / "smollm2-permuted")
    assert sum(len(group.nodes) for group in found.groups) == 30 * 7 + 1
    assert list(found.copies.values()) == [49152 * 576 * 4]
    reasons = {skipped.reason for skipped in found.skipped}
    assert reasons == {"both inputs are computed", "an embedding, left float without --embedding-bits"}


def test_five_presets_in_one_calibration_and_one_forward_per_sample(models, text, tmp_path, monkeypatch):
    tokens, walks = [], []
    update, walk = Stats.update, onnx_woq.runtime.calibration.collect.collect_statistics
    monkeypatch.setattr(
        Stats, "update", lambda stats, x, *more: (tokens.append(np.shape(x)), update(stats, x, *more))[1]
    )
    monkeypatch.setattr(
        onnx_woq.runtime.calibration.collect, "collect_statistics", lambda *a, **k: (walks.append(1), walk(*a, **k))[1]
    )
    result = tune(
        models / "smollm2-permuted",
        None,
        text / "calib.txt",
        configs=TUNED[:5],
        judge_limit=1e-6,
        samples=16,
        seqlen=512,
        output=tmp_path / "out",
    )
    assert len(walks) == 1
    assert len(tokens) == 16 * (30 * 4 + 1)
    assert [trial.status for trial in result.trials] == ["ok"] * 5
    assert not result.met
    kl = {trial.name: trial.metric for trial in result.trials}
    assert kl["GPTQ_G32ASYM"] < kl["RTN_G32ASYM"]
    assert kl["GPTQ_G32ASYM_DISABLE_LAST_MATMUL"] < kl["GPTQ_G32ASYM"]
    assert kl["GPTQ_G32ASYM"] < kl["GPTQ_G128ASYM"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_optimum_opens_the_result_and_it_talks_sense(quantized, export_python):
    done = subprocess.run(
        [export_python, "-c", GENERATE, quantized["gptq"]], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout, done.stdout


def test_the_fused_graph_of_the_genai_builder_gives_the_same_quality(models, text, tmp_path, divergence):
    recipe = Recipe("gptq", lm_head=False, accuracy_level=0, nsamples=16, pad_max_length=512)
    model = models / "smollm2-permuted-genai"
    report = quantize(model, tmp_path / "out", recipe, text / "calib.txt")
    assert sum(len(group.nodes) for group in report.groups) == 30 * 5
    metrics = evaluate(tmp_path / "out", model, text / "dev.txt", samples=8, seqlen=512)
    assert metrics.kl == pytest.approx(divergence["gptq"].kl, rel=0.1)
