"""Quantization of a model by one recipe: plan, read the data, calibrate, execute."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnx_woq.engine.calibration_data import calibrated_on, feeds_hash, read_data, warn_of_few_tokens
from onnx_woq.engine.convert import converted
from onnx_woq.engine.execute import execute
from onnx_woq.engine.metadata import metadata, warn_of_old_runtime
from onnx_woq.engine.output import check_room, destination
from onnx_woq.engine.plan import make_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.results import QuantizeReport
from onnx_woq.engine.statistics import collect
from onnx_woq.graph.io.find_model import ModelSource, model_file
from onnx_woq.graph.io.model import load, model_hash
from onnx_woq.graph.io.save import check_output
from onnx_woq.presets import preset
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.custom_ops import CustomOps, custom_operators
from onnx_woq.runtime.session import blames_models


@blames_models("model")
def quantize(
    model: ModelSource,
    output: str | Path,
    recipe: Recipe | str = "RTN_G32ASYM",
    data: Any = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    tokenizer: str | Path | None = None,
    custom_ops: CustomOps = None,
    max_memory: int | None = None,
    executor: Executor | None = None,
    resume: bool = False,
    verify: bool = True,
    convert: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> QuantizeReport:
    """Quantizes a model: replaces the weights of its MatMuls and Gemms by low-bit ones, and writes the result.

    Solved weights are written beside the output at once. If the run is killed or interrupted, or the disk is full or
    fails, they stay there, and the same call with `resume=True` goes on after the last finished block of the model. Any
    other failure leaves nothing on the disk.

    Args:
        model: an .onnx file, a folder that holds one, or a model in memory (`onnx.ModelProto`, `onnx_ir.Model`). It is
            never modified.
        output: an .onnx file; or a folder, which gets the tokenizer and config files as well.
        recipe: the recipe, or the name of a preset.
        data: calibration data, which GPTQ, AWQ, TEQ, bias correction, low-rank compensation and asymmetric calibration
            need. An iterable of input dictionaries, of `(inputs, labels)` or of arrays; the path of a .npz, .npy, .txt
            .jsonl or .csv file, or of a folder of arrays; or "random".
        samples: replaces the recipe's `nsamples`; fewer samples are then an error.
        seqlen: tokens of a sample, replaces the recipe's `pad_max_length`.
        tokenizer: the tokenizer's folder for text data, if it is not beside the model.
        custom_ops: a library of custom operators that the model needs, or several.
        max_memory: the most bytes that the whole process may take; by default as many as make it fast.
        executor: solves weights, anything with the protocol of `concurrent.futures.Executor`; by default threads. It is
            not shut down.
        resume: continue an unfinished run of the same model, recipe, data and package version, if there is one.
        verify: open the result in ONNX Runtime before it takes its place. It is not run, and its weights stay on the
            disk. If the runtime opens the float model and not the result, that is an error.
        convert: begin with what `onnx_woq.convert` makes of the model, which takes opset 7 to 12, weights that are
            inputs as well, and double precision.
        progress: called with (stage, steps done, steps in all).
        announce: called before the work begins, with each line for people: the memory it will take, and weights that
            will run slowly.

    Returns:
        A report with a row for each weight, and the bytes before and after.

    Raises:
        OnnxWoqError: the model, data, recipe or output cannot be used; nothing is written.
        InputChanged: the model's files were changed or replaced meanwhile; nothing is written.
        BrokenResult: ONNX Runtime does not open the result; nothing is written.
        DiskError: the disk is full, or fails; the message says what is kept.
    """
    start = time.monotonic()
    recipe = calibrated_on(preset(recipe) if isinstance(recipe, str) else recipe, samples, seqlen)
    with (
        model_file(model) as given,
        custom_operators(custom_ops),
        converted(given, convert, announce) as path,
    ):
        source = load(path)
        place = destination(output, given)
        if place.onnx.parent.is_dir():
            check_output(source, place.onnx)
        plan = make_plan(source, recipe)
        if not plan.left_out:
            plan.require_work()
        plan = plan.raised()
        plan.prepare()
        check_room(plan, place)  # before the whole model is read for its hash
        wanted = recipe.nsamples if recipe.needs_data and plan.groups else 0
        batches = read_data(source, given, data, recipe, wanted, tokenizer, at_most=samples is None) if wanted else []
        warn_of_few_tokens(plan.groups, batches)
        calibration = feeds_hash(batches)
        with open_resources(
            plan, batches, max_memory=max_memory, executor=executor, progress=progress, announce=announce, verify=verify
        ) as resources:
            result = execute(
                plan,
                place,
                lambda left, states: collect(plan, left, batches, resources, states),
                resources,
                properties=metadata(recipe, model_hash(source), calibration),
                companions_from=given,
                resume="same" if resume else "",
            )
        warn_of_old_runtime(result.runtime)
        return QuantizeReport(
            model=given,
            output=place.onnx,
            recipe=recipe,
            weights=result.weights,
            skipped=plan.skipped,
            copies=plan.copies,
            bytes_before=plan.bytes_before,
            bytes_after=result.bytes,
            calibration=calibration,
            seconds=time.monotonic() - start,
        )
