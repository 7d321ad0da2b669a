"""all-MiniLM-L6-v2, an encoder: calibrated methods keep more of its embeddings than rounding does."""

from __future__ import annotations

import pytest

from onnx_woq import evaluate, quantize
from onnx_woq.recipe import Recipe


@pytest.fixture(scope="session")
def distance(models, text, tmp_path_factory):
    """method -> 1 − cosine to the float embeddings, 4 bits g32 asym, level 0."""
    found = {}
    for method in ("rtn", "gptq", "awq"):
        folder = tmp_path_factory.mktemp(method)
        recipe = Recipe(method, accuracy_level=0, nsamples=64, pad_max_length=128)
        quantize(models / "minilm", folder, recipe, text / "calib.txt")
        metrics = evaluate(folder, models / "minilm", text / "dev.txt", samples=64, seqlen=128)
        found[method] = 1 - metrics.cosine
    return found


def test_calibrated_methods_beat_rounding(distance):
    assert distance["gptq"] < distance["rtn"]
    assert distance["awq"] < distance["rtn"]
