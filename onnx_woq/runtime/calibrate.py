"""Collect the statistics of every tap: `walk` runs the model over the samples and sums up what flows into its weights.

One forward pass serves as many taps as the memory budget allows at once, a *window*; the next window goes on from where
the last one ended (`onnx_woq.runtime.replay`). Activations are summed up while the next sample is being run and are
never kept: memory does not grow with tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from onnx_woq.core.cpu import cores, one_blas_thread
from onnx_woq.core.stats import Stats
from onnx_woq.errors import DataError
from onnx_woq.graph.model import Model, clone
from onnx_woq.graph.taps import Tap
from onnx_woq.runtime.data import Feed
from onnx_woq.runtime.inputs import MASKS
from onnx_woq.runtime.replay import Replay
from onnx_woq.runtime.structure import Contents, Structure

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all); a step is one sample in one window."""

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_IN_FLIGHT = 2  # samples whose activations are held at once


def walk(
    model: Model,
    taps: list[Tap],
    batches: list[Feed],
    *,
    memory_budget: int = 2 << 30,
    sequential: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[Tap, Stats]]:
    """Every tap with the statistics of its inputs over all samples, in graph order.

    Args:
        model: the float model; the consumer may edit it between two taps.
        taps: of this model.
        batches: one feed per sample. Tokens where a fed attention mask is 0 are left out.
        memory_budget: bytes for activations, Gram matrices and remembered hidden states; exceeded only where a single
            tap needs more.
        sequential: collect each tap's statistics on the model as the consumer has edited it by then. Otherwise they
            are those of the model at the time of this call and, bit for bit, the same whatever the budget.
        progress: called after each step.

    Raises:
        DataError: there are no samples, the model cannot be run on one of them, or computes NaN or infinite numbers.
        ModelError: the model cannot be run.
    """
    if not batches:
        raise DataError("calibration needs at least one sample")
    if sequential:
        return _one_by_one(model, list(taps), batches, memory_budget, progress)
    return _window_by_window(clone(model), list(taps), batches, memory_budget, progress)


def windows(taps: Sequence[Tap], batches: Sequence[Feed], memory_budget: int = 2 << 30) -> list[list[Tap]]:
    """The taps in consecutive groups whose statistics are collected together; never less than one tap each.

    With half precision it is always one: for want of kernels ONNX Runtime computes in float32 and rounds where a part
    of the model ends, so parts must not depend on the budget if results are not to.
    """
    if any(site.dtype in _HALF for tap in taps for site in tap.sites):
        return [[tap] for tap in taps]
    split: list[list[Tap]] = []
    used = 0
    for tap in taps:
        size = estimate_bytes([tap], batches)
        if not split or used + size > memory_budget // 2:  # the other half is for hidden states
            split.append([])
            used = 0
        split[-1].append(tap)
        used += size
    return split


def estimate_bytes(taps: Sequence[Tap], batches: Sequence[Feed]) -> int:
    """Bytes that collecting these taps together takes: their activations of the longest samples, and Gram matrices."""
    tokens = max(map(_token_count, batches), default=0)
    inputs = {value: tap.k for tap in taps for value in tap.values}
    return sum(4 * k * tokens * _IN_FLIGHT for k in inputs.values()) + sum(4 * tap.k * tap.k for tap in taps)


def _token_count(feed: Feed) -> int:
    """Tokens of a sample: its input_ids, or else its widest input without its channels."""
    if "input_ids" in feed:
        return feed["input_ids"].size
    return max(
        (array.size // (array.shape[-1] if array.ndim > 1 else 1) for array in feed.values() if array.size), default=0
    )


def _window_by_window(
    model: Model, taps: list[Tap], batches: list[Feed], memory_budget: int, progress: Progress | None
) -> Iterator[tuple[Tap, Stats]]:
    """The taps of a model that nobody edits."""
    replay = Replay(batches, memory_budget // 2)
    split = windows(taps, batches, memory_budget)
    report = _Steps(progress, len(split) * len(batches))
    for index, window in enumerate(split):
        later = {value for rest in split[index + 1 :] for tap in rest for value in tap.values}
        collected = _collect(replay, model, window, later, report, keep_used=False)
        for tap in window:
            yield tap, collected.pop(tap.name)


def _one_by_one(
    model: Model, taps: list[Tap], batches: list[Feed], memory_budget: int, progress: Progress | None
) -> Iterator[tuple[Tap, Stats]]:
    """The taps of a model that is edited on the way: together only those whose inputs do not depend on each other."""
    replay = Replay(batches, memory_budget // 2)
    contents = replay.contents
    report = _Steps(progress, len(taps) * len(batches))
    done = 0
    while done < len(taps):
        window = _independent(model, windows(taps[done:], batches, memory_budget)[0])
        later = {value for tap in taps[done + len(window) :] for value in tap.values}
        collected = _collect(replay, model, window, later, report, keep_used=True)
        before = _inputs(contents, model, window[1:])
        for tap in window:
            if tap is not window[0] and _inputs(contents, model, [tap]) != {tap.name: before[tap.name]}:
                break  # an edit for an earlier tap has reached this one's input after all
            done += 1
            report.reach(done * len(batches))
            yield tap, collected.pop(tap.name)


def _independent(model: Model, taps: list[Tap]) -> list[Tap]:
    """The leading taps whose inputs do not depend on the outputs of one another."""
    group = taps[:1]
    structure = Structure(model)
    for tap in taps[1:]:
        if structure.depends(tap.values, {site.node for earlier in group for site in earlier.sites}):
            break
        group.append(tap)
    return group


def _inputs(contents: Contents, model: Model, taps: list[Tap]) -> dict[str, tuple[int, ...]]:
    """What the inputs of each tap are computed from."""
    numbers = contents.of(model) if taps else {}
    return {tap.name: tuple(numbers[value] for value in tap.values) for tap in taps}


def _collect(
    replay: Replay, model: Model, taps: list[Tap], later: set[str], report: _Steps, *, keep_used: bool
) -> dict[str, Stats]:
    """The statistics of `taps` over all samples by tap name; taps with the same inputs get the same object."""
    stats = {tap.values: Stats.empty(tap.k) for tap in taps}
    values = list(dict.fromkeys(value for names in stats for value in names))
    with one_blas_thread(), ThreadPoolExecutor(cores()) as pool:
        running: list[Future[None]] = []
        for number, arrays in enumerate(replay.run(model, values, later, keep_used=keep_used)):
            _finish(running, taps)
            mask = _padding(replay.batches[number])
            running = [
                pool.submit(_add, stats[names], {name: arrays[name] for name in names}, mask, number) for names in stats
            ]
            del arrays
            report.step()
        _finish(running, taps)
    for names, one in stats.items():
        if not one.tokens:
            logger.warning("no sample reaches %s: there is nothing to calibrate it on", ", ".join(names))
    return {tap.name: stats[tap.values] for tap in taps}


def _add(stats: Stats, arrays: dict[str, np.ndarray], mask: np.ndarray | None, number: int) -> None:
    """Adds a sample's activations `[..., K]` to the statistics of one tap."""
    for name, array in arrays.items():
        try:
            stats.update(_unpadded(array, mask))
        except FloatingPointError as error:
            raise _NotFiniteError(f"{error} (value {name!r}, sample {number + 1})") from error


def _finish(running: list[Future[None]], taps: list[Tap]) -> None:
    """Waits for all; raises the error of the first that failed, or one that names the weight which is to blame."""
    for future in running:
        future.exception()
    for future in running:
        try:
            future.result()
        except _NotFiniteError as error:
            for tap in taps:
                tap.weight()
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
    return array[mask.reshape(-1)] if array.ndim == 2 and len(array) == mask.size else array


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
