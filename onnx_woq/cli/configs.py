"""`onnx-woq configs`: the predefined configurations."""

from __future__ import annotations

import click

from onnx_woq.cli.console import print_json
from onnx_woq.cli.options import json_option


@click.command()
@json_option
def configs(as_json: bool) -> None:
    """List the predefined configurations in tuning order, with what each means."""
    from onnx_woq.presets import MEANINGS, PRESETS  # brings the solvers

    if as_json:
        print_json({name: recipe.to_dict() for name, recipe in PRESETS.items()})
        return
    width = max(map(len, PRESETS))
    for name in PRESETS:
        click.echo(f"{name:<{width}}  {MEANINGS[name]}")
