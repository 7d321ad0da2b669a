"""The corridor `quantize()`: load, find, calibrate, solve, lower, save. One way, no going back."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.core.methods.registry import METHODS
from onnx_woq.engine.embedding import standalone_tables
from onnx_woq.engine.execute import Resources, execute, open_resources
from onnx_woq.engine.output import destination
from onnx_woq.engine.results import QuantizeReport
from onnx_woq.errors import AlreadyQuantized, DataError, NothingToQuantize
from onnx_woq.graph.find.embeddings import Embedding, find_embeddings
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import LinearGroup, Skipped, find_linear_groups
from onnx_woq.graph.find.quantized import low_bit_nodes
from onnx_woq.graph.io.find_model import find_model
from onnx_woq.graph.io.model import Model, clone, file_bytes, load, model_hash
from onnx_woq.graph.io.save import check_output
from onnx_woq.graph.rewrite.rotate import rotate
from onnx_woq.presets import preset
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.version import version

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)


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
        executor: where taps are solved, anything with the protocol of `concurrent.futures`; threads by default. It is
            not shut down.
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
    groups, skipped = plan(source, recipe)
    embeddings, left_float = find_embeddings(source, recipe, groups)
    before, copies = file_bytes(source), float_copy_bytes(source, groups, embeddings)
    prepare(source, recipe, groups, embeddings)
    batches: list[Feed] = []
    if recipe.needs_data:
        batches = read_data(source, path, data, recipe, recipe.nsamples, tokenizer, at_most=samples is None)
    calibration = feeds_hash(batches)
    properties = metadata(recipe, model_hash(source), calibration)
    with open_resources(
        source, groups, recipe, batches, max_memory, executor, progress, announce, embeddings
    ) as resources:
        made = execute(
            source,
            place,
            recipe,
            groups,
            lambda left, states: collect(source, recipe, left, batches, resources, states),
            resources,
            properties=properties,
            companions_from=path.parent,
            resume="same" if resume else "",
            embeddings=embeddings,
        )
    warn_of_old_runtime(made.runtime)
    return QuantizeReport(
        model=path,
        output=place.onnx,
        recipe=recipe,
        weights=tuple(made.weights),
        skipped=(*skipped, *left_float),
        copies=copies,
        bytes_before=before,
        bytes_after=made.bytes,
        calibration=calibration,
        seconds=time.monotonic() - start,
    )


def plan(model: Model, recipe: Recipe) -> tuple[list[LinearGroup], list[Skipped]]:
    """The taps that `recipe` quantizes in `model`, and every node it leaves float.

    Raises:
        AlreadyQuantized: the model carries low-bit weights already.
        NothingToQuantize: no site is eligible; the message gives the reasons.
    """
    if nodes := low_bit_nodes(model):
        raise AlreadyQuantized(
            f"{model.path} is already quantized ({nodes} low-bit nodes): nothing to do, and nothing was written. "
            "Start from the float model to quantize it differently"
        )
    groups, skipped = find_linear_groups(model, recipe)
    if not groups:
        reasons = sorted({s.reason for s in skipped})
        raise NothingToQuantize(
            f"{model.path} has no MatMul or Gemm to quantize under this recipe"
            + (f" ({'; '.join(reasons)}): see `onnx-woq inspect`" if reasons else ": it has none at all")
        )
    return groups, skipped


def prepare(model: Model, recipe: Recipe, groups: Sequence[LinearGroup], embeddings: Sequence[Embedding]) -> None:
    """What `recipe` does to the float model before it is calibrated.

    Taps and embeddings are those found before, and stay those of the model.

    Raises:
        RotationError: it is to be rotated and cannot be.
    """
    if recipe.rotation:
        quantized = {linear.node for group in groups for linear in group.linears}
        quantized.update(node for table in standalone_tables(embeddings) for node in table.nodes)
        rotate(model, quantized, sharing(embeddings))


def prepared(source: Model, recipe: Recipe) -> tuple[Model, list[LinearGroup]]:
    """The float model as `recipe` calibrates it, a copy where that is another one, and its taps.

    Raises:
        RotationError: see `prepare`.
    """
    model = clone(source) if recipe.rotation else source
    groups = find_linear_groups(model, recipe)[0]
    prepare(model, recipe, groups, find_embeddings(model, recipe, groups)[0])
    return model, groups


def sharing(embeddings: Sequence[Embedding]) -> dict[ir.Node, str]:
    """The nodes that will read the codes of one table, heads and Gathers, and their names."""
    shared = [table for table in embeddings if table.shared and table.head]
    heads = {table.head.node: table.head.name for table in shared if table.head}
    return heads | {node: node.outputs[0].name or "" for table in shared for node in table.nodes}


def calibrated_on(recipe: Recipe, samples: int | None, seqlen: int | None) -> Recipe:
    """The same recipe with another amount of calibration data, where one is given."""
    if samples is not None:
        recipe = replace(recipe, nsamples=samples)
    return recipe if seqlen is None else replace(recipe, pad_max_length=seqlen)


def read_data(
    model: Model, named: Path, data: Any, recipe: Recipe, samples: int, tokenizer: str | Path | None, *, at_most: bool
) -> list[Feed]:
    """Up to `samples` calibration samples of the length the recipe says; exactly as many unless `at_most`.

    Args:
        model: tells what inputs it takes.
        named: the model's path as the user named it; its folder is searched for a tokenizer.
        data: in any form that `quantize` takes.
        recipe: tells the length of a sample.
        samples: how many are wanted.
        tokenizer: the tokenizer's folder, when it is not beside the model.
        at_most: fewer samples are no error.

    Raises:
        DataError: there is no data, or it does not fit the model.
    """
    from onnx_woq.runtime.data.feeds import feeds, model_inputs

    if data is None:
        needing = [recipe.method.upper() if METHODS[recipe.method].needs_data else ""]
        needing += ["bias_correction" if recipe.bias_correction else "", "lowrank" if recipe.lowrank else ""]
        needing += ["both_streams" if recipe.asymmetric_calibration else ""]
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


def feeds_hash(batches: list[Feed]) -> str:
    """A short hash of the calibration data, "" for none."""
    from onnx_woq.runtime.data.feeds import data_hash

    return data_hash(batches) if batches else ""


def collect(
    model: Model,
    recipe: Recipe,
    groups: list[LinearGroup],
    batches: list[Feed],
    resources: Resources,
    states: Path | None = None,
) -> Iterator[tuple[LinearGroup, Stats | None]]:
    """Every tap with its statistics, in graph order; without data the statistics are None.

    Args:
        model: taken as it is at the time of the call, unless the recipe is sequential.
        recipe: tells what is quantized already when the statistics of a tap are collected.
        taps: of the model.
        batches: one feed per sample.
        with_means: memory, and whom to tell.
        states: a private folder for hidden states that a later run can go on from.
    """
    if not batches:
        return ((group, None) for group in groups)
    from onnx_woq.runtime.calibration.collect import Sequential, collect_statistics

    progress = resources.progress
    sequential: Sequential = "off"
    if recipe.true_sequential:
        sequential = "block" if recipe.sequential_unit == "block" else "tap"
    return collect_statistics(
        model,
        groups,
        batches,
        memory_budget=resources.memory.window,
        sequential=sequential,
        progress=(lambda done, total: progress("calibrate", done, total)) if progress else None,
        checkpoint=states,
        asymmetric_calibration=recipe.asymmetric_calibration,
    )


def metadata(recipe: Recipe, source_hash: str, calibration: str) -> dict[str, str]:
    """What a written model says of where it comes from: recipe, version, hashes of calibration and source."""
    return {
        "onnx_woq.version": version(),
        "onnx_woq.recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "onnx_woq.calibration": calibration if recipe.needs_data else "",
        "onnx_woq.source": source_hash,
    }


def warn_of_old_runtime(needed: str) -> None:
    """Says so when the installed onnxruntime is older than the result needs: it may fail, or compute wrong numbers."""
    try:
        installed = version_of("onnxruntime")
    except PackageNotFoundError:  # another distribution of it: nothing is known
        return
    if needed and _numbers(installed) < _numbers(needed):
        logger.warning(
            "the result needs onnxruntime %s and %s is installed, which may refuse it or compute wrong numbers: "
            "upgrade it, or use more bits or --accuracy-level 0",
            needed,
            installed,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])
