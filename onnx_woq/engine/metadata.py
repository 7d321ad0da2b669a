"""Metadata of a quantized model: its origin, the number formats of its layers, and the runtime that it needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from onnx_woq.engine.results import WeightReport
from onnx_woq.recipe import Recipe
from onnx_woq.version import version

logger = logging.getLogger(__name__)

LAYERS = "onnx_woq.layers"
"""The key of the metadata that lists each linear group with its number format and error."""

RUNTIME = "onnx_woq.minimum_onnxruntime"
"""The key of the metadata that names the oldest onnxruntime which runs the model."""


def metadata(recipe: Recipe, source_hash: str, calibration: str) -> dict[str, str]:
    """Returns the metadata on the origin of a quantized model.

    Args:
        recipe: the recipe.
        source_hash: the hash of the float model.
        calibration: the hash of the calibration data, which is replaced by "" if the recipe needs none.
    """
    return {
        "onnx_woq.version": version(),
        "onnx_woq.recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "onnx_woq.calibration": calibration if recipe.needs_data else "",
        "onnx_woq.source": source_hash,
    }


def layers_json(reports: Iterable[WeightReport]) -> str:
    """Returns the metadata on the linear groups of a quantized model, in JSON."""
    rows = [
        {
            "name": report.name,
            "sites": report.nodes,
            **report.spec.to_dict(),
            "k": report.k,
            "n": report.n,
            "bytes": report.bytes_after,
            "error": report.error,
            "scaling": report.scaling,
        }
        for report in reports
    ]
    return json.dumps(rows)


def run_key(properties: Mapping[str, str]) -> dict[str, str]:
    """Returns everything that a result follows from, by the names that messages call it."""
    names = {
        "model": "onnx_woq.source",
        "recipe": "onnx_woq.recipe",
        "calibration data": "onnx_woq.calibration",
        "package version": "onnx_woq.version",
    }
    return {name: properties[key] for name, key in names.items()}


def warn_of_old_runtime(needed: str) -> None:
    """Logs a warning if the installed onnxruntime is older than the result needs: it may compute wrong numbers.

    Args:
        needed: the oldest version that runs the result, such as "1.22"; "" for any.
    """
    try:
        installed = version_of("onnxruntime")
    except PackageNotFoundError:  # it may be installed under another name, such as onnxruntime-gpu
        return
    if needed and _numbers(installed) < _numbers(needed):
        logger.warning(
            "the result needs onnxruntime %s and %s is installed, which may refuse it or compute wrong numbers: "
            "upgrade it, or use more bits or --accuracy-level 0",
            needed,
            installed,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Returns major and minor version."""
    return tuple(int(part) for part in version.split(".")[:2])
