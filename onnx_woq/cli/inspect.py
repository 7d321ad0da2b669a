"""`onnx-woq inspect`: the plan of a quantization, without its work."""

from __future__ import annotations

import click

from onnx_woq.cli.console import print_result
from onnx_woq.cli.options import RecipeFlags, json_option, recipe_options


@click.command()
@click.argument("model", type=click.Path())
@recipe_options
@click.option("--convert", is_flag=True, help="Convert a model of an old opset or in double precision first.")
@json_option
def inspect(model: str, convert: bool, as_json: bool, recipe: RecipeFlags) -> None:
    """Show what would be quantized in MODEL, what not and why, and the bytes before and after."""
    from onnx_woq.cli.recipe_flags import build_recipe  # brings the solvers
    from onnx_woq.engine import inspection
    from onnx_woq.report import terminal

    print_result(inspection.inspect(model, build_recipe(recipe), convert=convert), as_json, terminal.inspection)
