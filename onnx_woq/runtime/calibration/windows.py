"""What a walk collects together, and what that takes: estimates made before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_woq.graph.find.blocks import Cut, blocks_of, cuts, reach
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.data.inputs import is_past, model_inputs
from onnx_woq.runtime.session import thread_count

PREPACK_BYTES = 256 << 20
"""Of a block's weights, as stored; beyond it they are multiplied from where they are."""

HIDDEN_SHARE = 4
"""One part in so many of the memory budget is for hidden states at most; what is beyond it goes to disk."""

IN_BETWEEN = 3
"""Values of the widest kind, and attention scores, that are alive at once between two taps."""

NARROW_HEAD = 64
"""Channels of an attention head where the model does not say."""


@dataclass(frozen=True)
class CalibrationMemory:
    """What walking over some taps takes, in bytes.

    Attributes:
        blocks: the taps by block.
        batches: samples.
        reach: see `graph.blocks.reach`.
        step: of the matrices of the largest block; where more lies between two windows, it is run in several parts.
        copies: how often a window's weights are held in float32: twice where they are rearranged.
        between: for what is computed on the way from tap to tap.
        hidden: for the hidden states of all samples where one part ends and the next begins.
        streams: models that are run side by side, whose inputs are multiplied with each other.
    """

    blocks: list[list[LinearGroup]]
    batches: Sequence[Feed]
    reach: Mapping[str, int]
    step: int
    copies: int
    between: int
    hidden: int
    streams: int = 1

    @classmethod
    def of(
        cls, model: Model, groups: Sequence[LinearGroup], batches: Sequence[Feed], *, streams: int = 1
    ) -> CalibrationMemory:
        """What walking over `taps` of `model` takes; with two streams, of the float model beside it."""
        copies = 2 if prepacks(cuts(model)[-1]) else 1
        blocks, found = blocks_of(model, groups), reach(model)
        ends = [max((found.get(v, 0) for v in block.values), default=0) for cut in cuts(model) for block in cut.blocks]
        step = max((end - start for start, end in itertools.pairwise([0, *ends])), default=0)
        between, hidden = streams * _between(model, groups, batches), streams * _hidden(groups, batches)
        return cls(blocks, batches, found, step, copies, between, hidden, streams)

    def remembered(self, budget: int) -> int:
        """What of a budget is for hidden states."""
        return min(self.hidden, budget // HIDDEN_SHARE)

    def spilled(self, budget: int) -> int:
        """Bytes of hidden states that go to disk."""
        return self.hidden if self.hidden > budget // HIDDEN_SHARE else 0

    def windows(self, budget: int, blocks: Sequence[Sequence[LinearGroup]] | None = None) -> list[list[LinearGroup]]:
        """The taps (or those of `blocks`) in consecutive windows whose statistics are collected together.

        As many blocks as the budget allows; a block that is too large for it in several goes, one tap at least in each.
        """
        available = budget - self.remembered(budget)
        split: list[list[LinearGroup]] = []
        used, before = available + 1, None
        for members in self.blocks if blocks is None else blocks:
            fits = self.collecting(members, before) <= available
            for piece in [members] if fits else [[group] for group in members]:
                more = self.collecting(piece, before)
                if used + more > available:
                    split.append([])
                    used = 0
                split[-1] += piece
                used += more
                before = piece[-1]
        return split

    def collecting(self, groups: Sequence[LinearGroup], before: LinearGroup | None) -> int:
        """Collecting `taps` together takes: their inputs of the longest samples, Gram matrices, weights on the way.

        Args:
            taps: collected together.
            before: the tap that was collected last.
        """
        tokens = max(map(token_count, self.batches), default=0)
        held = min(thread_count(), len(self.batches)) + 1  # samples: those being run, and the one being summed up
        inputs = {value: group.k for group in groups for value in group.values}
        weighted = {name for group in groups for name in group.reads.difference(group.values)}
        grams = {group.sources: self.streams * 4 * group.k * group.k for group in groups}
        on_the_way = min(self.step, self._reach(groups[0]) - self._reach(before))
        weights = self.copies * (on_the_way + self._reach(groups[-1]) - self._reach(groups[0]))
        widths = sum(inputs.values()) + tokens * len(weighted)
        return self.streams * (4 * tokens * held * widths + weights) + sum(grams.values())

    def least(self) -> int:
        """The smallest budget that holds every window."""
        return self._largest(0)

    def used(self, budget: int) -> int:
        """What a walk takes that is given `budget`."""
        return min(self._largest(budget), max(budget, self.least())) + self.remembered(budget) + self.between

    def _largest(self, budget: int) -> int:
        split = self.windows(budget)
        befores = [None, *(window[-1] for window in split)]
        return max(self.collecting(window, before) for window, before in zip(split, befores, strict=False))

    def _reach(self, group: LinearGroup | None) -> int:
        return max((self.reach.get(value, 0) for value in group.values), default=0) if group else 0


def prepacks(cut: Cut) -> bool:
    """Whether float weights are rearranged for speed, which takes as much memory again as a block's weights do.

    Products then round otherwise, so this follows from the model alone and not from the memory there is.
    """
    sizes = sorted(block.weight_bytes for block in cut.blocks)
    return bool(sizes) and sizes[len(sizes) // 2] <= PREPACK_BYTES


def token_count(feed: Feed) -> int:
    """Tokens of a sample: its input_ids, or else its widest input without its channels."""
    if "input_ids" in feed:
        return feed["input_ids"].size
    return max(
        (array.size // (array.shape[-1] if array.ndim > 1 else 1) for array in feed.values() if array.size), default=0
    )


def _between(model: Model, groups: Sequence[LinearGroup], batches: Sequence[Feed]) -> int:
    """Bytes of what is computed on the way from tap to tap, for the samples that are run side by side."""
    tokens = max(map(token_count, batches), default=0)
    rows = max((feed["input_ids"].shape[0] for feed in batches if "input_ids" in feed), default=1)
    narrow, wide = min(group.k for group in groups), max(group.k for group in groups)
    shapes = (info.shape for info in model_inputs(model) if is_past(info))
    head = next((shape[-1] for shape in shapes if shape and isinstance(shape[-1], int)), NARROW_HEAD)
    scores = (narrow // head + 1) * tokens * (tokens // max(1, rows))
    return min(thread_count(), len(batches)) * IN_BETWEEN * 4 * (scores + wide * tokens)


def _hidden(groups: Sequence[LinearGroup], batches: Sequence[Feed]) -> int:
    return 2 * 4 * min(group.k for group in groups) * sum(map(token_count, batches))
