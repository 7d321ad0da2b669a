"""`onnx-woq convert`: an old or unusual model in the form that the other commands take."""

from __future__ import annotations

import click

from onnx_woq.cli.console import announce


@click.command()
@click.argument("model", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="OUT", help="An .onnx file, or a folder.")
def convert(model: str, output: str) -> None:
    """Write an old or unusual MODEL anew, in the form that the other commands take.

    Opsets 7 to 12 are raised to 13, initializers that are inputs as well become constants, and double precision becomes
    single, except in inputs and outputs.
    """
    from onnx_woq.engine import convert as conversion

    for line in conversion.convert(model, output) or ["nothing had to be changed"]:
        announce(line)
    click.echo(output)
