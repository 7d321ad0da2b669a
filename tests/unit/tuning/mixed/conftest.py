"""A small model whose head is its embedding, and the mixes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.mixed.candidates import MixCandidates
from onnx_woq.tuning.mixed.layers import mixed_layers
from tests.zoo import small as zoo

BASE = Recipe("gptq", Spec(4, 32), embedding=Spec(4, 32))


@pytest.fixture(scope="package")
def tied(tmp_path_factory):
    return load(zoo.language_model(tmp_path_factory.mktemp("mixed") / "tied.onnx", layers=1, tied=True))


@pytest.fixture(scope="package")
def mixer(tied):
    """All mixes, a layer losing four times less with each bit, and the first layer ten times as much as the others."""

    def losses(layer, factor):
        return tuple(0.0 if spec is None else factor * 4.0**-spec.bits * spec.group_size for spec in layer.specs)

    first, *others = mixed_layers(tied, BASE)
    weighed = [(first, 10.0), *((layer, 1.0) for layer in others)]
    known = tuple(replace(layer, losses=losses(layer, factor), alpha=1.0) for layer, factor in weighed)
    return MixCandidates(tied, BASE, known, ("hash", "data"), None)
