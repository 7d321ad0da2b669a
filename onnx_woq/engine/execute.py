"""Execution of a plan: every weight is solved on an executor, replaced in the model, and stored on the disk at once.

So memory holds the packed weights only where files cannot be mapped, and a killed run can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.engine.apply import apply_solution, final_metadata
from onnx_woq.engine.memory import task_bytes
from onnx_woq.engine.metadata import RUNTIME, run_key
from onnx_woq.engine.output import Destination, check_room, output_folder, write
from onnx_woq.engine.plan import Plan, PlannedWeight
from onnx_woq.engine.resources import Resources
from onnx_woq.engine.results import WeightReport
from onnx_woq.engine.resume.store import ResumeStore, open_store
from onnx_woq.engine.schedule import solve_all
from onnx_woq.engine.solve import Solved, Task, cache_key, folding, task_of
from onnx_woq.engine.verify import verify
from onnx_woq.errors import ModelError
from onnx_woq.graph.find.blocks import blocks_of
from onnx_woq.graph.find.linears import LinearGroup

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats

SolveCache = dict[tuple[object, ...], Solved]
"""Solutions by `cache_key`. Their arrays are memory-mapped from data files, which may have been removed since."""

StatisticsProvider = Callable[[Sequence[PlannedWeight], Path], "Iterable[tuple[LinearGroup, Stats | None]]"]
"""A function that yields each of some linear groups with its statistics, None if the method needs none.

It gets the groups that are left to solve, and a folder that it may keep hidden states in."""


@dataclass(frozen=True)
class ExecutionResult:
    """The result of executing a plan.

    Attributes:
        weights: the rows of a report, linear groups before tables.
        bytes: the size of the files that were written.
        runtime: the oldest onnxruntime that runs them, such as "1.22".
    """

    weights: tuple[WeightReport, ...]
    bytes: int
    runtime: str


def execute(
    plan: Plan,
    place: Destination,
    statistics: StatisticsProvider,
    resources: Resources,
    *,
    properties: Mapping[str, str],
    companions_from: Path,
    resume: str,
    cache: SolveCache | None = None,
) -> ExecutionResult:
    """Quantizes the model of a plan in place and writes it.

    Args:
        plan: the plan, prepared (see `Plan.prepare`).
        place: the files to write.
        statistics: yields the statistics of the linear groups that are left to solve.
        resources: the executor that solves them, the memory that this may take, and the progress callback.
        properties: the metadata of the result; an unfinished run is resumed only if its metadata was the same.
        companions_from: the .onnx file whose tokenizer and config files are copied if the output is a folder.
        resume: "" to begin anew, "same" or "any" to resume, see `open_store`.
        cache: solutions of the same model and data, which are not solved again; new ones are added.

    Raises:
        OnnxWoqError: the model cannot be quantized or written. Nothing is left on the disk, except by a DiskError whose
            message says so.
    """
    blocks = _blocks(plan)
    checkpoints = [*blocks, *([weight] for weight in plan.solved if weight.kind == "embedding")]
    check_room(plan, place)
    with (
        output_folder(place.onnx.parent),
        open_store(place.onnx, run_key(properties), plan.solved, checkpoints, resume=resume) as store,
    ):
        left = [weight for weight in plan.solved if weight.name not in store.finished]
        drawn = statistics([weight for weight in left if weight.kind == "linear"], store.states)
        rows = {
            weight.name: apply_solution(plan, weight, store.finished[weight.name])
            for weight in plan.solved
            if weight not in left
        }
        try:
            rows |= _solve(plan, left, drawn, store, resources, blocks, cache)
        except ModelError:
            plan.model.check_unchanged()  # a weight cannot be read because its file has gone meanwhile
            raise
        borrowed = {table.name: table.report() for table in plan.embeddings if table.lender}
        every = [(rows | borrowed)[weight.name] for weight in (*plan.groups, *plan.embeddings)]
        final = final_metadata(plan.model, every)
        files = write(
            plan.model,
            place,
            {**properties, **final},
            companions_from,
            store,
            partial(verify, out=place.onnx, source=plan.model, opens=resources.verify),
        )
    return ExecutionResult(tuple(every), sum(file.stat().st_size for file in files), final[RUNTIME])


def _blocks(plan: Plan) -> list[list[PlannedWeight]]:
    """Returns the linear groups by block of the graph; each is a block of its own if nothing is calibrated."""
    if not plan.recipe.needs_data:
        return [[group] for group in plan.groups]
    by_name = {group.name: group for group in plan.groups}
    return [[by_name[group.name] for group in block] for block in blocks_of(plan.model, plan.linear_groups)]


def _solve(
    plan: Plan,
    left: Sequence[PlannedWeight],
    statistics: Iterable[tuple[LinearGroup, Stats | None]],
    store: ResumeStore,
    resources: Resources,
    blocks: Sequence[Sequence[PlannedWeight]],
    cache: SolveCache | None,
) -> dict[str, WeightReport]:
    """Solves the weights that are left and replaces them in the model, in order; returns their rows by name.

    Weights are solved side by side, each with one BLAS thread: that scales, while threads inside one small product do
    not. Results are applied in the order of the plan all the same, so they do not depend on the executor.

    `statistics` may calibrate while weights are solved. It must wait wherever later groups depend on earlier ones in
    the model: under `true_sequential`, after each group or block; with `folding`, after each group, since what folds
    depends on the nodes in front of it. Tables come last, so that all groups are calibrated on the float table.
    """
    cache = {} if cache is None else cache
    recipe, memory = plan.recipe, resources.memory
    last = {block[-1].name for block in blocks}
    by_block = recipe.true_sequential and recipe.sequential_unit == "block" and not folding(recipe)

    def barrier_after(weight: PlannedWeight) -> bool:
        if weight.kind == "embedding":
            return False
        return weight.name in last if by_block else recipe.true_sequential or folding(recipe)

    def tasks() -> Iterable[tuple[PlannedWeight, int, Callable[[], Task | Solved]]]:
        by_name = {weight.name: weight for weight in left}
        for group, stats in statistics:
            weight = by_name[group.name]
            yield weight, task_bytes(weight, recipe), partial(_cached_or_task, cache, plan, weight, stats)
        for table in left:
            if table.kind == "embedding":
                yield table, task_bytes(table, recipe, memory.workers), partial(task_of, recipe, table, None)

    rows: dict[str, WeightReport] = {}
    with one_blas_thread():
        in_order = solve_all(
            tasks(),
            resources.executor,
            workers=memory.workers,
            most_bytes=memory.solving,
            barrier_after=barrier_after,
            helping=not resources.scarce,
        )
        done = len(plan.solved) - len(left)
        for weight, solved in in_order:
            plan.model.check_unchanged()  # what is kept may be resumed from
            kept = store.keep(weight, solved)
            if key := cache_key(plan, weight):
                cache[key] = kept
            rows[weight.name] = apply_solution(plan, weight, kept)
            resources.say("solve", done + len(rows), len(plan.solved))
    return rows


def _cached_or_task(cache: SolveCache, plan: Plan, weight: PlannedWeight, stats: Stats | None) -> Task | Solved:
    key = cache_key(plan, weight)
    found = cache.get(key) if key else None
    return found or task_of(plan.recipe, weight, stats)
