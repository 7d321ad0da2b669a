"""The memory plan of a quantization, said before it starts, and how to make do with less."""

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
"""Bytes for calibration at once where no limit is given; more makes it hardly faster."""

SLACK = 64 << 20
"""Bytes for what is not counted: the allocator's leftovers."""

USUAL = 256 << 20
"""Bytes that the process takes before it begins, where the system does not say."""

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)

SESSIONS = 112 << 20
"""Bytes that onnxruntime takes for itself."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run will take, in bytes.

    Attributes:
        window: for calibration at once: weights being multiplied, activations, Gram matrices, hidden states.
        solving: for all tasks in flight together; the largest task fits.
        workers: tasks in flight at most.
        peak: of the whole process, estimated.
        disk: for hidden states that do not fit; beside the result.
        text: one line for people.
    """

    window: int
    solving: int
    workers: int
    peak: int
    disk: int
    text: str


def plan_memory(plan: Plan, batches: Sequence[Feed], max_memory: int | None, workers: int) -> MemoryPlan:
    """Returns what carrying out a plan takes, within `max_memory` bytes for the whole process if that is given.

    Args:
        plan: model and recipe.
        batches: calibration samples; none where the method needs no data.
        max_memory: bytes; None takes what makes it fast.
        workers: of the executor.

    Raises:
        MemoryLimit: the largest weight does not fit; the message says how much is needed.
    """
    needs = _needs(plan, batches) if plan.recipe.needs_data and batches else None
    results = sum(weight.bytes for weight in plan.solved)
    base = resident() + SLACK + (SESSIONS if needs else 0) + (0 if MAPS else results)
    tasks = sorted((task_bytes(weight, plan.recipe, workers) for weight in plan.solved), reverse=True)
    largest, solving = tasks[0], sum(tasks[:workers])
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
        recipe: tells the method.
        workers: that solve pieces of a table side by side.
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
        stats *= 2  # with the cross products
    stats *= 2 if weight.corrected else 1  # those of the inputs less their mean as well
    # A rotated weight is not mapped from its file but computed, one at a time.
    computed = max(4 * linear.k * linear.n for linear in group.linears) if recipe.rotation else 0
    return stats + itemsize * group.k * group.n + max(solving, computed) + weight.bytes


def _table_bytes(table: PlannedWeight, workers: int) -> int:
    """Returns the bytes that solving a table takes: a piece of its rows for each worker, and its result."""
    k, rows = table.k, min(table.n, max(1, PIECE // table.k))
    stored = table.weight_bytes // max(1, table.k * table.n)
    piece = stored * k * rows + solve_bytes("rtn", k, rows, table.spec)
    result = stored_bytes(table.operator.shapes(table.k, table.n, table.spec, table.storage))
    return result + piece * min(workers, -(-table.n // rows))


def give_back_at_once() -> None:
    """Makes this process give freed memory back to the system rather than keep it for later.

    Each thread of glibc keeps what it has freed, up to 64 MB: under a limit of 3 GB a run took 3.2. Anything of 1 MB
    and more is now mapped by itself; that costs up to 8 % of time. Other systems are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)


def resident() -> int:
    """Bytes of memory that this process takes now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return USUAL


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _text(model: Model, window: int, solving: int, base: int, peak: int, limit: int | None) -> str:
    calibrating = f"calibrating {size(window)}, " if window else ""
    within = "" if limit is None else f" (limit {size(limit)})"
    blocks = f"; {cuts(model)[-1].reason}" if window else ""
    return f"about {size(peak)} of memory{within}: {calibrating}solving {size(solving)}, the rest {size(base)}{blocks}"
