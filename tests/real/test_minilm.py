"""all-MiniLM-L6-v2, an encoder: calibrated methods keep more of its embeddings than rounding does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnx_woq import evaluate, quantize
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe


@pytest.fixture(scope="session")
def distance(models, text, tmp_path_factory):
    """method -> 1 − cosine to the float embeddings, 4 bits g32 asym, level 0."""
    found = {}
    recipes = {method: Recipe(method) for method in ("rtn", "gptq", "awq")} | {"best": preset("BEST_4BIT")}
    for method, base in recipes.items():
        folder = tmp_path_factory.mktemp(method)
        recipe = replace(base, accuracy_level=0, nsamples=64, pad_max_length=128)
        quantize(models / "minilm", folder, recipe, text / "calib.txt")
        metrics = evaluate(folder, models / "minilm", text / "dev.txt", samples=64, seqlen=128)
        found[method] = 1 - metrics.cosine
    return found


def test_calibrated_methods_beat_rounding(distance):
    assert distance["gptq"] < distance["rtn"]
    assert distance["awq"] < distance["rtn"]


def test_best_keeps_more_than_either(distance):
    assert distance["best"] < 0.4 * distance["rtn"]
    assert distance["best"] < distance["gptq"]
