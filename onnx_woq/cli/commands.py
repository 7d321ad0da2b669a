"""The click group `main`, which imports each command when it is asked for.

Exit codes: 0 done, 1 a fault of this program, 2 usage or bad input, 3 tolerance not met (the best is still written),
130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any

import click

from onnx_woq.cli.console import make_streams_last, named_errors, set_up_logging

SUMMARIES = {
    "configs": "List the predefined configurations in tuning order, with what each means.",
    "convert": "Write an old or unusual MODEL anew, in the form that the other commands take.",
    "evaluate": "Say how far MODEL is from its float original on data.",
    "inspect": "Show what would be quantized in MODEL, what not and why, and the bytes before and after.",
    "quantize": "Quantize MODEL's MatMul weights.",
}
"""Each command with the first sentence of its help. The command `name` is the object `name` of `onnx_woq.cli.name`."""


class LazyGroup(click.Group):
    """A group that imports a command's file when that command, or its help, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Lists the names of all commands, in the order of the help."""
        return sorted({*super().list_commands(ctx), *SUMMARIES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command, or returns None when there is no such command."""
        if cmd_name in SUMMARIES and cmd_name not in self.commands:
            self.add_command(getattr(importlib.import_module(f"onnx_woq.cli.{cmd_name}"), cmd_name))
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands by their summaries, which imports none of them."""
        stubs = {name: click.Command(name, help=summary) for name, summary in SUMMARIES.items()}
        click.Group(commands={**self.commands, **stubs}).format_commands(ctx, formatter)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command line, whatever becomes of the streams it writes to."""
        make_streams_last()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that the arguments name; named errors and interrupts end it without a traceback."""
        with named_errors():
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="onnx-woq")
@click.option("--debug", is_flag=True, help="Log every step, and faults of this program with all of their origin.")
def main(debug: bool = False) -> None:
    """Turn float ONNX models into low-bit ones that ONNX Runtime runs natively."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Windows writes to files and pipes in an old code page
    set_up_logging(debug=debug)
