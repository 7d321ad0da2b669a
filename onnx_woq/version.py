"""The installed version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The version in the installed package's metadata; "0+unknown" when run from a source tree not installed."""
    try:
        return installed_version("onnx-woq")
    except PackageNotFoundError:
        return "0+unknown"
