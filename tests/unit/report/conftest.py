"""A model, data, and two tuning runs that reports are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, Spec, tune
from tests.zoo import architectures as arch


@pytest.fixture(scope="package")
def decoder(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("page") / "m.onnx", layers=3)


@pytest.fixture(scope="package")
def data() -> list[dict[str, np.ndarray]]:
    return [arch.ids_feed(1, 24, layers=3, seed=i) for i in range(12)]


@pytest.fixture(scope="package")
def tuned(decoder, data, tmp_path_factory):
    configs = ["RTN_G32ASYM", "GPTQ_G32ASYM", "BEST_4BIT", Recipe("rtn", Spec(2, 32))]
    folder = tmp_path_factory.mktemp("tuned")
    return tune(
        decoder, None, data, configs=configs, objective="best", workdir=folder / "w", output=folder / "out.onnx"
    )


@pytest.fixture(scope="package")
def mixed(decoder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return tune(decoder, None, data, objective="pareto", points=3, output=folder / "out.onnx")
