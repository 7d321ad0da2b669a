"""The command line."""

from onnx_woq.cli.commands import main

__all__ = ["main"]
