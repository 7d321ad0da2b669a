"""Carry out a recipe: every tap solved where the executor says, put in, and written to the disk as it is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial as curry
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.methods import needs_data
from onnx_woq.embedding import own, put_in_table, solve_tables, table_report
from onnx_woq.errors import OutputError
from onnx_woq.executors import built_in, workers_of
from onnx_woq.folder import Destination, companions_copied, output_folder
from onnx_woq.graph.blocks import blocks_of
from onnx_woq.graph.embeddings import Embedding
from onnx_woq.graph.fold import divide_input
from onnx_woq.graph.lower.gather import share_codes
from onnx_woq.graph.lower.lowrank import lower_compensated, tap_bytes
from onnx_woq.graph.lower.matmulnbits import required_runtime
from onnx_woq.graph.model import Model, file_bytes, save
from onnx_woq.graph.save import data_path, failure
from onnx_woq.graph.taps import Tap, shared_copy_bytes
from onnx_woq.memory import MemoryPlan, give_back_at_once, plan_memory, task_bytes
from onnx_woq.partial import Partial, partial_folder, unfinished
from onnx_woq.partial_journal import Unit
from onnx_woq.recipe import Recipe
from onnx_woq.results import EmbeddingReport, TapReport
from onnx_woq.solving import Solved, Task, folding, known_as, solve_all, task_of

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats

Feed = dict[str, np.ndarray]
"""Input name -> array: one sample."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class Means:
    """What the work is done with.

    Attributes:
        executor: where taps are solved.
        memory: what may be taken by calibration, and by taps being solved.
        scarce: whether somebody has set a limit.
        progress: called with (stage, done, total).
    """

    executor: Executor
    memory: MemoryPlan
    scarce: bool
    progress: Progress | None


@contextmanager
def means(
    model: Model,
    taps: list[Tap],
    recipe: Recipe,
    batches: list[Feed],
    max_memory: int | None,
    executor: Executor | None,
    progress: Progress | None,
    announce: Callable[[str], None] | None,
    embeddings: Sequence[Embedding] = (),
) -> Iterator[Means]:
    """What `recipe` is carried out with; the built-in executor lives as long as the `with` block.

    Raises:
        MemoryLimit: `max_memory` is too little for this model.
    """
    with built_in() if executor is None else nullcontext(executor) as chosen:
        if max_memory is not None:
            give_back_at_once()
        memory = plan_memory(model, taps, batches, recipe, max_memory, workers_of(chosen), own(embeddings))
        if announce:
            announce(memory.text)
        yield Means(chosen, memory, max_memory is not None, progress)


Known = dict[tuple[object, ...], Solved]
"""What has been solved, by `known_as`; its arrays lie in data files, even when these have no name any more."""


@dataclass(frozen=True)
class Made:
    """What became of each tap and embedding, the bytes written, and the oldest onnxruntime that runs it."""

    taps: list[TapReport]
    embeddings: list[EmbeddingReport]
    bytes: int
    runtime: str


Collect = Callable[[list[Tap], Path], Iterable[tuple[Tap, "Stats | None"]]]
"""Gives each of some taps with its statistics; may keep hidden states in the folder."""


def make(
    model: Model,
    place: Destination,
    recipe: Recipe,
    taps: list[Tap],
    collected: Collect,
    with_means: Means,
    *,
    properties: Mapping[str, str],
    companions_from: Path,
    resume: str,
    known: Known | None = None,
    embeddings: Sequence[Embedding] = (),
) -> Made:
    """Quantizes `model` in place and writes it, weights as they are made.

    Args:
        model: the float model.
        place: where it goes.
        recipe: what to do.
        taps: of the model by the recipe.
        collected: gives the statistics of those that are left to do.
        with_means: where it is solved.
        properties: what the result says of itself; a run is continued only if they are the same.
        companions_from: folder of the files that go along into a folder.
        resume: see `unfinished`.
        known: what has been solved for the same model and data by now; grows.
        embeddings: of the model by the recipe.

    Raises:
        OnnxWoqError: it cannot be done; nothing is left behind, but by a DiskError that says so.
    """
    blocks = blocks_of(model, taps) if needs_data(recipe) else [[tap] for tap in taps]
    units: list[Unit] = [*taps, *own(embeddings)]
    groups: list[Sequence[Unit]] = [*blocks, *([table] for table in own(embeddings))]
    _check_room(model, taps, embeddings, place)
    with (
        output_folder(place.onnx.parent),
        unfinished(place.onnx, _key(properties), units, groups, resume=resume) as partial,
    ):
        left = [tap for tap in taps if tap.name not in partial.finished]
        drawn = collected(left, partial.states)  # before anything is put in: most recipes calibrate the float model
        done = [tap for tap in taps if tap not in left]
        reports = [put_in(model, recipe, tap, partial.finished[tap.name], embeddings) for tap in done]
        steps = len(reports), len(units)
        reports += solve(model, recipe, drawn, partial, with_means, blocks, known, steps, embeddings)
        tables = solve_embeddings(model, recipe, embeddings, partial, with_means, len(taps))
        runtime = required_runtime(model)
        properties = {**properties, "onnx_woq.minimum_onnxruntime": runtime, "onnx_woq.layers": layers_json(reports)}
        files = write(model, place, properties, companions_from, partial)
    return Made(reports, tables, sum(file.stat().st_size for file in files), runtime)


def solve(
    model: Model,
    recipe: Recipe,
    collected: Iterable[tuple[Tap, Stats | None]],
    partial: Partial,
    with_means: Means,
    blocks: Sequence[Sequence[Tap]],
    known: Known | None,
    steps: tuple[int, int],
    embeddings: Sequence[Embedding] = (),
) -> list[TapReport]:
    """Solves each tap and puts the result into `model`, in order; `collected` may still be running on it.

    Taps are solved side by side, each with one BLAS thread: that scales where threads inside one small product do
    not. What is put in when does not depend on it. Where later taps must see the earlier ones put in, they wait:
    under `true_sequential`, for a tap or a block, and where folding decides by them. `steps` says how many taps are put
    in already, and how many there are.
    """
    known = {} if known is None else known
    last = {block[-1].name for block in blocks}
    by_block = recipe.true_sequential and recipe.sequential_unit == "block" and not folding(recipe)

    def settled_after(tap: Tap) -> bool:
        return tap.name in last if by_block else recipe.true_sequential or folding(recipe)

    reports: list[TapReport] = []
    tasks = (
        (tap, task_bytes(tap, recipe), curry(_known_or_task, known, recipe, tap, stats)) for tap, stats in collected
    )
    with one_blas_thread():
        memory = with_means.memory
        done_in_order = solve_all(
            tasks,
            with_means.executor,
            workers=memory.workers,
            most_bytes=memory.solving,
            settled_after=settled_after,
            helping=not with_means.scarce,
        )
        for tap, solved in done_in_order:
            kept = partial.keep(tap, solved)
            if key := known_as(recipe, tap):
                known[key] = kept
            reports.append(put_in(model, recipe, tap, kept, embeddings))
            if with_means.progress:
                with_means.progress("solve", steps[0] + len(reports), steps[1])
    return reports


def _known_or_task(known: Known, recipe: Recipe, tap: Tap, stats: Stats | None) -> Task | Solved:
    key = known_as(recipe, tap)
    found = known.get(key) if key else None
    return found or task_of(recipe, tap, stats)


def solve_embeddings(
    model: Model,
    recipe: Recipe,
    embeddings: Sequence[Embedding],
    partial: Partial,
    with_means: Means,
    steps: int,
) -> list[EmbeddingReport]:
    """Solves what has no head to share codes with, and puts it in; `steps` have been done before.

    Not before all taps: they are calibrated on the float table, whatever the recipe says of their order.
    """
    left = [table for table in own(embeddings) if table.name not in partial.finished]
    for table in own(embeddings):
        if table not in left:
            put_in_table(model, table, partial.finished[table.name])
    solved_tables = solve_tables(recipe, left, with_means.executor, with_means.memory, helping=not with_means.scarce)
    for number, (table, solved) in enumerate(solved_tables, 1):
        put_in_table(model, table, partial.keep(table, solved))
        if with_means.progress:
            with_means.progress("solve", steps + number, steps + len(left))
    return [table_report(table) for table in embeddings]


def put_in(model: Model, recipe: Recipe, tap: Tap, solved: Solved, embeddings: Sequence[Embedding] = ()) -> TapReport:
    """Replaces the weights of `tap` in `model`, and the tables among `embeddings` that share their codes."""
    before = tap.weight_bytes
    scaling = ""
    if solved.input_scale is not None:
        scaling = divide_input(tap, solved.input_scale, allow_mul=not folding(recipe))
    level = recipe.accuracy_level
    lower_compensated(model, tap, solved.packed, solved.factors, accuracy_level=level, bias=solved.bias)
    for table in embeddings:
        if table.shared and table.head in tap.sites:
            share_codes(model, table, solved.input_scale)
    return report_of(tap, before, solved.error, scaling)


def layers_json(reports: Sequence[TapReport]) -> str:
    """What a written model says of each of its weights, in JSON."""
    rows = [
        {
            "name": report.name,
            "sites": report.sites,
            "bits": report.spec.bits,
            "group_size": report.spec.group_size,
            "symmetric": report.spec.symmetric,
            "k": report.k,
            "n": report.n,
            "bytes": report.bytes_after,
            "error": report.error,
            "scaling": report.scaling,
        }
        for report in reports
    ]
    return json.dumps(rows)


def _key(properties: Mapping[str, str]) -> dict[str, str]:
    """What a result follows from, as people call it."""
    names = {
        "model": "onnx_woq.source",
        "recipe": "onnx_woq.recipe",
        "calibration data": "onnx_woq.calibration",
        "package version": "onnx_woq.version",
    }
    return {name: properties[key] for name, key in names.items()}


def _check_room(model: Model, taps: list[Tap], embeddings: Sequence[Embedding], place: Destination) -> None:
    """Asks for the disk space of the result before the work begins."""
    saved = sum(tap.weight_bytes - report_of(tap, tap.weight_bytes).bytes_after for tap in taps)
    saved += sum(row.bytes_before - row.bytes_after for row in map(table_report, embeddings))
    needed = file_bytes(model) - saved + sum(shared_copy_bytes(model, taps, embeddings).values())
    above = place.onnx.absolute().parent
    while not above.exists():
        above = above.parent
    left = partial_folder(place.onnx) / data_path(place.onnx).name
    there = _on_disk(left) if left.is_file() else 0
    free = shutil.disk_usage(above).free
    if needed > free + there:
        raise OutputError(
            f"{place.onnx} needs about {needed:,} bytes, its disk has {free:,} free: make room or choose another disk"
        )


def _on_disk(file: Path) -> int:
    """Bytes that a file takes on its disk: holes take none."""
    status = file.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def report_of(tap: Tap, bytes_before: int, error: float | None = None, scaling: str = "") -> TapReport:
    """The report of a tap that was quantized, or is going to be."""
    return TapReport(
        name=tap.name,
        sites=tuple(site.name for site in tap.sites),
        spec=tap.spec,
        k=tap.k,
        n=tap.n,
        bytes_before=bytes_before,
        bytes_after=tap_bytes(tap),
        error=error,
        scaling=scaling,
        rank=tap.rank,
    )


def write(
    model: Model,
    place: Destination,
    properties: Mapping[str, str],
    companions_from: Path,
    partial: Partial | None = None,
) -> list[Path]:
    """Writes the result and, into a folder, its companions; on failure everything new is removed again.

    Returns:
        The files of the model.
    """
    stored = partial.complete() if partial else None
    try:
        with (
            output_folder(place.onnx.parent),
            companions_copied(companions_from, place.folder) if place.folder else nullcontext(),
        ):
            return save(model, place.onnx, metadata=properties, stored=stored)
    except OSError as error:
        raise failure(error, place.onnx) from error
