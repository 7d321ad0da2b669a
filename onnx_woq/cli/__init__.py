"""The command line: the click group `main`, one file a command, the flags they share and how they talk to people.

This room may import every other room, and click and rich, which live only here (rich also in `report.terminal`). It
never quantizes, judges or draws by itself: it turns flags into arguments of the rooms below, and results and named
errors into text, JSON and exit codes. No other room imports it. The group imports a command's file when that command
or its help is asked for, and a command imports the engine when it runs, so that `onnx-woq --help` stays instant.
"""

from onnx_woq.cli.commands import main

__all__ = ["main"]
