"""Look without touching: what a recipe would do to a model, and how far a quantized model is from its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.engine.embedding import table_report
from onnx_woq.engine.execute import report_of
from onnx_woq.engine.results import Inspection
from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.find.embeddings import find_embeddings
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import file_bytes, load
from onnx_woq.presets import preset
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.targets.matmulnbits import packed_bytes
from onnx_woq.tuning.mixed.candidates import planned_file_bytes

if TYPE_CHECKING:
    from onnx_woq.runtime.evaluation.metrics import Metrics

EVALUATION_SAMPLES = 32
"""Samples that `evaluate` takes at most, unless the caller says otherwise."""


def inspect(model: str | Path, recipe: Recipe | str = "RTN_G32ASYM") -> Inspection:
    """What a recipe would quantize in a model, what not and why, and the bytes before and after (estimated)."""
    recipe = preset(recipe) if isinstance(recipe, str) else recipe
    path = find_model(model)
    source = load(path)
    groups, skipped = find_linear_groups(source, recipe)
    embeddings, left_float = find_embeddings(source, recipe, groups)
    rows, tables = tuple(report_of(group, group.weight_bytes) for group in groups), tuple(map(table_report, embeddings))
    copies = float_copy_bytes(source, groups, embeddings)
    before = file_bytes(source)
    codes = (packed_bytes(group.k, group.n, group.spec, group.scale_dtype, dense=group.dense) for group in groups)
    added = sum(row.bytes_after for row in rows) - sum(codes)  # factors and biases, which are not planned
    after = planned_file_bytes(source, recipe, source.path, "0" * 32, "0" * 32) + added
    skipped += left_float
    return Inspection(path, recipe, rows + tables, tuple(skipped), copies, before, after, tuple(cuts(source)))


def evaluate(
    model: str | Path,
    reference: str | Path,
    data: Any,
    *,
    samples: int | None = None,
    seqlen: int = 512,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """How far a quantized model is from its float original on `data` (forms as in `quantize`).

    Language models get mean KL divergence (nats per token) with its standard error, same-top-1 share and
    perplexities; other models SQNR (dB) and cosine of their outputs.

    Args:
        model: an .onnx file, or a folder that holds one.
        reference: the float original, likewise.
        data: what to judge on; not what the model was calibrated on.
        samples: how many, an error when there are fewer; by default up to `EVALUATION_SAMPLES`.
        seqlen: tokens per sample, for text.
        tokenizer: folder of the tokenizer for text data, when it is not beside the reference.
        progress: called with (stage, done, total).
    """
    from onnx_woq.runtime.data.feeds import feeds, model_inputs
    from onnx_woq.runtime.evaluation.metrics import compare

    path, original = find_model(model), find_model(reference)
    float_model = load(original)
    batches = feeds(
        data,
        model_inputs(float_model),
        samples=samples or EVALUATION_SAMPLES,
        seqlen=seqlen,
        tokenizer=Path(tokenizer) if tokenizer else None,
        model_dir=original.parent,
        at_most=samples is None,
    )
    report = (lambda done, total: progress("evaluate", done, total)) if progress else None
    return compare(path, original, batches, progress=report)
