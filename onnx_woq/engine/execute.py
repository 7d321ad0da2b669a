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

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.engine.embedding import put_in_table, solve_tables, standalone_tables, table_report
from onnx_woq.engine.executors import built_in, workers_of
from onnx_woq.engine.memory import MemoryPlan, give_back_at_once, plan_memory, task_bytes
from onnx_woq.engine.output import Destination, companions_copied, output_folder
from onnx_woq.engine.results import WeightReport
from onnx_woq.engine.resume.records import QuantizedWeight
from onnx_woq.engine.resume.store import ResumeStore, open_store, partial_folder
from onnx_woq.engine.solve import Solved, Task, cache_key, folding, solve_all, task_of
from onnx_woq.errors import OutputError
from onnx_woq.graph.find.blocks import blocks_of
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.float_copies import float_copy_bytes
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model, file_bytes
from onnx_woq.graph.io.save import data_path, failure, save
from onnx_woq.graph.rewrite.fold_scale import divide_input
from onnx_woq.progress import Progress
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.targets.gather_block_quantized import share_codes
from onnx_woq.targets.low_rank import group_bytes, lower_compensated
from onnx_woq.targets.matmulnbits import required_runtime

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats


@dataclass(frozen=True)
class Resources:
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
def open_resources(
    model: Model,
    groups: list[LinearGroup],
    recipe: Recipe,
    batches: list[Feed],
    max_memory: int | None,
    executor: Executor | None,
    progress: Progress | None,
    announce: Callable[[str], None] | None,
    embeddings: Sequence[Embedding] = (),
) -> Iterator[Resources]:
    """What `recipe` is carried out with; the built-in executor lives as long as the `with` block.

    Raises:
        MemoryLimit: `max_memory` is too little for this model.
    """
    with built_in() if executor is None else nullcontext(executor) as chosen:
        if max_memory is not None:
            give_back_at_once()
        memory = plan_memory(
            model, groups, batches, recipe, max_memory, workers_of(chosen), standalone_tables(embeddings)
        )
        if announce:
            announce(memory.text)
        yield Resources(chosen, memory, max_memory is not None, progress)


SolveCache = dict[tuple[object, ...], Solved]
"""What has been solved, by `known_as`; its arrays lie in data files, even when these have no name any more."""


@dataclass(frozen=True)
class ExecutionResult:
    """What became of each tap and embedding, the bytes written, and the oldest onnxruntime that runs it."""

    weights: list[WeightReport]
    bytes: int
    runtime: str


StatisticsProvider = Callable[[list[LinearGroup], Path], Iterable[tuple[LinearGroup, "Stats | None"]]]
"""Gives each of some taps with its statistics; may keep hidden states in the folder."""


def execute(
    model: Model,
    place: Destination,
    recipe: Recipe,
    groups: list[LinearGroup],
    collected: StatisticsProvider,
    resources: Resources,
    *,
    properties: Mapping[str, str],
    companions_from: Path,
    resume: str,
    known: SolveCache | None = None,
    embeddings: Sequence[Embedding] = (),
) -> ExecutionResult:
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
    blocks = blocks_of(model, groups) if recipe.needs_data else [[group] for group in groups]
    units: list[QuantizedWeight] = [*groups, *standalone_tables(embeddings)]
    checkpoints: list[Sequence[QuantizedWeight]] = [*blocks, *([table] for table in standalone_tables(embeddings))]
    _check_room(model, groups, embeddings, place)
    with (
        output_folder(place.onnx.parent),
        open_store(place.onnx, _key(properties), units, checkpoints, resume=resume) as partial,
    ):
        left = [group for group in groups if group.name not in partial.finished]
        drawn = collected(left, partial.states)  # before anything is put in: most recipes calibrate the float model
        done = [group for group in groups if group not in left]
        reports = [apply_solution(model, recipe, group, partial.finished[group.name], embeddings) for group in done]
        steps = len(reports), len(units)
        reports += solve(model, recipe, drawn, partial, resources, blocks, known, steps, embeddings)
        tables = solve_embeddings(model, recipe, embeddings, partial, resources, len(groups))
        runtime = required_runtime(model)
        properties = {**properties, "onnx_woq.minimum_onnxruntime": runtime, "onnx_woq.layers": layers_json(reports)}
        files = write(model, place, properties, companions_from, partial)
    return ExecutionResult([*reports, *tables], sum(file.stat().st_size for file in files), runtime)


def solve(
    model: Model,
    recipe: Recipe,
    collected: Iterable[tuple[LinearGroup, Stats | None]],
    partial: ResumeStore,
    resources: Resources,
    blocks: Sequence[Sequence[LinearGroup]],
    known: SolveCache | None,
    steps: tuple[int, int],
    embeddings: Sequence[Embedding] = (),
) -> list[WeightReport]:
    """Solves each tap and puts the result into `model`, in order; `collected` may still be running on it.

    Taps are solved side by side, each with one BLAS thread: that scales where threads inside one small product do
    not. What is put in when does not depend on it. Where later taps must see the earlier ones put in, they wait:
    under `true_sequential`, for a tap or a block, and where folding decides by them. `steps` says how many taps are put
    in already, and how many there are.
    """
    known = {} if known is None else known
    last = {block[-1].name for block in blocks}
    by_block = recipe.true_sequential and recipe.sequential_unit == "block" and not folding(recipe)

    def barrier_after(group: LinearGroup) -> bool:
        return group.name in last if by_block else recipe.true_sequential or folding(recipe)

    reports: list[WeightReport] = []
    tasks = (
        (group, task_bytes(group, recipe), curry(_known_or_task, known, recipe, group, stats))
        for group, stats in collected
    )
    with one_blas_thread():
        memory = resources.memory
        done_in_order = solve_all(
            tasks,
            resources.executor,
            workers=memory.workers,
            most_bytes=memory.solving,
            barrier_after=barrier_after,
            helping=not resources.scarce,
        )
        for group, solved in done_in_order:
            kept = partial.keep(group, solved)
            if key := cache_key(recipe, group):
                known[key] = kept
            reports.append(apply_solution(model, recipe, group, kept, embeddings))
            if resources.progress:
                resources.progress("solve", steps[0] + len(reports), steps[1])
    return reports


def _known_or_task(known: SolveCache, recipe: Recipe, group: LinearGroup, stats: Stats | None) -> Task | Solved:
    key = cache_key(recipe, group)
    found = known.get(key) if key else None
    return found or task_of(recipe, group, stats)


def solve_embeddings(
    model: Model,
    recipe: Recipe,
    embeddings: Sequence[Embedding],
    partial: ResumeStore,
    resources: Resources,
    steps: int,
) -> list[WeightReport]:
    """Solves what has no head to share codes with, and puts it in; `steps` have been done before.

    Not before all taps: they are calibrated on the float table, whatever the recipe says of their order.
    """
    left = [table for table in standalone_tables(embeddings) if table.name not in partial.finished]
    for table in standalone_tables(embeddings):
        if table not in left:
            put_in_table(model, table, partial.finished[table.name])
    solved_tables = solve_tables(recipe, left, resources.executor, resources.memory, helping=not resources.scarce)
    for number, (table, solved) in enumerate(solved_tables, 1):
        put_in_table(model, table, partial.keep(table, solved))
        if resources.progress:
            resources.progress("solve", steps + number, steps + len(left))
    return [table_report(table) for table in embeddings]


def apply_solution(
    model: Model, recipe: Recipe, group: LinearGroup, solved: Solved, embeddings: Sequence[Embedding] = ()
) -> WeightReport:
    """Replaces the weights of `tap` in `model`, and the tables among `embeddings` that share their codes."""
    before = group.weight_bytes
    scaling = ""
    if solved.input_scale is not None:
        scaling = divide_input(group, solved.input_scale, allow_mul=not folding(recipe))
    level = recipe.accuracy_level
    lower_compensated(model, group, solved.packed, solved.factors, accuracy_level=level, bias=solved.bias)
    for table in embeddings:
        if table.shared and table.head in group.linears:
            share_codes(model, table, solved.input_scale)
    return report_of(group, before, solved.error, scaling)


def layers_json(reports: Sequence[WeightReport]) -> str:
    """What a written model says of each of its weights, in JSON."""
    rows = [
        {
            "name": report.name,
            "sites": report.nodes,
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


def _check_room(model: Model, groups: list[LinearGroup], embeddings: Sequence[Embedding], place: Destination) -> None:
    """Asks for the disk space of the result before the work begins."""
    saved = sum(group.weight_bytes - report_of(group, group.weight_bytes).bytes_after for group in groups)
    saved += sum(row.bytes_before - row.bytes_after for row in map(table_report, embeddings))
    needed = file_bytes(model) - saved + sum(float_copy_bytes(model, groups, embeddings).values())
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


def report_of(group: LinearGroup, bytes_before: int, error: float | None = None, scaling: str = "") -> WeightReport:
    """The report of a tap that was quantized, or is going to be."""
    return WeightReport(
        name=group.name,
        kind="linear",
        nodes=tuple(linear.name for linear in group.linears),
        spec=group.spec,
        k=group.k,
        n=group.n,
        bytes_before=bytes_before,
        bytes_after=group_bytes(group),
        error=error,
        scaling=scaling,
        rank=group.rank,
    )


def write(
    model: Model,
    place: Destination,
    properties: Mapping[str, str],
    companions_from: Path,
    partial: ResumeStore | None = None,
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
