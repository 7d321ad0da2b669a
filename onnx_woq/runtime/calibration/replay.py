"""Run parts of a model over the samples, each part from where the last one ended.

Fetching values from the last block of a model would run every block before it, part after part. A `Replay` therefore
remembers, per sample, the values that cross from what has been run to what later parts need: the residual stream and
little else. A remembered value is used only while everything it was computed from is unchanged, which is decided by
content, not by name, so a consumer may edit the model between two parts (constants are replaced, under new
names, never changed), and a later process may go on from what an earlier one remembered.

Samples are run side by side, each session on as few threads as that leaves: threads inside one small product wait for
each other more than they compute, and on one thread a product is the same bit for bit whatever the machine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.io.model import Model
from onnx_woq.graph.rewrite.expose_values import expose
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches
from onnx_woq.graph.rewrite.sum_over_heads import HEADS_AXIS, sum_over_heads
from onnx_woq.graph.rewrite.upcast import upcast
from onnx_woq.runtime.calibration.hidden_states import HiddenStateStore, Stored, newest, room_for
from onnx_woq.runtime.calibration.structure import Structure, contents
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.session import make_session, run, thread_count
from onnx_woq.targets.constant_fold import fold_constants

logger = logging.getLogger(__name__)


class Replay:
    """The samples and what is remembered of them.

    Args:
        batches: one feed per sample.
        budget: bytes that remembered values may take in memory; beyond it they go to a file, and where the disk has no
            room either, nothing is remembered and each part starts from the model's inputs.
        pool: where samples are run.
        lanes: samples run side by side.
        side: names of cheap values that many parts read; remembered as well.
        folder: keep what is remembered there, for a later process to go on from.
        prepack: of `make_session`; must follow from the model alone if results are to.

    Attributes:
        absent: names of values that are not in the models that are run, for their branch is not taken.
    """

    def __init__(
        self,
        batches: Sequence[Feed],
        budget: int,
        pool: Executor,
        lanes: int,
        side: Collection[str] = (),
        folder: Path | None = None,
        prepack: bool = False,
    ) -> None:
        self.batches = batches
        self.budget = budget
        self.pool = pool
        self.lanes = max(1, min(lanes, len(batches)))
        self.side = side
        self.folder = folder
        self.prepack = prepack
        self._keys: dict[str, str] = {}  # of the remembered values, when they were computed
        self._saved: list[dict[str, np.ndarray | Stored]] = [{} for _ in batches]
        self.absent: set[str] = set()
        self._memo = _Memo()
        if folder is not None:
            self._keys, self._saved = newest(folder, len(batches))

    def run(
        self,
        model: Model,
        values: Collection[str],
        later: Collection[str] = (),
        *,
        keep_used: bool = False,
        frozen: bool = False,
        keep_saved: bool = False,
        entrance: Collection[str] = (),
        attention: Collection[str] = (),
    ) -> Iterator[Feed]:
        """For each sample, the arrays of `values` by name; those computed in a body are `[tokens, K]`.

        Half precision is computed in float32. Must be consumed to its end before the next part is run.

        Args:
            model: as it is now.
            values: names of activations.
            later: names of those that will be asked for in later parts; decides what to remember.
            keep_used: keep what this part started from as well, for the case that an edit spoils what it computes.
            frozen: nobody edits `model`: what was found out about it holds.
            keep_saved: a look in passing: what is remembered stays as it is.
            attention: names among `values` of attention probabilities; what is given are their squares, summed over
                heads.
            entrance: names of values to remember as well where they were costly: what comes below them will be edited.

        Raises:
            DataError: the model cannot be run on a sample.
            ModelError: it cannot be run at all.
        """
        keys, structure = self._memo.of(model, frozen)
        fresh = {name for name, key in self._keys.items() if keys.get(name) == key}
        kinds = {name: array.dtype for name, array in self._saved[0].items() if name in fresh}
        crossing = structure.crossing(values, later, self.side, entrance)
        part = _plan(model, structure, values, crossing, kinds, set(self.batches[0]), keep_used, attention)
        threads = max(1, thread_count() // self.lanes)
        session = self._session(part.model, threads) if part.model else None
        running: deque[Future[Feed]] = deque()
        shelf: HiddenStateStore | None = None
        mode = ""
        before: Feed = {}
        kept: list[dict[str, np.ndarray | Stored]] = []
        waiting = iter(range(len(self.batches)))
        for _ in self.batches:
            while len(running) < self.lanes and (ahead := next(waiting, None)) is not None:
                running.append(self.pool.submit(partial(self._sample, part, session, ahead)))
            known = running.popleft().result()
            remembered = _shared({name: known[name] for name in part.remembered}, before)
            before = {name: array for name, array in remembered.items() if name in self.side}
            if not mode:
                mode, shelf = ("nothing", None) if keep_saved else self._place(remembered)
            kept.append(dict(remembered) if mode == "memory" else {})
            if shelf is not None:
                stored = shelf.add(remembered)
                kept[-1] = stored if mode == "disk" else kept[-1]
            del remembered
            yield {
                name: squares(known[name]) if name == output and name in attention else known[output]
                for name, output in part.names.items()
            }
            del known
        if keep_saved:
            return
        self._saved = kept
        self._keys = {} if mode == "nothing" else {name: keys[name] for name in part.remembered}
        if shelf is not None:
            shelf.close(self._keys)

    def weights(self, model: Model, values: Collection[str], *, frozen: bool = False) -> int:
        """Bytes of the matrices, in float32, that running a part for `values` would multiply by."""
        keys, structure = self._memo.of(model, frozen)
        fresh = {name for name, key in self._keys.items() if keys.get(name) == key}
        return structure.weights(fresh.union(self.batches[0]), values)

    def _session(self, model: Model, threads: int) -> Any:
        return make_session(model, threads=threads, for_calibration=True, prepack=self.prepack)

    def _sample(self, part: _Part, session: Any, number: int) -> Feed:
        """What is known of one sample once the part has run on it."""
        feed, saved = self.batches[number], self._saved[number]
        wanted = {*part.inputs, *part.names.values(), *part.remembered}
        known: Feed = {name: _array(value) for name, value in saved.items() if name in wanted and name not in feed}
        known |= feed
        if session is not None:
            inputs = {name: _single(known[name]) for name in part.inputs}
            outputs = run(session, part.outputs, inputs, f"sample {number + 1}")
            known.update(zip(part.outputs, outputs, strict=True))
        return known

    def _place(self, first: Feed) -> tuple[str, HiddenStateStore | None]:
        """Where to remember what takes as much as `first` for the first sample, and a file if it is to be written."""
        size = lambda feed: sum(array.nbytes for array in feed.values())  # noqa: E731
        total = size(first) * sum(map(size, self.batches)) // max(1, size(self.batches[0]))
        mode = self._mode(total)
        file = mode == "disk" or (self.folder is not None and room_for(2 * total, self.folder))
        return mode, HiddenStateStore(self.folder) if file and mode != "nothing" else None

    def _mode(self, total: int) -> str:
        """Where to remember values of `total` bytes: "memory", "disk" or "nothing"."""
        if total <= self.budget:
            return "memory"
        if room_for(2 * total, self.folder):
            return "disk"
        logger.info("%d MB of hidden states fit neither memory nor disk: each part runs from the start", total >> 20)
        return "nothing"


def stitched(model: Model, feed: Feed) -> Feed:
    """Every output of `model` by name, computed block by block: what a walk runs, and no more in memory.

    Half precision is computed in float32.

    Args:
        model: left as it is.
        feed: every input of it.

    Raises:
        DataError: the model cannot be run on this sample.
        ModelError: it cannot be run at all.
    """
    known = {name: _single(array) for name, array in feed.items()}
    taken = {}
    for name, condition in find_conditions(model).items():
        taken[name] = bool(_values_of(model, Structure(model), known, set(known), (condition,))[condition].any())
    flat = inline_branches(model, taken)
    structure = Structure(flat)
    cut = cuts(flat)[0]
    results = [value.name or "" for value in flat.ir.graph.outputs]
    blocks = [block for block in (cut.side, *cut.blocks) if block is not None]
    for index, block in enumerate(blocks):
        known |= _values_of(flat, structure, known, set(block.inputs), block.outputs)
        alive = {*results, *(name for later in blocks[index + 1 :] for name in later.inputs)}
        known = {name: array for name, array in known.items() if name in alive}
    rest = [name for name in results if name not in known]
    known |= _values_of(flat, structure, {**feed, **known}, set(feed), rest)
    return {name: known[name] for name in results}


def _values_of(model: Model, structure: Structure, known: Feed, have: set[str], wanted: Sequence[str]) -> Feed:
    """The values called `wanted`, computed from those of `known` that `have` names."""
    if not wanted:
        return {}
    part, inputs = cut_out(model, structure, have, wanted, {name: known[name].dtype for name in have if name in known})
    session = make_session(part, for_calibration=True)
    return dict(zip(wanted, run(session, wanted, {n: known[n] for n in inputs}, "the sample"), strict=True))


@dataclass
class _Memo:
    """What was found out about a model, for as long as nobody edits it."""

    model: Model | None = None
    keys: dict[str, str] = field(default_factory=dict)
    structure: Structure | None = None

    def of(self, model: Model, frozen: bool) -> tuple[dict[str, str], Structure]:
        if not (frozen and self.model is model and self.structure):
            self.model, self.keys, self.structure = model, contents(model), Structure(model)
        return self.keys, self.structure


def squares(probabilities: np.ndarray) -> np.ndarray:
    """What `sum_over_heads` lets a session compute."""
    return np.square(probabilities, dtype=np.float32).sum(axis=HEADS_AXIS)


def _array(value: np.ndarray | Stored) -> np.ndarray:
    return value.read() if isinstance(value, Stored) else value


def _single(array: np.ndarray) -> np.ndarray:
    """Half precision as float32; everything else as it is."""
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array


def _shared(arrays: Feed, before: Feed) -> Feed:
    """`arrays`, where one equals the last sample's (a mask, a rotary table) that one instead: held once."""
    same = lambda a, b: b is not None and a.shape == b.shape and np.array_equal(a, b)  # noqa: E731
    return {name: before[name] if same(array, before.get(name)) else array for name, array in arrays.items()}


@dataclass(frozen=True)
class _Part:
    """What to run for a sample.

    Attributes:
        model: the nodes between `inputs` and `outputs`, in float32; None when there are none.
        inputs: names to feed, of the model's inputs and of remembered values.
        outputs: names to fetch.
        names: wanted value -> the name its array goes by.
        remembered: names of values to keep for later parts.
    """

    model: Model | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    names: dict[str, str]
    remembered: tuple[str, ...]


def _plan(
    model: Model,
    structure: Structure,
    values: Collection[str],
    remembered: Sequence[str],
    kinds: dict[str, np.dtype],
    fed: set[str],
    keep_used: bool,
    attention: Collection[str],
) -> _Part:
    """The smallest part that gives `values` from the model's inputs in `fed` and the remembered values in `kinds`."""
    exposed, names = model, {value: value for value in values}
    if not structure.named.keys() >= set(values):
        exposed, names = expose(model, values)
        structure = Structure(exposed)
    have = fed.union(kinds)
    outputs = tuple(dict.fromkeys(n for n in (*names.values(), *remembered) if n not in have))
    if not outputs:
        return _Part(None, (), (), names, tuple(n for n in remembered if n in kinds))
    part, inputs = cut_out(exposed, structure, have, outputs, kinds)
    shown = [n for n in attention if n not in remembered]  # what is remembered leaves as it is
    if squared := sum_over_heads(part, shown):
        outputs = tuple(squared.get(n, n) for n in outputs)
        names |= squared
    used = tuple(n for n in inputs if n in kinds and keep_used and n not in remembered)
    return _Part(part, inputs, outputs, names, (*(n for n in remembered if n not in fed), *used))


def cut_out(
    model: Model, structure: Structure, have: Collection[str], outputs: Sequence[str], kinds: dict[str, np.dtype]
) -> tuple[Model, tuple[str, ...]]:
    """The part of `model` that computes `outputs` from values in `have`, in float32, and the names of its inputs.

    Args:
        model: left as it is.
        structure: of it.
        have: names of values that can be fed.
        outputs: names of values of the main graph.
        kinds: types of those among `have` that are not inputs of the model.
    """
    cut = structure.between(have, outputs)
    for value in cut.inputs:
        if value.name in kinds:  # as it is, not as the exporter guessed
            value.type = ir.TensorType(ir.DataType.from_numpy(kinds[value.name]))
            value.shape = None
    whole = model.ir
    small = ir.Model(cut, ir_version=whole.ir_version, functions=tuple(f.clone() for f in whole.functions.values()))
    if small.functions:
        InlinePass()(small)
    part = replace(model, ir=small)
    fold_constants(part)
    upcast(part)
    return part, tuple(value.name or "" for value in small.graph.inputs)
