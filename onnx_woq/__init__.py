"""Weight-only quantization of ONNX models: float weights become low-bit ones that ONNX Runtime runs natively.

The public names are imported from here, and each is loaded when it is first used: `import onnx_woq` never loads NumPy,
ONNX or ONNX Runtime by itself. docs/design.md says what lives in which room.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_woq.core.spec import Spec
    from onnx_woq.engine.convert import convert
    from onnx_woq.engine.inspection import inspect
    from onnx_woq.engine.quantize import quantize
    from onnx_woq.errors import OnnxWoqError
    from onnx_woq.presets import PRESETS
    from onnx_woq.recipe import Recipe
    from onnx_woq.report.html_page import write_report
    from onnx_woq.runtime.evaluation.compare import evaluate
    from onnx_woq.tuning.results import TuneResult
    from onnx_woq.tuning.tune import tune

# From 1.32 on, onnxruntime writes a device id and an event database under the home folder and calls its vendor. This
# turns that off before any module of the package imports it, in worker processes too; a value that the user has set
# stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Imported at first use, so that `import onnx_woq` and `onnx-woq --help` stay instant.
_HOMES = {
    "PRESETS": "presets",
    "OnnxWoqError": "errors",
    "Recipe": "recipe",
    "Spec": "core.spec",
    "TuneResult": "tuning.results",
    "convert": "engine.convert",
    "evaluate": "runtime.evaluation.compare",
    "inspect": "engine.inspection",
    "quantize": "engine.quantize",
    "tune": "tuning.tune",
    "write_report": "report.html_page",
}

__all__ = [
    "PRESETS",
    "OnnxWoqError",
    "Recipe",
    "Spec",
    "TuneResult",
    "convert",
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
