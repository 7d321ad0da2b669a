"""The corridor `quantize()`: load, find, calibrate, solve, lower, save. One way, no going back."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_woq.core.cpu import cores, one_blas_thread
from onnx_woq.core.methods import METHODS
from onnx_woq.core.stats import output_error
from onnx_woq.errors import AlreadyQuantized, DataError, NothingToQuantize, OutputError
from onnx_woq.folder import Destination, companions_copied, destination, find_model, make_folder
from onnx_woq.graph.fold import can_fold, divide_input
from onnx_woq.graph.lower.matmulnbits import lower_tap, packed_bytes, required_runtime
from onnx_woq.graph.model import Model, file_bytes, load, low_bit_nodes, model_hash, save
from onnx_woq.graph.taps import Skipped, Tap, find_taps, shared_copy_bytes
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe
from onnx_woq.results import QuantizeReport, TapReport

if TYPE_CHECKING:
    from onnx_woq.core.grid import QuantizedTensor
    from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)

Feed = dict[str, np.ndarray]
"""Input name -> array: one sample."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

MEMORY_BUDGET = 2 << 30
"""Bytes that calibration may hold in activations and Gram matrices at once, unless the caller says otherwise."""


def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | str = "RTN_G32ASYM",
    data: Any = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    tokenizer: str | Path | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Replaces a model's heavy MatMul weights by low-bit ones that ONNX Runtime runs natively.

    Args:
        model: an .onnx file, or a folder that holds one. It is never modified.
        output: an .onnx file, or a folder (then tokenizer and config files are copied along).
        recipe: what to do, or the name of a preset.
        data: calibration data; needed by GPTQ and AWQ. An iterable of input dictionaries, of `(inputs, labels)`
            or of arrays; the path of a .npz, .npy, .txt or .jsonl file, or of a folder of arrays; or "random".
        samples: replaces the recipe's `nsamples`; an error then when there are fewer.
        seqlen: tokens per sample, replaces the recipe's `pad_max_length`.
        tokenizer: folder of the tokenizer for text data, when it is not beside the model.
        memory_budget: bytes that calibration may hold at once.
        progress: called with (stage, done, total).

    Raises:
        OnnxWoqError: the model, data, recipe or output cannot be used; nothing has been written then.
    """
    start = time.monotonic()
    recipe = calibrated_on(preset(recipe) if isinstance(recipe, str) else recipe, samples, seqlen)
    path = find_model(model)
    source = load(path)
    place = destination(output, path)
    taps, skipped = plan(source, recipe)
    before = file_bytes(source)
    batches: list[Feed] = []
    if METHODS[recipe.method].needs_data:
        batches = read_data(source, path, data, recipe, recipe.nsamples, tokenizer, at_most=samples is None)
    collected = collect(source, recipe, taps, batches, memory_budget, progress)
    reports = solve(source, recipe, collected, len(taps), progress)
    copies = shared_copy_bytes(source, taps)
    calibration = feeds_hash(batches)
    write(source, place, metadata(source, model_hash(path), recipe, calibration), path.parent)
    warn_of_old_runtime(source)
    return QuantizeReport(
        model=path,
        output=place.onnx,
        recipe=recipe,
        taps=tuple(reports),
        skipped=tuple(skipped),
        copies=copies,
        bytes_before=before,
        bytes_after=file_bytes(load(place.onnx)),
        calibration=calibration,
        seconds=time.monotonic() - start,
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
        raise DataError(
            f"{recipe.method.upper()} needs calibration data: give --calib FILE (text, JSONL, .npz, .npy or a folder "
            "of arrays), in Python the `data` argument; RTN works without"
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
    model: Model,
    recipe: Recipe,
    taps: list[Tap],
    batches: list[Feed],
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Iterator[tuple[Tap, Stats | None]]:
    """Every tap with its statistics, in graph order; without data the statistics are None."""
    if not batches:
        return ((tap, None) for tap in taps)
    from onnx_woq.runtime.calibrate import walk

    report = (lambda done, total: progress("calibrate", done, total)) if progress else None
    return walk(model, taps, batches, memory_budget=memory_budget, sequential=recipe.true_sequential, progress=report)


def solve(
    model: Model,
    recipe: Recipe,
    collected: Iterable[tuple[Tap, Stats | None]],
    total: int,
    progress: Progress | None = None,
) -> list[TapReport]:
    """Solves each tap and puts the result into `model`, in order; `collected` may still be running on it.

    Taps are solved side by side, each with one BLAS thread: that scales where threads inside one small product do
    not. What is put in when does not depend on it. One at a time where a tap must see the earlier ones put in: under
    `true_sequential`, and where folding decides by them.
    """
    one_by_one = recipe.true_sequential or _folding(recipe)
    workers = cores()
    reports: list[TapReport] = []
    pending: deque[tuple[Tap, Future[_Solution]]] = deque()

    def put_in() -> None:
        tap, future = pending.popleft()
        reports.append(_put_in(model, recipe, tap, future.result()))
        if progress:
            progress("solve", len(reports), total)

    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            for tap, stats in collected:
                pending.append((tap, pool.submit(_solve_tap, recipe, tap, stats)))
                while len(pending) > (0 if one_by_one else workers):
                    put_in()
            while pending:
                put_in()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return reports


@dataclass(frozen=True)
class _Solution:
    q: QuantizedTensor
    error: float | None


def _solve_tap(recipe: Recipe, tap: Tap, stats: Stats | None) -> _Solution:
    weight = tap.weight()
    options = dict(recipe.options)
    if _folding(recipe) and not can_fold(tap):
        options["enable_auto_scale"] = False
    q = METHODS[recipe.method].solve(weight, stats, tap.spec, scale_dtype=tap.scale_dtype, **options)
    if stats is None:
        return _Solution(q, None)
    energy = output_error(weight, stats.gram)
    return _Solution(q, output_error(q.effective() - weight, stats.gram) / energy if energy else 0.0)


def _put_in(model: Model, recipe: Recipe, tap: Tap, solution: _Solution) -> TapReport:
    q, before = solution.q, tap.weight_bytes
    scaling = "" if q.input_scale is None else divide_input(tap, q.input_scale, allow_mul=not _folding(recipe))
    lower_tap(model, tap, q, accuracy_level=recipe.accuracy_level)
    return report_of(tap, before, solution.error, scaling)


def report_of(tap: Tap, bytes_before: int, error: float | None = None, scaling: str = "") -> TapReport:
    """The report of a tap that was quantized, or is going to be."""
    return TapReport(
        name=tap.name,
        sites=tuple(site.name for site in tap.sites),
        spec=tap.spec,
        k=tap.k,
        n=tap.n,
        bytes_before=bytes_before,
        bytes_after=packed_bytes(tap.k, tap.n, tap.spec, tap.scale_dtype),
        error=error,
        scaling=scaling,
    )


def _folding(recipe: Recipe) -> bool:
    """Whether an input scale that cannot be folded exactly is left out, rather than multiplied by in a new node."""
    return bool(recipe.options.get("folding", False))


def metadata(quantized: Model, source_hash: str, recipe: Recipe, calibration: str) -> dict[str, str]:
    """What a written model says of itself: recipe, version, hashes of calibration and source, oldest runtime."""
    from onnx_woq.version import version

    return {
        "onnx_woq.version": version(),
        "onnx_woq.recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "onnx_woq.calibration": calibration if METHODS[recipe.method].needs_data else "",
        "onnx_woq.source": source_hash,
        "onnx_woq.minimum_onnxruntime": required_runtime(quantized),
    }


def write(model: Model, place: Destination, properties: Mapping[str, str], companions_from: Path) -> None:
    """Writes the result and, into a folder, its companions; on failure everything new is removed again."""
    with ExitStack() as undo:
        try:
            for folder in make_folder(place.onnx.parent):
                undo.callback(_remove_folder, folder)
            with companions_copied(companions_from, place.folder) if place.folder else nullcontext():
                save(model, place.onnx, metadata=properties)
        except OSError as error:
            raise OutputError(f"cannot write {place.onnx}: {error.strerror or error}") from error
        undo.pop_all()


def warn_of_old_runtime(quantized: Model) -> None:
    """Says so when the installed onnxruntime is older than the result needs: it may fail, or compute wrong numbers."""
    needed = required_runtime(quantized)
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


def _remove_folder(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        logger.warning("left %s behind: it is not empty", folder)
