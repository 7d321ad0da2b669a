"""The memory plan: how many bytes a quantization takes, known before it starts, and how it stays within a limit.

The largest weight must fit. Within what is left, the plan divides memory between **calibration** (parts of the model
are run, see `onnx_woq.runtime.calibration.windows`) and **solving** (weights become codes, several at a time).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_woq.core.methods.registry import result_bytes, solve_bytes
from onnx_woq.core.methods.rtn import PIECE
from onnx_woq.core.refine import asymmetric, low_rank
from onnx_woq.engine.plan import Plan, PlannedWeight
from onnx_woq.engine.resume.store import MAPS
from onnx_woq.errors import MemoryLimit
from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.io.model import Model
from onnx_woq.recipe import Recipe
from onnx_woq.targets.base import stored_bytes

if TYPE_CHECKING:
    from onnx_woq.runtime.calibration.windows import CalibrationMemory
    from onnx_woq.runtime.data.feeds import Feed

WINDOW = 2 << 30
"""Bytes that calibration takes at once if no limit is given; with more it is hardly faster."""

SLACK = 64 << 20
"""Bytes added for memory that nobody counts: what the allocator has not given back."""

USUAL = 256 << 20
"""Bytes that the process is assumed to take at the start, on systems that do not tell."""

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)

SESSIONS = 112 << 20
"""Bytes that onnxruntime takes for itself once a model has been run."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run will take, in bytes.

    Attributes:
        window: for calibration: weights being multiplied, activations, Gram matrices and hidden states at one time.
        solving: for all weights that are being solved at one time; at least what the largest takes.
        workers: the most weights that are solved at one time (a number, not bytes).
        peak: the estimate for the whole process.
        disk: for hidden states that do not fit in memory, beside those of the result.
        text: one line for people.
    """

    window: int
    solving: int
    workers: int
    peak: int
    disk: int
    text: str


def plan_memory(plan: Plan, batches: Sequence[Feed], max_memory: int | None, workers: int) -> MemoryPlan:
    """Returns the memory plan of a quantization, within a limit if one is given.

    Args:
        plan: the model and what is done to it.
        batches: calibration samples; none if the recipe needs no data.
        max_memory: the most bytes that the whole process may take; None for as much as makes it fast.
        workers: the number of tasks that the executor runs at a time.

    Raises:
        MemoryLimit: the largest weight does not fit; the message says how much memory it needs.
    """
    needs = _needs(plan, batches) if plan.recipe.needs_data and batches else None
    results = sum(weight.bytes for weight in plan.solved)
    base = resident() + SLACK + (SESSIONS if needs else 0) + (0 if MAPS else results)
    tasks = sorted((task_bytes(weight, plan.recipe, workers) for weight in plan.solved), reverse=True)
    largest, solving = max(tasks, default=0), sum(tasks[:workers])
    least, between = (needs.least(), needs.between) if needs else (0, 0)
    window = WINDOW
    if max_memory is not None:
        free = max_memory - base - between
        if free < largest + least:
            needed = base + between + largest + least
            raise MemoryLimit(
                f"{size(max_memory)} of memory is too little for {plan.model.path.name}: the largest of its weights "
                f"needs {size(needed)}; give at least --max-memory {-(-needed >> 20)}MiB"
                + (", or shorter samples" if needs else "")
            )
        solving = max(largest, min(solving, (free - least) // 2 if needs else free))
        window = min(window, free - solving)
    used = needs.used(window) if needs else 0
    peak = base + used + solving
    disk = needs.spilled(window) if needs else 0
    return MemoryPlan(window, solving, workers, peak, disk, _text(plan.model, used, solving, base, peak, max_memory))


def _needs(plan: Plan, batches: Sequence[Feed]) -> CalibrationMemory:
    from onnx_woq.runtime.calibration.windows import CalibrationMemory  # brings onnxruntime

    models = 2 if plan.recipe.asymmetric_calibration else 1
    return CalibrationMemory.of(plan.model, plan.linear_groups, batches, models=models)


def task_bytes(weight: PlannedWeight, recipe: Recipe, workers: int = 1) -> int:
    """Returns the bytes that solving a weight takes, its statistics and its result included.

    Args:
        weight: the weight.
        recipe: tells the method and its options.
        workers: the number of workers that solve pieces of a table side by side.
    """
    group = weight.source
    if isinstance(group, Embedding):
        return _table_bytes(weight, workers)
    with_data = recipe.needs_data
    stats = 4 * group.k * group.k if with_data else 0
    itemsize = 4 if with_data else group.weight_bytes // max(1, group.k * group.n)
    solving = solve_bytes(recipe.method, group.k, group.n, group.spec, tuple(recipe.options.items()))
    if weight.rank:
        held = result_bytes(group.k, group.n, group.spec) + 4 * group.k * group.n
        solving = max(solving, held + low_rank.working_bytes(group.k, group.n, weight.rank))
    if recipe.asymmetric_calibration:
        solving = 4 * group.k * group.n + max(solving, asymmetric.working_bytes(group.k, group.n))
        stats *= 2  # the cross products of asymmetric calibration are as large
    stats *= 2 if weight.corrected else 1  # bias correction makes a second Gram matrix, of the inputs less their mean
    # A rotated weight is not memory-mapped from its file but computed, one at a time.
    computed = max(4 * linear.k * linear.n for linear in group.linears) if recipe.rotation else 0
    return stats + itemsize * group.k * group.n + max(solving, computed) + weight.bytes


def _table_bytes(table: PlannedWeight, workers: int) -> int:
    """Returns the bytes that solving a table takes: a piece of its rows for each worker, and the whole result."""
    k, rows = table.k, min(table.n, max(1, PIECE // table.k))
    stored = table.weight_bytes // max(1, table.k * table.n)
    piece = stored * k * rows + solve_bytes("rtn", k, rows, table.spec)
    result = stored_bytes(table.operator.shapes(table.k, table.n, table.spec, table.storage))
    return result + piece * min(workers, -(-table.n // rows))


def give_back_at_once() -> None:
    """Makes this process give freed memory back to the system at once rather than keep it for later.

    Each thread of glibc keeps up to 64 MB that it has freed: under a limit of 3 GB a run took 3.2. From now on, glibc
    maps each array of 1 MB and more by itself, which costs up to 8 % of the time. Other C libraries stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)


def resident() -> int:
    """Returns the bytes of memory that this process takes now, `USUAL` where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return USUAL


def size(count: int) -> str:
    """Returns a number of bytes as people read it, such as "1.25 GB" or "640 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _text(model: Model, window: int, solving: int, base: int, peak: int, limit: int | None) -> str:
    calibrating = f"calibrating {size(window)}, " if window else ""
    within = "" if limit is None else f" (limit {size(limit)})"
    blocks = f"; {cuts(model)[-1].reason}" if window else ""
    return f"about {size(peak)} of memory{within}: {calibrating}solving {size(solving)}, the rest {size(base)}{blocks}"
