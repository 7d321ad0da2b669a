"""Collect the statistics of every tap: `walk` runs the model over the samples and sums up what flows into its weights.

The model runs block by block (`onnx_woq.graph.find.blocks`): as many blocks at once as the memory budget allows, a *window*;
the next window goes on from where the last one ended (`onnx_woq.runtime.calibration.replay`). Activations are summed up while the
next sample is being run and are never kept: memory does not grow with tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.stats import Stats
from onnx_woq.errors import DataError
from onnx_woq.graph.find.attention import FIRST_TOKEN
from onnx_woq.graph.find.blocks import cuts, groups_by_block
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches, untaken_values
from onnx_woq.runtime.calibration.replay import Replay
from onnx_woq.runtime.calibration.structure import Structure, contents
from onnx_woq.runtime.calibration.token_weights import token_weights
from onnx_woq.runtime.calibration.windows import CalibrationMemory, prepacks
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.data.inputs import MASKS
from onnx_woq.runtime.session import thread_count

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all); a step is one sample in one window."""

Sources = tuple[tuple[str, str], ...]
"""Of a tap: activations, each with what weights its tokens."""

Sequential = Literal["off", "block", "tap"]
"""What is quantized already when a tap's statistics are collected: nothing, earlier blocks, all earlier taps."""


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
    """Every tap with the statistics of its inputs over all samples, in graph order.

    Args:
        model: the float model; the consumer may edit it between two taps.
        taps: of this model.
        batches: one feed per sample. Tokens where a fed attention mask is 0 are left out.
        memory_budget: bytes for activations, Gram matrices, a window's weights and remembered hidden states; exceeded
            only where a single tap needs more.
        sequential: "off": the statistics are those of the model at the time of this call and, bit for bit, the same
            whatever the budget. "block": those of the model as the consumer has edited it by the time the tap's block
            is reached; "tap": by the time the tap itself is reached.
        progress: called after each step.
        checkpoint: a private folder where the hidden states at the last window ends are kept. A walk over the taps that
            are left, in another process, goes on from there as far as they are still what the model computes.
        both_streams: run the model as it is at the time of this call in step with the edited one, and collect the
            products of the inputs of both (`Stats.cross`).

    Raises:
        DataError: there are no samples, the model cannot be run on one of them, or computes NaN or infinite numbers.
        ModelError: the model cannot be run.
    """
    if not batches:
        raise DataError("calibration needs at least one sample")
    if not groups:
        return iter(())
    form = {"off": _float, "block": _block_by_block, "tap": _group_by_group}[sequential]
    model = clone(model) if sequential == "off" else model
    original = clone(model) if asymmetric_calibration else None
    return form(_Collection(model, list(groups), batches, memory_budget, progress, checkpoint, original))


@dataclass
class _Collection:
    """What the forms of a walk have in common."""

    model: Model
    groups: list[LinearGroup]
    batches: list[Feed]
    budget: int
    progress: Progress | None
    checkpoint: Path | None
    original: Model | None = None
    beside: tuple[Replay, Model] | None = None  # the float model, run in step

    def __post_init__(self) -> None:
        # Before anything is edited: what is found out of the float model holds for what becomes of it.
        self.needs = CalibrationMemory.of(self.model, self.groups, self.batches, streams=2 if self.original else 1)
        self.cuts = cuts(self.model)
        self.by_block = groups_by_block(self.model, self.groups)

    @contextmanager
    def replay(self) -> Iterator[tuple[Replay, Callable[[], Model]]]:
        """The samples, to be run part by part; and the model as it is now, with the branches that they take."""
        lanes = min(thread_count(), len(self.batches))
        side = {name for cut in self.cuts if cut.side for name in cut.side.outputs}
        prepack, hidden = prepacks(self.cuts[-1]), self.needs.remembered(self.budget) // self.needs.streams
        with ThreadPoolExecutor(lanes) as pool:
            try:
                replay = Replay(self.batches, hidden, pool, lanes, side, self.checkpoint, prepack)
                taken = self._branches(replay)
                replay.absent = untaken_values(self.model, taken)
                if self.original:
                    beside = Replay(self.batches, hidden, pool, lanes, side, None, prepack)
                    self.beside = beside, inline_branches(self.original, taken)
                yield replay, lambda: inline_branches(self.model, taken)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def advance(
        self, replay: Replay, model: Model, window: Sequence[LinearGroup], later: set[str], *, frozen: bool
    ) -> None:
        """Runs what lies before a window with nothing to collect, where it is too much to be run together with it."""
        self._advance(replay, model, window, later, frozen=frozen)
        if self.beside:
            self._advance(*self.beside, window, later, frozen=True)

    def _advance(
        self, replay: Replay, model: Model, window: Sequence[LinearGroup], later: set[str], *, frozen: bool
    ) -> None:
        values = [value for value in _values(window) if value not in replay.absent]
        statistics = self.needs.collecting(window, window[-1])
        room = (self.budget - self.needs.remembered(self.budget) - statistics) // self.needs.streams
        cost = lambda names: self.needs.copies * replay.weights(model, names, frozen=frozen)  # noqa: E731
        places = [block.outputs for cut in self.cuts for block in cut.blocks]
        while (left := cost(values)) > room:
            ahead = [(price, i) for i, names in enumerate(places) if 0 < (price := cost(names)) < left]
            if not ahead:
                return
            reached = [place for place in ahead if place[0] <= room]
            _, there = max(reached) if reached else min(ahead)  # as far as one part goes, or else a block
            for _ in replay.run(model, places[there], later | set(values), frozen=frozen):
                pass
            places = places[there + 1 :]

    def _branches(self, replay: Replay) -> dict[str, bool]:
        """The branches that all samples take, see `inline_branches`."""
        asked = find_conditions(self.model)
        found: dict[str, set[bool]] = {name: set() for name in asked}
        if asked:
            for arrays in replay.run(self.model, list(asked.values()), keep_saved=True):
                for name, condition in asked.items():
                    found[name].add(bool(arrays[condition].any()))
        return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _float(run: _Collection) -> Iterator[tuple[LinearGroup, Stats]]:
    """The taps of a model that nobody edits."""
    with run.replay() as (replay, now):
        model = now()
        split = run.needs.windows(run.budget)
        report = _Steps(run.progress, len(split) * len(run.batches))
        for index, window in enumerate(split):
            later = _values(group for rest in split[index + 1 :] for group in rest)
            run.advance(replay, model, window, later, frozen=True)
            collected = _collect(replay, model, window, later, report, frozen=True)
            for group in window:
                yield group, collected.pop(group.name)


def _block_by_block(run: _Collection) -> Iterator[tuple[LinearGroup, Stats]]:
    """The taps of a model that is edited on the way; those of a block see each other float.

    What enters a block is remembered until the block has been edited and run once more, on the way to the next one.
    """
    with run.replay() as (replay, now):
        report = _Steps(run.progress, len(run.groups) * len(run.batches))
        done = 0
        for block, members in run.by_block:
            model, split = now(), run.needs.windows(run.budget, [members])
            if len(split) > 1 and model is run.model:
                model = clone(model)  # edits begin while the block is still being collected
            frozen = model is not run.model
            entrance = block.inputs if block else ()
            for window in split:
                later = _values(run.groups[done + len(window) :])
                run.advance(replay, model, window, later, frozen=frozen)
                collected = _collect(
                    replay, model, window, later, report, frozen=frozen, entrance=entrance, beside=run.beside
                )
                for group in window:
                    done += 1
                    report.reach(done * len(run.batches))
                    yield group, collected.pop(group.name)


def _group_by_group(run: _Collection) -> Iterator[tuple[LinearGroup, Stats]]:
    """The taps of a model that is edited on the way: together only those whose inputs do not depend on each other."""
    groups = run.groups
    with run.replay() as (replay, now):
        report = _Steps(run.progress, len(groups) * len(run.batches))
        done = 0
        while done < len(groups):
            model = now()
            window = _independent(model, run.needs.windows(run.budget, [[group] for group in groups[done:]])[0])
            later = _values(groups[done + len(window) :])
            run.advance(replay, model, window, later, frozen=False)
            collected = _collect(replay, model, window, later, report, keep_used=True, beside=run.beside)
            before = _inputs(model, window[1:])
            for group in window:
                if group is not window[0] and _inputs(now(), [group]) != {group.name: before[group.name]}:
                    break  # an edit for an earlier tap has reached this one's input after all
                done += 1
                report.reach(done * len(run.batches))
                yield group, collected.pop(group.name)


def _values(groups: Iterable[LinearGroup]) -> set[str]:
    return {value for group in groups for value in group.reads}


def _independent(model: Model, groups: list[LinearGroup]) -> list[LinearGroup]:
    """The leading taps whose inputs do not depend on the outputs of one another."""
    members = groups[:1]
    structure = Structure(model)
    for group in groups[1:]:
        if structure.depends(group.reads, [linear.name for earlier in members for linear in earlier.linears]):
            break
        members.append(group)
    return members


def _inputs(model: Model, groups: list[LinearGroup]) -> dict[str, tuple[str, ...]]:
    """What the inputs of each tap are computed from."""
    digests = contents(model) if groups else {}
    return {group.name: tuple(digests.get(value, "") for value in sorted(group.reads)) for group in groups}


def _collect(
    replay: Replay,
    model: Model,
    groups: list[LinearGroup],
    later: set[str],
    report: _Steps,
    *,
    keep_used: bool = False,
    frozen: bool = False,
    entrance: Collection[str] = (),
    beside: tuple[Replay, Model] | None = None,
) -> dict[str, Stats]:
    """The statistics of `taps` over all samples by tap name; taps with the same inputs get the same object.

    With the float model `beside`, those of its inputs together with `model`'s.
    """
    stats = {group.sources: Stats.empty(group.k) for group in groups}
    values = [
        value
        for value in dict.fromkeys(v for group in groups for v in sorted(group.reads))
        if value not in replay.absent
    ]
    attention = _shown(model, stats)
    values = [value for value in values if value in attention or not _only_weighs(value, stats)]
    running: list[Future[None]] = []
    with one_blas_thread():
        parts = replay.run(
            model, values, later, keep_used=keep_used, frozen=frozen, entrance=entrance, attention=attention
        )
        exact = _exact(beside, [v for v in values if v not in attention], later, replay.batches, keep_used)
        for number, (arrays, floats) in enumerate(zip(parts, exact, strict=True)):
            _finish(running, groups)
            mask = _padding(replay.batches[number])
            running = [
                replay.pool.submit(
                    partial(_add, one, _needed(arrays, sources), sources, mask, number, _needed(floats, sources))
                )
                for sources, one in stats.items()
            ]
            del arrays, floats
            report.step()
        _finish(running, groups)
    for sources, one in stats.items():
        if not one.tokens:
            names = ", ".join(name for name, _ in sources)
            logger.warning("no sample reaches %s: there is nothing to calibrate it on", names)
    return {group.name: stats[group.sources] for group in groups}


def _exact(
    beside: tuple[Replay, Model] | None, values: list[str], later: set[str], batches: Sequence[Feed], keep_used: bool
) -> Iterator[dict[str, np.ndarray]]:
    """What the float model has for each sample, by name; nothing where it is not run."""
    if beside is None:
        return iter([{} for _ in batches])
    replay, model = beside
    return replay.run(model, values, later, keep_used=keep_used, frozen=True)


def _shown(model: Model, sources: Iterable[Sources]) -> set[str]:
    """Names of the attention probabilities that can be looked at: those that are not inside a body."""
    wanted = {name for source in sources for _, name in source if name not in ("", FIRST_TOKEN)}
    if not wanted:
        return wanted
    shown = wanted.intersection(value.name or "" for node in model.ir.graph for value in node.outputs)
    if hidden := sorted(wanted - shown):
        logger.warning("attention %s is inside a body and cannot be looked at: its tokens count alike", hidden[0])
    return shown


def _only_weighs(value: str, sources: Iterable[Sources]) -> bool:
    return not any(value == name for source in sources for name, _ in source)


def _needed(arrays: dict[str, np.ndarray], sources: Sources) -> dict[str, np.ndarray]:
    return {name: arrays[name] for source in sources for name in source if name in arrays}


def _add(
    stats: Stats,
    arrays: dict[str, np.ndarray],
    sources: Sources,
    mask: np.ndarray | None,
    number: int,
    floats: dict[str, np.ndarray],
) -> None:
    """Adds a sample's activations `[..., K]` to the statistics of one tap, beside those of the float model if given."""
    for name, attention in sources:
        array, exact = arrays.get(name), floats.get(name)
        if array is None:
            continue
        if exact is not None and exact.shape != array.shape:
            raise DataError(
                f"{name!r} has another shape in the float model, {exact.shape}, than in the quantized one, "
                f"{array.shape} (sample {number + 1}): leave out both_streams"
            )
        exact = None if exact is None else _unpadded(exact, mask)
        try:
            weights = None
            if attention == FIRST_TOKEN or attention in arrays:
                weights = _unpadded(token_weights(array, arrays.get(attention), mask), mask)
            stats.update(_unpadded(array, mask), weights, exact)
        except FloatingPointError as error:
            raise _NotFiniteError(f"{error} (value {name!r}, sample {number + 1})") from error


def _finish(running: list[Future[None]], groups: list[LinearGroup]) -> None:
    """Waits for all; raises the error of the first that failed, or one that names the weight which is to blame."""
    for future in running:
        future.exception()
    for future in running:
        try:
            future.result()
        except _NotFiniteError as error:
            for group in groups:
                group.weight()
            raise DataError(f"{error}: leave out that sample, or find out what the float model gives for it") from error


class _NotFiniteError(Exception):
    """An activation is NaN or infinite."""


def _padding(feed: Feed) -> np.ndarray | None:
    """The attention mask `[B, T]` as booleans, when it leaves tokens out."""
    mask = next((feed[name] for name in MASKS if name in feed and feed[name].ndim == 2), None)
    return None if mask is None or np.all(mask != 0) else mask != 0


def _unpadded(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The tokens of `[B, T, K]` or `[B·T, K]` that the mask lets count; others are returned as they are."""
    if mask is None:
        return array
    if array.ndim == 3 and array.shape[:2] == mask.shape:
        return array[mask]
    return array[mask.reshape(-1)] if array.ndim <= 2 and len(array) == mask.size else array


class _Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        """One more."""
        self.reach(self.done + 1)

    def reach(self, done: int) -> None:
        """At least this many; never more than there are."""
        self.done = min(max(done, self.done), self.total)
        if self.progress:
            self.progress(self.done, self.total)
