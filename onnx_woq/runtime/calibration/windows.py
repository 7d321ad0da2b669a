"""Windows: which linear groups a calibration run collects together, and the memory that takes.

A *linear group* is the set of MatMul and Gemm nodes that read one activation, such as q/k/v. A *window* is a run of
linear groups whose statistics are collected at the same time. All numbers here are estimates made before anything runs.
"""

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
"""Bytes of a block's weights, as stored, up to which ONNX Runtime may rearrange a copy of them."""

HIDDEN_SHARE = 4
"""Hidden states take at most one part in this many of the memory budget; the rest of them go to disk."""

IN_BETWEEN = 3
"""Activations of the widest kind, and attention scores, that exist at once between two linear groups."""

NARROW_HEAD = 64
"""Channels of an attention head, where the model does not tell."""


@dataclass(frozen=True)
class CalibrationMemory:
    """The memory that a calibration run takes, in bytes.

    Attributes:
        blocks: the linear groups, block by block.
        batches: samples.
        reach: value name -> bytes of the matrices multiplied up to it, see `graph.find.blocks.reach`.
        step: bytes of the matrices of the largest block. Where more lies between two windows, it runs in several parts.
        copies: copies of a window's weights in float32: 2 if ONNX Runtime rearranges them, otherwise 1.
        between: bytes of the values computed on the way from one linear group to the next.
        hidden: bytes of the hidden states of all samples where one part ends and the next one begins.
        models: models that run side by side: 2 if cross products with the float model are collected, otherwise 1.
    """

    blocks: list[list[LinearGroup]]
    batches: Sequence[Feed]
    reach: Mapping[str, int]
    step: int
    copies: int
    between: int
    hidden: int
    models: int = 1

    @classmethod
    def of(
        cls, model: Model, groups: Sequence[LinearGroup], batches: Sequence[Feed], *, models: int = 1
    ) -> CalibrationMemory:
        """Estimates a calibration run for some linear groups.

        Args:
            model: the float model.
            groups: linear groups of it.
            batches: samples.
            models: models that run side by side.
        """
        copies = 2 if prepacks(cuts(model)[-1]) else 1
        blocks, found = blocks_of(model, groups), reach(model)
        ends = [max((found.get(v, 0) for v in block.values), default=0) for cut in cuts(model) for block in cut.blocks]
        step = max((end - start for start, end in itertools.pairwise([0, *ends])), default=0)
        between, hidden = models * _between(model, groups, batches), models * _hidden(groups, batches)
        return cls(blocks, batches, found, step, copies, between, hidden, models)

    def remembered(self, budget: int) -> int:
        """Returns the bytes of a budget that are for hidden states in memory."""
        return min(self.hidden, budget // HIDDEN_SHARE)

    def spilled(self, budget: int) -> int:
        """Returns the bytes of hidden states that go to disk under a budget."""
        return self.hidden if self.hidden > budget // HIDDEN_SHARE else 0

    def windows(self, budget: int, blocks: Sequence[Sequence[LinearGroup]] | None = None) -> list[list[LinearGroup]]:
        """Cuts the linear groups into windows, each as large as the budget allows.

        A window holds whole blocks, or a part of one that is too large for the budget, and at least one group.

        Args:
            budget: bytes for everything but what is computed between linear groups.
            blocks: linear groups by block; None for all of them.
        """
        available = budget - self.remembered(budget)
        split: list[list[LinearGroup]] = []
        used, previous = available + 1, None
        for members in self.blocks if blocks is None else blocks:
            fits = self.collecting(members, previous) <= available
            for piece in [members] if fits else [[group] for group in members]:
                size = self.collecting(piece, previous)
                if used + size > available:
                    split.append([])
                    used = 0
                split[-1] += piece
                used += size
                previous = piece[-1]
        return split

    def collecting(self, groups: Sequence[LinearGroup], previous: LinearGroup | None) -> int:
        """Returns the bytes that collecting some linear groups together takes.

        They are the inputs of the longest samples, the Gram matrices and the weights multiplied on the way.

        Args:
            groups: the linear groups.
            previous: the linear group that was collected last, None at the start.
        """
        tokens = max(map(token_count, self.batches), default=0)
        held = min(thread_count(), len(self.batches)) + 1  # samples: those that run, and the one being summed up
        inputs = {value: group.k for group in groups for value in group.values}
        weighted = {name for group in groups for name in group.reads.difference(group.values)}
        grams = {group.sources: self.models * 4 * group.k * group.k for group in groups}
        on_the_way = min(self.step, self._reach(groups[0]) - self._reach(previous))
        weights = self.copies * (on_the_way + self._reach(groups[-1]) - self._reach(groups[0]))
        widths = sum(inputs.values()) + tokens * len(weighted)
        return self.models * (4 * tokens * held * widths + weights) + sum(grams.values())

    def least(self) -> int:
        """Returns the smallest budget in bytes that every linear group fits into."""
        return self._largest(0)

    def used(self, budget: int) -> int:
        """Returns the bytes that a calibration run under `budget` takes."""
        return min(self._largest(budget), max(budget, self.least())) + self.remembered(budget) + self.between

    def _largest(self, budget: int) -> int:
        """Returns the bytes that the largest window under `budget` takes."""
        split = self.windows(budget)
        last_before = [None, *(window[-1] for window in split)]
        return max(self.collecting(window, previous) for window, previous in zip(split, last_before, strict=False))

    def _reach(self, group: LinearGroup | None) -> int:
        """Returns the bytes of the matrices multiplied up to the inputs of a linear group; 0 for None."""
        return max((self.reach.get(value, 0) for value in group.values), default=0) if group else 0


def prepacks(cut: Cut) -> bool:
    """Tells whether ONNX Runtime may rearrange float weights for speed, at the cost of a copy of a block's weights.

    Products then round differently. So the answer depends on the model alone and not on the memory of the machine.
    """
    sizes = sorted(block.weight_bytes for block in cut.blocks)
    return bool(sizes) and sizes[len(sizes) // 2] <= PREPACK_BYTES


def token_count(feed: Feed) -> int:
    """Returns the tokens of a sample: the size of its input_ids, or else of its largest input without the channels."""
    if "input_ids" in feed:
        return feed["input_ids"].size
    return max(
        (array.size // (array.shape[-1] if array.ndim > 1 else 1) for array in feed.values() if array.size), default=0
    )


def _between(model: Model, groups: Sequence[LinearGroup], batches: Sequence[Feed]) -> int:
    """Estimates the bytes computed between two linear groups, for the samples that run side by side."""
    tokens = max(map(token_count, batches), default=0)
    rows = max((feed["input_ids"].shape[0] for feed in batches if "input_ids" in feed), default=1)
    narrow, wide = min(group.k for group in groups), max(group.k for group in groups)
    shapes = (info.shape for info in model_inputs(model) if is_past(info))
    head = next((shape[-1] for shape in shapes if shape and isinstance(shape[-1], int)), NARROW_HEAD)
    scores = (narrow // head + 1) * tokens * (tokens // max(1, rows))
    return min(thread_count(), len(batches)) * IN_BETWEEN * 4 * (scores + wide * tokens)


def _hidden(groups: Sequence[LinearGroup], batches: Sequence[Feed]) -> int:
    """Estimates the bytes of hidden states: two per token in float32, as wide as the narrowest linear group."""
    return 2 * 4 * min(group.k for group in groups) * sum(map(token_count, batches))
