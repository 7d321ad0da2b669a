"""Replay: runs a part of a model on all samples, starting from where the previous part ended.

A *part* is the nodes between values that are known and values that are wanted. Without memory, fetching values from the
last block of a model would run every block before it again. A `Replay` therefore remembers, for each sample, the values
that cross from the nodes run so far to later parts: the hidden states (the residual stream) and little else.

A remembered value is used only while everything that it was computed from is unchanged. That is decided by digests of
content and not by names (`structure.contents`). So the model may be edited between two parts, as long as constants are
replaced under new names and never changed, and a later process may go on from values that an earlier one remembered.

Samples run side by side, each session on its share of the threads. Threads inside one small product would wait for each
other more than they compute, and on one thread a product is the same bit for bit on every machine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.io.model import Model
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches
from onnx_woq.graph.rewrite.sum_over_heads import HEADS_AXIS
from onnx_woq.runtime.calibration.hidden_states import HiddenStateStore, Stored, load_newest, room_for
from onnx_woq.runtime.calibration.parts import Part, cut_out, plan_part, single_precision
from onnx_woq.runtime.calibration.structure import Structure, contents
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.session import make_session, run, thread_count

logger = logging.getLogger(__name__)


class Replay:
    """The samples, and the values remembered for each of them.

    Args:
        batches: one feed per sample.
        budget: bytes that remembered values may take in memory. Above that they go to a file. If the disk has no room
            either, nothing is remembered and each part starts from the model's inputs.
        pool: executor that samples run on.
        workers: samples that run side by side.
        side_values: names of values that are cheap but read by many parts; they are remembered too.
        folder: folder that keeps the remembered values for a later process; None for none.
        prepack: as for `make_session`. It must follow from the model alone if results are to.

    Attributes:
        absent: names of values that do not exist in the models that are run, because their branch is not taken.
    """

    def __init__(
        self,
        batches: Sequence[Feed],
        budget: int,
        pool: Executor,
        workers: int,
        side_values: Collection[str] = (),
        folder: Path | None = None,
        prepack: bool = False,
    ) -> None:
        self.batches = batches
        self.budget = budget
        self.pool = pool
        self.workers = max(1, min(workers, len(batches)))
        self.side_values = side_values
        self.folder = folder
        self.prepack = prepack
        self._keys: dict[str, str] = {}  # digests of the remembered values
        self._saved: list[dict[str, np.ndarray | Stored]] = [{} for _ in batches]
        self.absent: set[str] = set()
        self._analysis = _AnalysisCache()
        if folder is not None:
            self._keys, self._saved = load_newest(folder, len(batches))

    def run(
        self,
        model: Model,
        values: Collection[str],
        later: Collection[str] = (),
        *,
        keep_used: bool = False,
        frozen: bool = False,
        peek: bool = False,
        block_inputs: Collection[str] = (),
        attention: Collection[str] = (),
    ) -> Iterator[Feed]:
        """Yields for each sample the arrays of `values` by name; values computed in a body are `[tokens, K]`.

        Half precision is computed in float32. The iterator must be consumed to its end before the next part runs.

        Args:
            model: the model as it is now.
            values: names of activations to fetch.
            later: names of activations that later parts will fetch; they decide what is remembered.
            keep_used: keep the values that this part starts from too, in case an edit invalidates what it computes.
            frozen: `model` is not edited any more, so what is known about its structure stays valid.
            peek: leave the remembered values as they are.
            block_inputs: names of values to remember too if they were costly, because what follows them will be edited.
            attention: names among `values` of attention probabilities; of these, the squares summed over heads are
                yielded.

        Raises:
            DataError: the model cannot be run on a sample.
            ModelError: the model cannot be run at all.
        """
        keys, structure = self._analysis.of(model, frozen)
        fresh = {name for name, key in self._keys.items() if keys.get(name) == key}
        dtypes = {name: array.dtype for name, array in self._saved[0].items() if name in fresh}
        crossing = structure.crossing(values, later, self.side_values, block_inputs)
        part = plan_part(model, structure, values, crossing, dtypes, set(self.batches[0]), keep_used, attention)
        threads = max(1, thread_count() // self.workers)
        session = self._session(part.model, threads) if part.model else None
        running: deque[Future[Feed]] = deque()
        store: HiddenStateStore | None = None
        mode = ""
        before: Feed = {}
        kept: list[dict[str, np.ndarray | Stored]] = []
        waiting = iter(range(len(self.batches)))
        for _ in self.batches:
            while len(running) < self.workers and (ahead := next(waiting, None)) is not None:
                running.append(self.pool.submit(partial(self._run_sample, part, session, ahead)))
            known = running.popleft().result()
            remembered = _shared({name: known[name] for name in part.remembered}, before)
            before = {name: array for name, array in remembered.items() if name in self.side_values}
            if not mode:
                mode, store = ("nothing", None) if peek else self._choose_store(remembered)
            kept.append(dict(remembered) if mode == "memory" else {})
            if store is not None:
                stored = store.add(remembered)
                kept[-1] = stored if mode == "disk" else kept[-1]
            del remembered
            yield {
                name: squares(known[name]) if name == output and name in attention else known[output]
                for name, output in part.names.items()
            }
            del known
        if peek:
            return
        self._saved = kept
        self._keys = {} if mode == "nothing" else {name: keys[name] for name in part.remembered}
        if store is not None:
            store.close(self._keys)

    def weights(self, model: Model, values: Collection[str], *, frozen: bool = False) -> int:
        """Returns the bytes in float32 of the matrices that a part for `values` would multiply by."""
        keys, structure = self._analysis.of(model, frozen)
        fresh = {name for name, key in self._keys.items() if keys.get(name) == key}
        return structure.weights(fresh.union(self.batches[0]), values)

    def _session(self, model: Model, threads: int) -> Any:
        """Makes the session of a part."""
        return make_session(model, threads=threads, for_calibration=True, prepack=self.prepack)

    def _run_sample(self, part: Part, session: Any, number: int) -> Feed:
        """Runs a part on one sample; returns its remembered, fed and computed values by name."""
        feed, saved = self.batches[number], self._saved[number]
        wanted = {*part.inputs, *part.names.values(), *part.remembered}
        known: Feed = {name: _array(value) for name, value in saved.items() if name in wanted and name not in feed}
        known |= feed
        if session is not None:
            inputs = {name: single_precision(known[name]) for name in part.inputs}
            outputs = run(session, part.outputs, inputs, f"sample {number + 1}")
            known.update(zip(part.outputs, outputs, strict=True))
        return known

    def _choose_store(self, first: Feed) -> tuple[str, HiddenStateStore | None]:
        """Decides where to remember values: "memory", "disk" or "nothing", and the file to write if there is one.

        Args:
            first: the values of the first sample, which the size of all is estimated from.
        """
        size = lambda feed: sum(array.nbytes for array in feed.values())  # noqa: E731
        total = size(first) * sum(map(size, self.batches)) // max(1, size(self.batches[0]))
        mode = self._mode(total)
        file = mode == "disk" or (self.folder is not None and room_for(2 * total, self.folder))
        return mode, HiddenStateStore(self.folder) if file and mode != "nothing" else None

    def _mode(self, total: int) -> str:
        """Returns where to remember values of `total` bytes: "memory", "disk" or "nothing"."""
        if total <= self.budget:
            return "memory"
        if room_for(2 * total, self.folder):
            return "disk"
        logger.info("%d MB of hidden states fit neither memory nor disk: each part runs from the start", total >> 20)
        return "nothing"


def stitched(model: Model, feed: Feed) -> Feed:
    """Computes every output of `model` block by block; returns them by name.

    It runs the same parts as a calibration run and holds no more in memory. Half precision is computed in float32.

    Args:
        model: the model; not changed.
        feed: one sample with every input.

    Raises:
        DataError: the model cannot be run on this sample.
        ModelError: the model cannot be run at all.
    """
    known = {name: single_precision(array) for name, array in feed.items()}
    taken = {}
    for name, condition in find_conditions(model).items():
        taken[name] = bool(_compute(model, Structure(model), known, set(known), (condition,))[condition].any())
    flat = inline_branches(model, taken)
    structure = Structure(flat)
    cut = cuts(flat)[0]
    results = [value.name or "" for value in flat.ir.graph.outputs]
    blocks = [block for block in (cut.side, *cut.blocks) if block is not None]
    for index, block in enumerate(blocks):
        known |= _compute(flat, structure, known, set(block.inputs), block.outputs)
        alive = {*results, *(name for later in blocks[index + 1 :] for name in later.inputs)}
        known = {name: array for name, array in known.items() if name in alive}
    rest = [name for name in results if name not in known]
    known |= _compute(flat, structure, {**feed, **known}, set(feed), rest)
    return {name: known[name] for name in results}


def _compute(model: Model, structure: Structure, known: Feed, have: set[str], wanted: Sequence[str]) -> Feed:
    """Computes the values `wanted` from those values in `known` that `have` names."""
    if not wanted:
        return {}
    part, inputs = cut_out(model, structure, have, wanted, {name: known[name].dtype for name in have if name in known})
    session = make_session(part, for_calibration=True)
    return dict(zip(wanted, run(session, wanted, {n: known[n] for n in inputs}, "the sample"), strict=True))


@dataclass
class _AnalysisCache:
    """The digests and the structure of a model, kept while nobody edits it."""

    model: Model | None = None
    keys: dict[str, str] = field(default_factory=dict)
    structure: Structure | None = None

    def of(self, model: Model, frozen: bool) -> tuple[dict[str, str], Structure]:
        """Returns digests and structure of `model`; known ones only if it is `frozen`, that is, not edited."""
        if not (frozen and self.model is model and self.structure):
            self.model, self.keys, self.structure = model, contents(model), Structure(model)
        return self.keys, self.structure


def squares(probabilities: np.ndarray) -> np.ndarray:
    """Returns the squares of attention probabilities summed over heads, like `graph.find.attention.sum_over_heads`."""
    return np.square(probabilities, dtype=np.float32).sum(axis=HEADS_AXIS)


def _array(value: np.ndarray | Stored) -> np.ndarray:
    """Returns a remembered value, read from disk if it is there."""
    return value.read() if isinstance(value, Stored) else value


def _shared(arrays: Feed, before: Feed) -> Feed:
    """Replaces arrays that equal those of the sample `before`, such as rotary tables, so that they are held once."""
    same = lambda a, b: b is not None and a.shape == b.shape and np.array_equal(a, b)  # noqa: E731
    return {name: before[name] if same(array, before.get(name)) else array for name, array in arrays.items()}
