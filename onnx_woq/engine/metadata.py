"""Metadata of a written model: where it comes from, what became of its weights, and the runtime that it needs."""

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
"""Key of the metadata that says what became of each linear group."""

RUNTIME = "onnx_woq.minimum_onnxruntime"
"""Key of the metadata that names the oldest onnxruntime which runs the model."""


def metadata(recipe: Recipe, source_hash: str, calibration: str) -> dict[str, str]:
    """Returns what a written model says of where it comes from.

    Args:
        recipe: that made it.
        source_hash: of the float model.
        calibration: hash of the calibration data.
    """
    return {
        "onnx_woq.version": version(),
        "onnx_woq.recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "onnx_woq.calibration": calibration if recipe.needs_data else "",
        "onnx_woq.source": source_hash,
    }


def layers_json(reports: Iterable[WeightReport]) -> str:
    """Returns what a written model says of each of its linear groups, in JSON."""
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
    """Returns what a result follows from, by the names that people know it under."""
    names = {
        "model": "onnx_woq.source",
        "recipe": "onnx_woq.recipe",
        "calibration data": "onnx_woq.calibration",
        "package version": "onnx_woq.version",
    }
    return {name: properties[key] for name, key in names.items()}


def warn_of_old_runtime(needed: str) -> None:
    """Says so when the installed onnxruntime is older than the result needs: it may fail, or compute wrong numbers."""
    try:
        installed = version_of("onnxruntime")
    except PackageNotFoundError:  # another distribution of it: nothing is known
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
