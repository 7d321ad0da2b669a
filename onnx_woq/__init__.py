"""onnx-woq: float ONNX models to low-bit weights that ONNX Runtime runs natively."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_woq.autotune import tune
    from onnx_woq.errors import OnnxWoqError
    from onnx_woq.examine import evaluate, inspect
    from onnx_woq.page import write_report
    from onnx_woq.pipeline import quantize
    from onnx_woq.presets import PRESETS
    from onnx_woq.recipe import Recipe, Spec
    from onnx_woq.results import TuneResult

# Whatever of us imports onnxruntime comes through here first, in worker processes too. From 1.32 on it would write a
# device id and an event database under the home folder and call its vendor; what is set already is the user's word.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Resolved on first use, so that `import onnx_woq` and `onnx-woq --help` stay instant.
_HOMES = {
    "PRESETS": "presets",
    "OnnxWoqError": "errors",
    "Recipe": "recipe",
    "Spec": "recipe",
    "TuneResult": "results",
    "evaluate": "examine",
    "inspect": "examine",
    "quantize": "pipeline",
    "tune": "autotune",
    "write_report": "page",
}

__all__ = [
    "PRESETS",
    "OnnxWoqError",
    "Recipe",
    "Spec",
    "TuneResult",
    "evaluate",
    "inspect",
    "quantize",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        return getattr(importlib.import_module(f"onnx_woq.{home}"), name)
    raise AttributeError(f"module 'onnx_woq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
