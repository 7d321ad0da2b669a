"""`onnx-woq evaluate`: the distance between a quantized model and its float original."""

from __future__ import annotations

from dataclasses import asdict

import click

from onnx_woq.cli.console import print_result, progress_bar
from onnx_woq.cli.options import DataFlags, data_options, json_option

TOKENS = 512
"""Tokens per sample where --seqlen does not say."""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--reference", required=True, type=click.Path(), metavar="FLOAT", help="The float original.")
@click.option("--data", "path", required=True, metavar="PATH", help="Text, JSONL, .npz, .npy, a folder; or `random`.")
@data_options
@json_option
def evaluate(model: str, reference: str, path: str, as_json: bool, data: DataFlags) -> None:
    """Say how far MODEL is from its float original on data.

    Language models: mean KL divergence, same top-1, perplexities. Others: SQNR and cosine of the outputs.
    """
    from onnx_woq.report import terminal
    from onnx_woq.runtime.evaluation import compare

    keywords = asdict(data) | {"seqlen": data.seqlen or TOKENS}
    with progress_bar() as progress:
        metrics = compare.evaluate(model, reference, path, **keywords, progress=progress)
    print_result(metrics, as_json, terminal.evaluation)
