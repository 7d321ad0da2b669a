"""Resources of a quantization run: the executor, the memory plan and the progress callback."""

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
    """The resources for one quantization run.

    Attributes:
        executor: solves weights.
        memory: the memory plan, which bounds calibration and solving.
        scarce: True if the user has set a memory limit.
        progress: called with (stage, steps done, steps in all); None if nobody listens.
        verify: True if results are opened in ONNX Runtime before they take their place.
    """

    executor: Executor
    memory: MemoryPlan
    scarce: bool
    progress: Progress | None
    verify: bool = True

    def say(self, stage: str, done: int, total: int) -> None:
        """Calls the progress callback, if there is one."""
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
    verify: bool = True,
) -> Iterator[Resources]:
    """Opens the resources of a plan; without an executor given, threads are started and end with the `with` block.

    Args:
        plan: the plan.
        batches: calibration samples; none if the recipe needs no data.
        max_memory: the most bytes that the whole process may take; None for as many as make it fast.
        executor: solves weights; threads of this process by default.
        progress: called with (stage, steps done, steps in all).
        announce: called with lines for people on memory and speed, see `quantize`.
        verify: open results in ONNX Runtime before they take their place.

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
        yield Resources(chosen, memory, max_memory is not None, progress, verify)
