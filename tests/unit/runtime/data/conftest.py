"""The inputs of a language model, and of a model that reads floats."""

from __future__ import annotations

import pytest

from onnx_woq.graph.io.model import load
from onnx_woq.runtime.data.inputs import model_inputs
from tests.zoo.chains import chain, language_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return model_inputs(load(language_model(tmp_path_factory.mktemp("lm") / "m.onnx")))


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return model_inputs(load(chain(tmp_path_factory.mktemp("f") / "m.onnx")))
