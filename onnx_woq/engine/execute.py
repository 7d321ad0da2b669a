"""Executing a plan: every weight solved where the executor says, put in, and written to the disk as it is made."""

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
from onnx_woq.graph.find.blocks import blocks_of
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.recipe import Recipe

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats

SolveCache = dict[tuple[object, ...], Solved]
"""Solutions by `cache_key`; their arrays lie in data files, even when these have no name any more."""

StatisticsProvider = Callable[[Sequence[PlannedWeight], Path], "Iterable[tuple[LinearGroup, Stats | None]]"]
"""Gives each of some linear groups with its statistics; may keep hidden states in the folder."""


@dataclass(frozen=True)
class ExecutionResult:
    """The result of executing a plan.

    Attributes:
        weights: a row for each weight, linear groups before tables.
        bytes: of the files that were written.
        runtime: the oldest onnxruntime that runs them.
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
    """Quantizes the model of a plan in place and writes it, weights as they are made.

    Args:
        plan: model and recipe, prepared.
        place: where the result goes.
        statistics: gives the statistics of the groups that are left to do.
        resources: solve it.
        properties: what the result says of itself; a run is continued only if they are the same.
        companions_from: folder of the files that go along into a folder.
        resume: see `open_store`.
        cache: solutions for the same model and data; grows.

    Raises:
        OnnxWoqError: it cannot be done; nothing is left behind, but by a DiskError that says so.
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
        rows |= _solve(plan, left, drawn, store, resources, blocks, cache)
        borrowed = {table.name: table.report() for table in plan.embeddings if table.lender}
        every = [(rows | borrowed)[weight.name] for weight in (*plan.groups, *plan.embeddings)]
        final = final_metadata(plan.model, every)
        files = write(plan.model, place, {**properties, **final}, companions_from, store)
    return ExecutionResult(tuple(every), sum(file.stat().st_size for file in files), final[RUNTIME])


def _blocks(plan: Plan) -> list[list[PlannedWeight]]:
    """Returns the linear groups by block of the graph, one by one where nothing is calibrated."""
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
    """Solves each weight that is left and puts the result into the model, in order; `statistics` may still be running.

    Weights are solved side by side, each with one BLAS thread: that scales where threads inside one small product do
    not. What is put in when does not depend on it. Where later groups must see the earlier ones put in, they wait:
    under `true_sequential`, for a group or a block, and where folding decides by them. Tables come last: all groups are
    calibrated on the float table, whatever the recipe says of their order.
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
            yield weight, task_bytes(weight, recipe), partial(_cached_or_task, cache, recipe, weight, stats)
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
            kept = store.keep(weight, solved)
            if key := cache_key(recipe, weight):
                cache[key] = kept
            rows[weight.name] = apply_solution(plan, weight, kept)
            resources.say("solve", done + len(rows), len(plan.solved))
    return rows


def _cached_or_task(cache: SolveCache, recipe: Recipe, weight: PlannedWeight, stats: Stats | None) -> Task | Solved:
    key = cache_key(recipe, weight)
    found = cache.get(key) if key else None
    return found or task_of(recipe, weight, stats)
