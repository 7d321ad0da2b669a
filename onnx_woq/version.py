"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """Returns the version of the installed package; "0+unknown" for a source tree that is not installed."""
    try:
        return installed_version("onnx-woq")
    except PackageNotFoundError:
        return "0+unknown"
