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

from onnx_woq.core.methods import METHODS, needs_data
from onnx_woq.embedding import own
from onnx_woq.errors import AlreadyQuantized, DataError, NothingToQuantize
from onnx_woq.folder import destination, find_model
from onnx_woq.graph.embeddings import Embedding, find_embeddings
from onnx_woq.graph.model import Model, check_output, clone, file_bytes, load, low_bit_nodes, model_hash
from onnx_woq.graph.rotate import rotate
from onnx_woq.graph.taps import Skipped, Tap, find_taps, shared_copy_bytes
from onnx_woq.making import Feed, Means, Progress, make, means
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe
from onnx_woq.results import QuantizeReport
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
    taps, skipped = plan(source, recipe)
    embeddings, left_float = find_embeddings(source, recipe, taps)
    before, copies = file_bytes(source), shared_copy_bytes(source, taps, embeddings)
    prepare(source, recipe, taps, embeddings)
    batches: list[Feed] = []
    if needs_data(recipe):
        batches = read_data(source, path, data, recipe, recipe.nsamples, tokenizer, at_most=samples is None)
    calibration = feeds_hash(batches)
    properties = metadata(recipe, model_hash(source), calibration)
    with means(source, taps, recipe, batches, max_memory, executor, progress, announce, embeddings) as with_means:
        made = make(
            source,
            place,
            recipe,
            taps,
            lambda left, states: collect(source, recipe, left, batches, with_means, states),
            with_means,
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
        taps=tuple(made.taps),
        skipped=(*skipped, *left_float),
        copies=copies,
        bytes_before=before,
        bytes_after=made.bytes,
        calibration=calibration,
        seconds=time.monotonic() - start,
        embeddings=tuple(made.embeddings),
    )


def plan(model: Model, recipe: Recipe) -> tuple[list[Tap], list[Skipped]]:
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
    taps, skipped = find_taps(model, recipe)
    if not taps:
        reasons = sorted({s.reason for s in skipped})
        raise NothingToQuantize(
            f"{model.path} has no MatMul or Gemm to quantize under this recipe"
            + (f" ({'; '.join(reasons)}): see `onnx-woq inspect`" if reasons else ": it has none at all")
        )
    return taps, skipped


def prepare(model: Model, recipe: Recipe, taps: Sequence[Tap], embeddings: Sequence[Embedding]) -> None:
    """What `recipe` does to the float model before it is calibrated.

    Taps and embeddings are those found before, and stay those of the model.

    Raises:
        RotationError: it is to be rotated and cannot be.
    """
    if recipe.rotation:
        quantized = {site.node for tap in taps for site in tap.sites}
        quantized.update(node for table in own(embeddings) for node in table.nodes)
        rotate(model, quantized, sharing(embeddings))


def prepared(source: Model, recipe: Recipe) -> tuple[Model, list[Tap]]:
    """The float model as `recipe` calibrates it, a copy where that is another one, and its taps.

    Raises:
        RotationError: see `prepare`.
    """
    model = clone(source) if recipe.rotation else source
    taps = find_taps(model, recipe)[0]
    prepare(model, recipe, taps, find_embeddings(model, recipe, taps)[0])
    return model, taps


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
    from onnx_woq.runtime.data import feeds, model_inputs

    if data is None:
        needing = [recipe.method.upper() if METHODS[recipe.method].needs_data else ""]
        needing += ["bias_correction" if recipe.bias_correction else "", "lowrank" if recipe.lowrank else ""]
        needing += ["both_streams" if recipe.both_streams else ""]
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
    from onnx_woq.runtime.data import data_hash

    return data_hash(batches) if batches else ""


def collect(
    model: Model, recipe: Recipe, taps: list[Tap], batches: list[Feed], with_means: Means, states: Path | None = None
) -> Iterator[tuple[Tap, Stats | None]]:
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
        return ((tap, None) for tap in taps)
    from onnx_woq.runtime.calibrate import Sequential, walk

    progress = with_means.progress
    sequential: Sequential = "off"
    if recipe.true_sequential:
        sequential = "block" if recipe.sequential_unit == "block" else "tap"
    return walk(
        model,
        taps,
        batches,
        memory_budget=with_means.memory.window,
        sequential=sequential,
        progress=(lambda done, total: progress("calibrate", done, total)) if progress else None,
        checkpoint=states,
        both_streams=recipe.both_streams,
    )


def metadata(recipe: Recipe, source_hash: str, calibration: str) -> dict[str, str]:
    """What a written model says of where it comes from: recipe, version, hashes of calibration and source."""
    return {
        "onnx_woq.version": version(),
        "onnx_woq.recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "onnx_woq.calibration": calibration if needs_data(recipe) else "",
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
