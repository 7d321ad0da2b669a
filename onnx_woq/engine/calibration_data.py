"""Calibration data of a run: reading it as a recipe asks for, and the hash that identifies it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_woq.core.methods.registry import METHODS
from onnx_woq.engine.plan import PlannedWeight
from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed, data_hash, feeds
from onnx_woq.runtime.data.inputs import model_inputs

logger = logging.getLogger(__name__)


def calibrated_on(recipe: Recipe, samples: int | None, seqlen: int | None) -> Recipe:
    """Returns a recipe with another amount of calibration data.

    Args:
        recipe: the recipe.
        samples: replaces `nsamples`, unless it is None.
        seqlen: tokens of a sample, replaces `pad_max_length`, unless it is None.
    """
    if samples is not None:
        recipe = replace(recipe, nsamples=samples)
    return recipe if seqlen is None else replace(recipe, pad_max_length=seqlen)


def read_data(
    model: Model, named: Path, data: Any, recipe: Recipe, samples: int, tokenizer: str | Path | None, *, at_most: bool
) -> list[Feed]:
    """Reads calibration samples of the length that a recipe asks for.

    Args:
        model: the float model, which tells what inputs a sample has.
        named: the model's path as the user named it; its folder is searched for a tokenizer.
        data: the data, in any form that `quantize` takes.
        recipe: tells the length of a sample, in tokens.
        samples: the number of samples to read.
        tokenizer: the tokenizer's folder, if it is not beside the model.
        at_most: if True, fewer samples are no error.

    Raises:
        DataError: there is no data, too little of it, or it does not fit the model.
    """
    if data is None:
        needing = [recipe.method.upper() if METHODS[recipe.method].needs_data else ""]
        needing += ["bias_correction" if recipe.bias_correction else "", "lowrank" if recipe.lowrank else ""]
        needing += ["asymmetric_calibration" if recipe.asymmetric_calibration else ""]
        raise DataError(
            f"{' and '.join(filter(None, needing)) or 'the built-in judge'} needs calibration data: give --calib FILE "
            "(text, JSONL, .npz, .npy or a folder of arrays), in Python the `data` argument; plain RTN works without"
        )
    return feeds(
        data,
        model_inputs(model),
        samples=samples,
        seqlen=recipe.pad_max_length,
        exact_length=recipe.use_max_length,
        tokenizer=Path(tokenizer) if tokenizer else None,
        model_dir=named.parent,
        at_most=at_most,
    )


def warn_of_few_tokens(weights: Sequence[PlannedWeight], batches: Sequence[Feed]) -> None:
    """Warns where the samples have fewer tokens than a weight has inputs: nothing then says how good the result is."""
    if not batches or not weights:
        return
    from onnx_woq.runtime.calibration.windows import token_count  # brings onnxruntime

    tokens, widest = sum(map(token_count, batches)), max(weights, key=lambda weight: weight.k)
    if tokens < widest.k:
        logger.warning(
            "the calibration data has %d tokens, fewer than the %d inputs of %s: on other data the result may be worse "
            "than rounding to nearest; give more data, or compare with `onnx-woq evaluate`",
            tokens,
            widest.k,
            widest.name,
        )


def feeds_hash(batches: list[Feed]) -> str:
    """Returns a hash that identifies calibration samples, "" for none."""
    return data_hash(batches) if batches else ""
