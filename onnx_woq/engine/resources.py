"""Resources of a quantization run: the executor, the memory plan, and whoever wants to hear of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from onnx_woq.engine.executors import built_in, workers_of
from onnx_woq.engine.memory import MemoryPlan, give_back_at_once, plan_memory
from onnx_woq.engine.plan import Plan
from onnx_woq.progress import Progress
from onnx_woq.runtime.data.feeds import Feed


@dataclass(frozen=True)
class Resources:
    """Resources for one run.

    Attributes:
        executor: solves weights.
        memory: bounds what calibration and solving take.
        scarce: somebody has set a limit of memory.
        progress: called with (stage, done, total).
    """

    executor: Executor
    memory: MemoryPlan
    scarce: bool
    progress: Progress | None

    def say(self, stage: str, done: int, total: int) -> None:
        """Reports progress to whoever asked for it."""
        if self.progress:
            self.progress(stage, done, total)


@contextmanager
def open_resources(
    plan: Plan,
    batches: Sequence[Feed],
    *,
    max_memory: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Iterator[Resources]:
    """Opens the resources of a plan; the built-in executor lives as long as the `with` block.

    Args:
        plan: model and recipe.
        batches: calibration samples; none where the method needs no data.
        max_memory: bytes for the whole process; None takes what makes it fast.
        executor: solves weights; threads of this process by default.
        progress: called with (stage, done, total).
        announce: called with a line for people on what memory and disk the run will take.

    Raises:
        MemoryLimit: `max_memory` is too little for this model.
    """
    with built_in() if executor is None else nullcontext(executor) as chosen:
        if max_memory is not None:
            give_back_at_once()
        memory = plan_memory(plan, batches, max_memory, workers_of(chosen))
        if announce:
            for line in (memory.text, *plan.notes):
                announce(line)
        yield Resources(chosen, memory, max_memory is not None, progress)
