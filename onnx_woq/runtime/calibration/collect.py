"""Calibration runs: `collect_statistics` runs a model over the samples and sums up the inputs of its linear groups.

A *linear group* is the set of MatMul and Gemm nodes that read one activation, such as q/k/v. The model runs block by
block (`graph.find.blocks`). As many blocks as the memory budget allows run together: a *window*. The next window goes
on from the hidden states where the last one ended (`replay`). Activations are added to the statistics while the next
sample runs, and are never kept: memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx_woq.core.stats import Stats
from onnx_woq.errors import DataError
from onnx_woq.graph.find.blocks import cuts, groups_by_block
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches, untaken_values
from onnx_woq.runtime.calibration.accumulate import FloatReplay, collect_window
from onnx_woq.runtime.calibration.replay import Replay
from onnx_woq.runtime.calibration.structure import Structure, contents
from onnx_woq.runtime.calibration.windows import CalibrationMemory, prepacks
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.session import thread_count

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all); a step is one sample in one window."""

Sequential = Literal["off", "block", "tap"]
"""The parts of the model that are quantized already when statistics of a linear group are collected: none, all earlier
blocks, or all earlier linear groups ("tap", their name in recipes)."""


def collect_statistics(
    model: Model,
    groups: list[LinearGroup],
    batches: list[Feed],
    *,
    memory_budget: int = 2 << 30,
    sequential: Sequential = "off",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    asymmetric_calibration: bool = False,
) -> Iterator[tuple[LinearGroup, Stats]]:
    """Yields each linear group with the statistics of its inputs over all samples, in graph order.

    Args:
        model: the float model. The caller may edit it between two groups, as sequential quantization does.
        groups: linear groups of this model.
        batches: one feed per sample. Tokens where a fed attention mask is 0 are left out.
        memory_budget: bytes for activations, Gram matrices, the weights of a window and remembered hidden states. It is
            exceeded only if a single linear group needs more.
        sequential: the state of the model that statistics are taken of. "off": as at the time of this call; they are
            then the same bit for bit under any budget. "block": as edited by the time the group's block is reached.
            "tap": as edited by the time the group itself is reached.
        progress: called after each step.
        checkpoint: a private folder that keeps the hidden states at the last ends of windows. A later call, also in
            another process, for the groups that are left goes on from these as far as they are still valid.
        asymmetric_calibration: run the model as at the time of this call in step with the edited one, and collect the
            cross products of the inputs of both (`Stats.cross`).

    Raises:
        DataError: there are no samples, the model cannot be run on one of them, or it computes NaN or infinite numbers.
        ModelError: the model cannot be run at all.
    """
    if not batches:
        raise DataError("calibration needs at least one sample")
    if not groups:
        return iter(())
    order = {"off": _collect_unedited, "block": _collect_block_by_block, "tap": _collect_group_by_group}[sequential]
    model = clone(model) if sequential == "off" else model
    float_model = clone(model) if asymmetric_calibration else None
    return order(_CalibrationRun(model, list(groups), batches, memory_budget, progress, checkpoint, float_model))


@dataclass
class _CalibrationRun:
    """One calibration run: what its three orders of collecting have in common.

    Attributes:
        model: the model, which the caller may edit.
        groups: its linear groups.
        batches: samples.
        budget: memory budget in bytes.
        progress: called after each step.
        checkpoint: folder that keeps hidden states, None for none.
        float_model: the float model to run in step, None for none.
        float_replay: that model and its samples, once the run has begun.
    """

    model: Model
    groups: list[LinearGroup]
    batches: list[Feed]
    budget: int
    progress: Progress | None
    checkpoint: Path | None
    float_model: Model | None = None
    float_replay: FloatReplay | None = None

    def __post_init__(self) -> None:
        # Found before anything is edited: blocks and memory of the float model hold for the edited one too.
        self.memory = CalibrationMemory.of(self.model, self.groups, self.batches, models=2 if self.float_model else 1)
        self.cuts = cuts(self.model)
        self.groups_by_block = groups_by_block(self.model, self.groups)

    @contextmanager
    def replay(self) -> Iterator[tuple[Replay, Callable[[], Model]]]:
        """Opens a replay of the samples; gives it, and a function that returns the model as it is now.

        In that model, If nodes whose branch is the same for all samples are replaced by the branch.
        """
        workers = min(thread_count(), len(self.batches))
        side = {name for cut in self.cuts if cut.side for name in cut.side.outputs}
        prepack, hidden = prepacks(self.cuts[-1]), self.memory.remembered(self.budget) // self.memory.models
        with ThreadPoolExecutor(workers) as pool:
            try:
                replay = Replay(self.batches, hidden, pool, workers, side, self.checkpoint, prepack)
                taken = self._branches_taken(replay)
                replay.absent = untaken_values(self.model, taken)
                if self.float_model:
                    float_replay = Replay(self.batches, hidden, pool, workers, side, None, prepack)
                    self.float_replay = float_replay, inline_branches(self.float_model, taken)
                yield replay, lambda: inline_branches(self.model, taken)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def advance(
        self, replay: Replay, model: Model, window: Sequence[LinearGroup], later: set[str], *, frozen: bool
    ) -> None:
        """Runs the nodes before a window by themselves, if they are too much to run together with it."""
        self._advance(replay, model, window, later, frozen=frozen)
        if self.float_replay:
            self._advance(*self.float_replay, window, later, frozen=True)

    def _advance(
        self, replay: Replay, model: Model, window: Sequence[LinearGroup], later: set[str], *, frozen: bool
    ) -> None:
        """Advances one of the two models."""
        values = [value for value in _values(window) if value not in replay.absent]
        statistics = self.memory.collecting(window, window[-1])
        room = (self.budget - self.memory.remembered(self.budget) - statistics) // self.memory.models
        cost = lambda names: self.memory.copies * replay.weights(model, names, frozen=frozen)  # noqa: E731
        block_ends = [block.outputs for cut in self.cuts for block in cut.blocks]
        while (left := cost(values)) > room:
            ahead = [(price, i) for i, names in enumerate(block_ends) if 0 < (price := cost(names)) < left]
            if not ahead:
                return
            affordable = [end for end in ahead if end[0] <= room]
            _, index = max(affordable) if affordable else min(ahead)  # as far as one part may go, at least one block
            for _ in replay.run(model, block_ends[index], later | set(values), frozen=frozen):
                pass
            block_ends = block_ends[index + 1 :]

    def _branches_taken(self, replay: Replay) -> dict[str, bool]:
        """Returns the branches of If nodes that all samples take, see `graph.rewrite.inline_branch.inline_branches`."""
        asked = find_conditions(self.model)
        found: dict[str, set[bool]] = {name: set() for name in asked}
        if asked:
            for arrays in replay.run(self.model, list(asked.values()), peek=True):
                for name, condition in asked.items():
                    found[name].add(bool(arrays[condition].any()))
        return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _collect_unedited(run: _CalibrationRun) -> Iterator[tuple[LinearGroup, Stats]]:
    """Yields the statistics of a model that is not edited, window by window."""
    with run.replay() as (replay, current_model):
        model = current_model()
        windows = run.memory.windows(run.budget)
        steps = _Steps(run.progress, len(windows) * len(run.batches))
        for index, window in enumerate(windows):
            later = _values(group for rest in windows[index + 1 :] for group in rest)
            run.advance(replay, model, window, later, frozen=True)
            collected = collect_window(replay, model, window, later, steps.step, frozen=True)
            for group in window:
                yield group, collected.pop(group)


def _collect_block_by_block(run: _CalibrationRun) -> Iterator[tuple[LinearGroup, Stats]]:
    """Yields the statistics of a model that is edited on the way; within a block, nothing is quantized yet.

    The inputs of a block are remembered until the block is edited. It then runs once more, on the way to the next one.
    """
    with run.replay() as (replay, current_model):
        steps = _Steps(run.progress, len(run.groups) * len(run.batches))
        done = 0
        for block, members in run.groups_by_block:
            model, windows = current_model(), run.memory.windows(run.budget, [members])
            if len(windows) > 1 and model is run.model:
                model = clone(model)  # the caller begins to edit while the block is still being collected
            frozen = model is not run.model
            block_inputs = block.inputs if block else ()
            for window in windows:
                later = _values(run.groups[done + len(window) :])
                run.advance(replay, model, window, later, frozen=frozen)
                collected = collect_window(
                    replay,
                    model,
                    window,
                    later,
                    steps.step,
                    frozen=frozen,
                    block_inputs=block_inputs,
                    float_replay=run.float_replay,
                )
                for group in window:
                    done += 1
                    steps.reach(done * len(run.batches))
                    yield group, collected.pop(group)


def _collect_group_by_group(run: _CalibrationRun) -> Iterator[tuple[LinearGroup, Stats]]:
    """Yields the statistics of a model that is edited on the way; a window holds independent linear groups only."""
    groups = run.groups
    with run.replay() as (replay, current_model):
        steps = _Steps(run.progress, len(groups) * len(run.batches))
        done = 0
        while done < len(groups):
            model = current_model()
            window = _independent(model, run.memory.windows(run.budget, [[group] for group in groups[done:]])[0])
            later = _values(groups[done + len(window) :])
            run.advance(replay, model, window, later, frozen=False)
            collected = collect_window(
                replay, model, window, later, steps.step, keep_used=True, float_replay=run.float_replay
            )
            digests = _input_digests(model, window[1:])
            for group in window:
                if group is not window[0] and _input_digests(current_model(), [group])[group] != digests[group]:
                    break  # an edit for an earlier group has changed the input of this one after all
                done += 1
                steps.reach(done * len(run.batches))
                yield group, collected.pop(group)


def _values(groups: Iterable[LinearGroup]) -> set[str]:
    """Returns the names of all values that the statistics of some linear groups are made of."""
    return {value for group in groups for value in group.reads}


def _independent(model: Model, groups: list[LinearGroup]) -> list[LinearGroup]:
    """Returns the leading linear groups whose inputs do not depend on each other's outputs."""
    members = groups[:1]
    structure = Structure(model)
    for group in groups[1:]:
        if structure.depends(group.reads, [linear.name for earlier in members for linear in earlier.linears]):
            break
        members.append(group)
    return members


def _input_digests(model: Model, groups: list[LinearGroup]) -> dict[LinearGroup, tuple[str, ...]]:
    """Returns digests of the inputs of each linear group, see `structure.contents`."""
    digests = contents(model) if groups else {}
    return {group: tuple(digests.get(value, "") for value in sorted(group.reads)) for group in groups}


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        """Counts one step."""
        self.reach(self.done + 1)

    def reach(self, done: int) -> None:
        """Counts up to `done` steps at least, and never more than there are."""
        self.done = min(max(done, self.done), self.total)
        if self.progress:
            self.progress(self.done, self.total)
