"""Tuning where some configurations do not apply."""

from __future__ import annotations

import numpy as np
import pytest
from builders import graph, node, random, value, write

from onnx_woq import PRESETS, tune
from onnx_woq.errors import NothingToQuantize


@pytest.fixture
def one_matmul(tmp_path):
    """Its only MatMul is also its last one."""
    product, x, y = node("MatMul", ["x", "W"], ["y"]), value("x", ("t", 64)), value("y", ("t", 32))
    return write(tmp_path / "m.onnx", graph([product], [x], [y], {"W": random(64, 32)}))


def test_a_configuration_that_finds_nothing_is_a_failed_trial(one_matmul, tmp_path):
    data = [np.random.default_rng(i).standard_normal((8, 64)).astype(np.float32) for i in range(4)]
    result = tune(one_matmul, lambda _: 1.0, data, objective="best", workdir=tmp_path / "w")
    status = {trial.name: trial.status for trial in result.trials}
    assert status == dict.fromkeys(PRESETS, "ok") | {"GPTQ_G32ASYM_DISABLE_LAST_MATMUL": "failed"}
    assert result.met
    with pytest.raises(NothingToQuantize):
        tune(one_matmul, lambda _: 1.0, data, configs=["GPTQ_G32ASYM_DISABLE_LAST_MATMUL"], workdir=tmp_path / "v")
