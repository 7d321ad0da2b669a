"""Comparing a quantized model with its float original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_woq.graph.io.find_model import ModelSource, model_file
from onnx_woq.graph.io.model import load
from onnx_woq.progress import Progress
from onnx_woq.runtime.custom_ops import CustomOps, custom_operators
from onnx_woq.runtime.data.feeds import feeds
from onnx_woq.runtime.data.inputs import model_inputs
from onnx_woq.runtime.evaluation.metrics import Metrics, compare
from onnx_woq.runtime.session import blames_models

EVALUATION_SAMPLES = 32
"""Samples that `evaluate` takes at most, unless the caller says otherwise."""


@blames_models("model", "reference")
def evaluate(
    model: ModelSource,
    reference: ModelSource,
    data: Any,
    *,
    samples: int | None = None,
    seqlen: int = 512,
    tokenizer: str | Path | None = None,
    custom_ops: CustomOps = None,
    progress: Progress | None = None,
) -> Metrics:
    """Measures how far a quantized model is from its float original on `data`, in any form that `quantize` takes.

    Language models get mean KL divergence (nats per token) with its standard error, same-top-1 share and
    perplexities; other models SQNR (dB) and cosine of their outputs.

    Args:
        model: an .onnx file, a folder that holds one, or a model in memory (`onnx.ModelProto`, `onnx_ir.Model`).
        reference: the float original, likewise.
        data: what to judge on; not what the model was calibrated on.
        samples: how many, an error when there are fewer; by default up to `EVALUATION_SAMPLES`.
        seqlen: tokens per sample, for text.
        tokenizer: folder of the tokenizer for text data, when it is not beside the reference.
        custom_ops: a library of custom operators that the models need, or several.
        progress: called with (stage, done, total).
    """
    with model_file(model) as path, model_file(reference) as original, custom_operators(custom_ops):
        batches = feeds(
            data,
            model_inputs(load(original, convert=True)),
            samples=samples or EVALUATION_SAMPLES,
            seqlen=seqlen,
            tokenizer=Path(tokenizer) if tokenizer else None,
            model_dir=original.parent,
            at_most=samples is None,
        )
        report = (lambda done, total: progress("evaluate", done, total)) if progress else None
        return compare(path, original, batches, progress=report)
