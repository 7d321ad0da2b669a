"""Run parts of a model over the samples, each part from where the last one ended.

Fetching values from the last block of a model would run every block before it, window after window. A `Replay`
therefore remembers, per sample, the values that cross from what has been run to what later parts need: the residual
stream and little else. A remembered value is used only while everything it was computed from is unchanged, which is
decided by content, not by name, so a consumer may edit the model between two parts in any way.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_woq.graph.expose import expose
from onnx_woq.graph.model import Model
from onnx_woq.runtime.data import Feed
from onnx_woq.runtime.session import make_session, run
from onnx_woq.runtime.structure import Contents, Structure

logger = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 14  # smaller arrays stay in memory even when the others go to disk


class Replay:
    """The samples and what is remembered of them.

    Args:
        batches: one feed per sample.
        budget: bytes that remembered values may take in memory; beyond it they go to a temporary file, and where the
            disk has no room either, nothing is remembered and each part starts from the model's inputs.
        threads: of each session.
    """

    def __init__(self, batches: Sequence[Feed], budget: int, threads: int = 0) -> None:
        self.batches = batches
        self.budget = budget
        self.threads = threads
        self.contents = Contents()
        self._keys: dict[str, int] = {}  # of the remembered values, when they were computed
        self._saved: list[Feed] = [{} for _ in batches]

    def run(
        self, model: Model, values: Collection[str], later: Collection[str] = (), *, keep_used: bool = False
    ) -> Iterator[Feed]:
        """For each sample, the arrays of `values` by name; those computed in a body are `[tokens, K]`.

        Must be consumed to its end before the next part is run.

        Args:
            model: as it is now.
            values: names of activations.
            later: names of those that will be asked for in later parts; decides what to remember.
            keep_used: keep what this part started from as well, for the case that an edit spoils what it computes.

        Raises:
            DataError: the model cannot be run on a sample.
            ModelError: it cannot be run at all.
        """
        keys = self.contents.of(model)
        fresh = {name for name, key in self._keys.items() if keys.get(name) == key}
        kinds = {name: array.dtype for name, array in self._saved[0].items() if name in fresh}
        part = _plan(model, values, later, kinds, set(self.batches[0]), keep_used)
        session = make_session(part.model, threads=self.threads, for_calibration=True) if part.model else None
        mode = ""
        for number, feed in enumerate(self.batches):
            known: Feed = {**self._saved[number], **feed}
            outputs: list[np.ndarray] = []
            if session:
                what = f"sample {number + 1}"
                outputs = run(session, part.outputs, {name: known[name] for name in part.inputs}, what)
            known.update(zip(part.outputs, outputs, strict=True))
            del outputs
            mode = mode or self._mode(sum(known[name].nbytes for name in part.remembered))
            kept = {name: known[name] for name in part.remembered if mode != "nothing"}
            self._saved[number] = {name: _on_disk(array) for name, array in kept.items()} if mode == "disk" else kept
            yield {name: known[output] for name, output in part.names.items()}
        self._keys = {} if mode == "nothing" else {name: keys[name] for name in part.remembered}

    def _mode(self, first: int) -> str:
        """Where to remember values that take `first` bytes for the first sample: "memory", "disk" or "nothing"."""
        size = lambda feed: sum(array.nbytes for array in feed.values())  # noqa: E731
        total = first * sum(map(size, self.batches)) // max(1, size(self.batches[0]))
        if total <= self.budget:
            return "memory"
        if shutil.disk_usage(tempfile.gettempdir()).free > 2 * total:
            return "disk"
        logger.info("%d MB of hidden states fit neither memory nor disk: each part runs from the start", total >> 20)
        return "nothing"


def _on_disk(array: np.ndarray) -> np.ndarray:
    """The array in a temporary file that has no name and lives as long as what is returned."""
    if isinstance(array, np.memmap) or array.nbytes < _SMALL_BYTES:
        return array
    with tempfile.TemporaryFile(prefix="onnx-woq-") as file:
        array.tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


@dataclass(frozen=True)
class _Part:
    """What to run for a sample.

    Attributes:
        model: the nodes between `inputs` and `outputs`; None when there are none.
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
    values: Collection[str],
    later: Collection[str],
    kinds: dict[str, np.dtype],
    fed: set[str],
    keep_used: bool,
) -> _Part:
    """The smallest part that gives `values` from the model's inputs in `fed` and the remembered values in `kinds`."""
    structure = Structure(model)
    remembered = structure.crossing(values, later)
    exposed, names = model, {value: value for value in values}
    if not structure.named.keys() >= set(values):
        exposed, names = expose(model, values)
        structure = Structure(exposed)
    have = fed.union(kinds)
    outputs = tuple(dict.fromkeys(n for n in (*names.values(), *remembered) if n not in have))
    if not outputs:
        return _Part(None, (), (), names, tuple(n for n in remembered if n in kinds))
    cut = structure.between(have, outputs)
    inputs = tuple(value.name or "" for value in cut.inputs)
    for value in cut.inputs:
        if value.name in kinds:  # as it is, not as the exporter guessed
            value.type = ir.TensorType(ir.DataType.from_numpy(kinds[value.name]))
            value.shape = None
    whole = exposed.ir
    small = ir.Model(cut, ir_version=whole.ir_version, functions=tuple(whole.functions.values()))
    part = replace(exposed, ir=small)
    used = tuple(n for n in inputs if n in kinds and keep_used and n not in remembered)
    return _Part(part, inputs, outputs, names, (*(n for n in remembered if n not in fed), *used))
