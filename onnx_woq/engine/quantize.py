"""Quantizing a model by one recipe: plan, calibrate, execute."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnx_woq.engine.calibration_data import calibrated_on, feeds_hash, read_data
from onnx_woq.engine.execute import execute
from onnx_woq.engine.metadata import metadata, warn_of_old_runtime
from onnx_woq.engine.output import destination
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.results import QuantizeReport
from onnx_woq.engine.statistics import collect
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import load, model_hash
from onnx_woq.graph.io.save import check_output
from onnx_woq.presets import preset
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe


def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | str = "RTN_G32ASYM",
    data: Any = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    tokenizer: str | Path | None = None,
    max_memory: int | None = None,
    executor: Executor | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> QuantizeReport:
    """Replaces a model's heavy MatMul weights by low-bit ones that ONNX Runtime runs natively.

    Quantized weights go to the disk as they are made, beside the output. If the run is killed or interrupted, or the
    disk is full or fails, they stay there, and the same call with `resume` goes on at the last finished block; any
    other failure leaves nothing.

    Args:
        model: an .onnx file, or a folder that holds one. It is never modified.
        output: an .onnx file, or a folder (then tokenizer and config files are copied along).
        recipe: what to do, or the name of a preset.
        data: calibration data; needed by GPTQ, AWQ, bias correction and low-rank compensation. An iterable of input
            dictionaries, of `(inputs, labels)` or of arrays; the path of a .npz, .npy, .txt or .jsonl file, or of a
            folder of arrays; or "random".
        samples: replaces the recipe's `nsamples`; an error then when there are fewer.
        seqlen: tokens per sample, replaces the recipe's `pad_max_length`.
        tokenizer: folder of the tokenizer for text data, when it is not beside the model.
        max_memory: bytes that the whole process may take; by default it takes what makes it fast.
        executor: solves weights, anything with the protocol of `concurrent.futures`; threads by default. It is not shut
            down.
        resume: continue what an earlier run has left of the same model, recipe, data and package version, if there is
            anything.
        progress: called with (stage, done, total).
        announce: called with a line for people on what memory and disk it will take, before the work begins.

    Raises:
        OnnxWoqError: the model, data, recipe or output cannot be used; nothing has been written then.
        DiskError: the disk is full, or fails; says what is kept.
    """
    start = time.monotonic()
    recipe = calibrated_on(preset(recipe) if isinstance(recipe, str) else recipe, samples, seqlen)
    path = find_model(model)
    source = load(path)
    place = destination(output, path)
    if place.onnx.parent.is_dir():
        check_output(source, place.onnx)
    plan = make_plan(source, recipe)
    plan.require_work()
    plan = plan.raised()
    plan.prepare()
    wanted = recipe.nsamples if recipe.needs_data else 0
    batches = read_data(source, path, data, recipe, wanted, tokenizer, at_most=samples is None) if wanted else []
    calibration = feeds_hash(batches)
    with open_resources(
        plan, batches, max_memory=max_memory, executor=executor, progress=progress, announce=announce
    ) as resources:
        made = execute(
            plan,
            place,
            lambda left, states: collect(plan, left, batches, resources, states),
            resources,
            properties=metadata(recipe, model_hash(source), calibration),
            companions_from=path.parent,
            resume="same" if resume else "",
        )
    warn_of_old_runtime(made.runtime)
    return QuantizeReport(
        model=path,
        output=place.onnx,
        recipe=recipe,
        weights=made.weights,
        skipped=plan.skipped,
        copies=plan.copies,
        bytes_before=plan.bytes_before,
        bytes_after=made.bytes,
        calibration=calibration,
        seconds=time.monotonic() - start,
    )
