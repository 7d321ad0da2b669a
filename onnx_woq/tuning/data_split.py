"""Splitting data between calibration and the built-in judge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from onnx_woq.engine.calibration_data import read_data
from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.tuning import bootstrap
from onnx_woq.tuning.options import CalibrationData

logger = logging.getLogger(__name__)

HELD_OUT = 8
"""Samples held out for the built-in judge at least; a third of what there is when the data is short."""

MOST_HELD_OUT = bootstrap.STAGES[-1]
"""Samples that are held out where the data has them to spare: they are looked at only where it is close."""


def split_data(
    source: Model,
    path: Path,
    recipes: Mapping[str, Recipe],
    data: CalibrationData,
    *,
    judged: bool,
) -> tuple[list[Feed], list[Feed]]:
    """Returns calibration samples and, for the built-in judge, samples held out from them.

    Args:
        source: the float model.
        path: of the model as it was named; its folder is searched for a tokenizer.
        recipes: that will be calibrated on the samples.
        data: where they come from.
        judged: the built-in judge needs samples of its own.

    Raises:
        DataError: there is no data, too little of it, or it does not fit the model.
    """
    exact = data.samples is not None
    needing = [recipe for recipe in recipes.values() if recipe.needs_data]
    if not (judged or needing):
        return [], []
    first = (needing or list(recipes.values()))[0]
    wanted = max(recipe.nsamples for recipe in recipes.values())
    if not judged:
        return read_data(source, path, data.source, first, wanted, data.tokenizer, at_most=not exact), []
    batches = read_data(source, path, data.source, first, wanted + MOST_HELD_OUT, data.tokenizer, at_most=True)
    if exact and len(batches) < wanted:
        raise DataError(
            f"{wanted} samples are asked for and the data has {len(batches)}: give more data or fewer samples"
        )
    if len(batches) < 2:
        raise DataError(
            "the built-in judge needs at least 2 samples, one to calibrate and one held out: give more data, "
            "a shorter --seqlen, or an evaluation function of your own (--eval)"
        )
    spare = len(batches) - wanted
    held = min(MOST_HELD_OUT, spare) if spare >= HELD_OUT or (exact and spare > 0) else _least_held_out(batches)
    if exact and spare < held:
        logger.warning("%d of the %d samples are held out for judging", held, len(batches))
    return batches[:-held], batches[-held:]


def _least_held_out(batches: list[Feed]) -> int:
    return min(HELD_OUT, max(len(batches) // 3, 1))
