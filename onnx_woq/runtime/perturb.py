"""How far the outputs of a model move when one of its weights is replaced: one short run for each.

The model is run block by block (`onnx_woq.graph.blocks`), every variant a block behind the float one it has come from:
what lies before the replaced weight is computed once for all of them, and one block's weights are in use at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_woq.errors import DataError
from onnx_woq.graph.blocks import Block, cuts
from onnx_woq.graph.branches import conditions, take
from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.model import Model
from onnx_woq.graph.taps import Site, Tap
from onnx_woq.runtime.data import Feed
from onnx_woq.runtime.evaluate import divergence, is_language_model, mask_of
from onnx_woq.runtime.replay import cut_out
from onnx_woq.runtime.session import make_session, run, thread_count
from onnx_woq.runtime.structure import Structure
from onnx_woq.runtime.windows import prepacks

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

Replaced = Callable[[Tap], np.ndarray]
"""Gives the weight `[K, n]` to put in the place of `tap.weight()`."""

_CHUNK = 1 << 21  # logits worked on at once


def distances(
    model: Model,
    taps: Sequence[Tap],
    feeds: Sequence[Feed],
    replaced: Replaced,
    *,
    memory_budget: int = 1 << 30,
    progress: Progress | None = None,
) -> dict[str, float]:
    """By tap name, the distance of the outputs with the weights of that tap alone replaced from those of the model.

    Of a language model the mean KL divergence from it over tokens, nats; of any other the share of noise in its float
    outputs, `Σ (y − ŷ)² / Σ y²`. Computed in float32; tokens where a fed attention mask is 0 do not count.

    Args:
        model: left as it is.
        taps: of it.
        feeds: samples, every input of the model in each; few and short ones will do.
        replaced: gives the other weights of a tap; asked once, or again for a tap with sites in several blocks.
        memory_budget: bytes that hidden states of variants may take at once.
        progress: called after each block.

    Raises:
        DataError: there are no samples, or the model cannot be run on one of them, or gives no finite number.
        ModelError: it cannot be run at all.
    """
    if not feeds:
        raise DataError("measuring sensitivities needs at least one sample")
    feeds = [{name: _single(array) for name, array in feed.items()} for feed in feeds]
    flat = take(model, _taken(model, feeds))
    ruler = _Ruler(flat, feeds)
    tokens = sum(max((array.size for array in feed.values() if array.ndim > 1), default=1) for feed in feeds)
    at_once = max(1, memory_budget // (4 * tokens * max((tap.k for tap in taps), default=1)))
    groups = [taps[i : i + at_once] for i in range(0, len(taps), at_once)]
    totals: dict[str, float] = {}
    structure, cut = Structure(flat), cuts(flat)[0]
    blocks = [block for block in (cut.side, *cut.blocks) if block is not None and block.outputs]
    with ThreadPoolExecutor(thread_count()) as pool:
        for number, group in enumerate(groups):
            wave = _Wave(list(group), feeds, ruler, pool)
            for index, block in enumerate(blocks):
                stage = _stage(flat, structure, block, wave.known[0], prepacks(cut))
                wave.through(stage, {name for later in blocks[index + 1 :] for name in later.inputs}, replaced)
                if progress:
                    progress(number * len(blocks) + index + 1, len(groups) * len(blocks))
            totals |= wave.totals
    return {name: ruler.distance(total, name) for name, total in totals.items()}


@dataclass(frozen=True)
class _Stage:
    """A block as a model of its own; its `nodes` by the name of their first output, in bodies too."""

    part: Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: dict[str, ir.Node]
    prepack: bool


def _taken(model: Model, feeds: Sequence[Feed]) -> dict[str, bool]:
    """The branches that all samples take."""
    taken: dict[str, bool] = {}
    for name, condition in conditions(model).items():
        part, inputs = cut_out(model, Structure(model), set(feeds[0]), (condition,), {})
        session = make_session(part, for_calibration=True)
        answers = {
            bool(run(session, [condition], {n: feed[n] for n in inputs}, "the sample")[0].any()) for feed in feeds
        }
        if len(answers) == 1:
            taken[name] = answers.pop()
    return taken


def _stage(model: Model, structure: Structure, block: Block, known: Feed, prepack: bool) -> _Stage:
    """A block cut out for inputs of the types that `known` has."""
    have = {name for name in block.inputs if name in known}
    part, inputs = cut_out(model, structure, have, block.outputs, {name: known[name].dtype for name in have})
    nodes = {node.outputs[0].name or "": node for node in part.ir.graph.all_nodes()}
    return _Stage(part, inputs, block.outputs, nodes, prepack)


@dataclass
class _Wave:
    """The float model and its variants, all as far as the same block.

    Attributes:
        taps: whose weights are replaced, each in a variant of its own.
        known: values of the float model that are still read, per sample.
        moved: those of them that are others in a variant, by tap name and sample.
        totals: what `ruler` has summed up for each variant.
    """

    taps: list[Tap]
    feeds: Sequence[Feed]
    ruler: _Ruler
    pool: Executor
    known: list[Feed] = field(init=False)
    moved: dict[str, list[Feed]] = field(init=False)
    totals: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.known = [dict(feed) for feed in self.feeds]
        self.moved = {tap.name: [{} for _ in self.feeds] for tap in self.taps}
        self.totals = dict.fromkeys(self.moved, 0.0)

    def through(self, stage: _Stage, alive: set[str], replaced: Replaced) -> None:
        """Takes everything through one block; values that are not `alive` afterwards are let go."""
        plain = _session(stage)
        own = {}
        for tap in self.taps:
            here = [(site, columns) for site, columns in tap.slices() if site.name in stage.nodes]
            if here:
                own[tap.name] = _session(stage, _weights(stage, here, replaced(tap)))
        for number, feed in enumerate(self.feeds):
            made = self._made(plain, stage, number, None)
            yardstick = self.ruler.of({name: made[name] for name in stage.outputs if name in self.ruler.outputs}, feed)
            touched = [
                name
                for name, states in self.moved.items()
                if name in own or not states[number].keys().isdisjoint(stage.inputs)
            ]
            work = partial(self._variant, own, plain, stage, number, yardstick)
            for name, states, total in self.pool.map(work, touched):
                self.totals[name] += total
                self.moved[name][number] = {n: a for n, a in states.items() if n in alive}
            for each in self.moved.values():
                each[number] = {n: a for n, a in each[number].items() if n in alive}
            self.known[number] = {n: a for n, a in (self.known[number] | made).items() if n in alive}

    def _variant(
        self, own: dict[str, Any], plain: Any, stage: _Stage, number: int, yardstick: _Yardstick, name: str
    ) -> tuple[str, Feed, float]:
        made = self._made(own.get(name, plain), stage, number, name)
        return name, self.moved[name][number] | made, yardstick(made)

    def _made(self, session: Any, stage: _Stage, number: int, name: str | None) -> Feed:
        known = self.known[number] | (self.moved[name][number] if name else {})
        arrays = run(session, stage.outputs, {n: known[n] for n in stage.inputs}, f"sample {number + 1}")
        return dict(zip(stage.outputs, arrays, strict=True))


def _session(stage: _Stage, weights: Iterable[tuple[ir.Node, np.ndarray]] = ()) -> Any:
    """A session of a block, with other weights in some of its nodes; the block is left as it is."""
    graph, before = stage.part.ir.graph, []
    initializers = dict(graph.initializers)
    for node, array in weights:
        value = add_initializer(graph, f"{node.outputs[0].name}/replaced", np.ascontiguousarray(array, np.float32))
        before.append((node, node.inputs[1]))
        node.replace_input_with(1, value)
    for _, old in before:
        if old is not None and old.is_initializer() and not old.uses() and old.graph is graph:
            graph.initializers.pop(old.name or "", None)  # sessions refuse to be given what nothing reads
    try:
        return make_session(stage.part, threads=1, for_calibration=True, prepack=stage.prepack)
    finally:
        for node, old in before:
            node.replace_input_with(1, old)
        for name in [name for name in graph.initializers if name not in initializers]:
            graph.initializers.pop(name)
        for name in initializers.keys() - graph.initializers.keys():
            graph.register_initializer(initializers[name])


def _weights(
    stage: _Stage, sites: Sequence[tuple[Site, slice]], weight: np.ndarray
) -> list[tuple[ir.Node, np.ndarray]]:
    """The nodes of some sites with what each is to read: its columns, as the graph stores them."""
    found = []
    for site, columns in sites:
        array = weight[:, columns] / np.float32(site.scale) if site.scale != 1.0 else weight[:, columns]
        array = array.T if site.transposed() else array.reshape(site.constant().shape)
        found.append((stage.nodes[site.name], array))
    return found


_Yardstick = Callable[[Feed], float]
"""Gives what the outputs of a variant on one sample add to its distance, before it is divided."""


class _Ruler:
    """Measures outputs against those of the float model.

    Attributes:
        outputs: names of those that count.
        size: what sums are divided by: tokens, or the energy of the float outputs.
    """

    def __init__(self, model: Model, feeds: Sequence[Feed]) -> None:
        self.language = is_language_model(model, feeds[0])
        floats = [
            value.name or ""
            for value in model.ir.graph.outputs
            if value.dtype is None or value.dtype.is_floating_point()
        ]
        self.outputs = {"logits"} if self.language else set(floats)
        self.size = 0.0
        self._sized: set[tuple[int, str]] = set()

    def of(self, reference: Feed, feed: Feed) -> _Yardstick:
        """The yardstick of one sample, for the outputs in `reference`; what it counts is added to `size` once."""
        parts = {name: self._part(array, feed) for name, array in reference.items()}
        for name, array in reference.items():
            if (id(feed), name) not in self._sized:
                self._sized.add((id(feed), name))
                mask = mask_of(feed, array.shape[:2])
                self.size += float(mask.sum()) if self.language else float(np.square(array, dtype=np.float64).sum())
        return lambda made: sum(part(made[name]) for name, part in parts.items())

    def _part(self, reference: np.ndarray, feed: Feed) -> Callable[[np.ndarray], float]:
        if not self.language:
            return lambda array: float(np.square(array - reference, dtype=np.float64).sum())
        mask = mask_of(feed, reference.shape[:2])
        logits = reference[mask]
        shares = _softmax(logits)
        return lambda array: _divergence(logits, shares, array[mask])

    def distance(self, total: float, name: str) -> float:
        """What a sum comes to."""
        found = total / self.size if self.size else math.nan
        if not math.isfinite(found):
            raise DataError(f"the outputs are no finite numbers once the weight of {name!r} is rounded: exclude it")
        return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [T, V], in float32."""
    shares: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares


def _divergence(logits: np.ndarray, shares: np.ndarray, other: np.ndarray) -> float:
    """Sum over tokens of KL(p ‖ q), all arguments [T, V]; p are the `shares` that `logits` give.

    With d = other − logits, q = p·exp(d) / E_p[exp(d)], so the divergence is `log E_p[exp(d)] − E_p[d]`: a difference
    of small numbers where two log-softmaxes would be one of large ones, and so float32 will do.
    """
    total, step = 0.0, max(1, _CHUNK // logits.shape[-1])
    for rows in (slice(i, i + step) for i in range(0, len(logits), step)):
        with np.errstate(over="ignore", invalid="ignore"):
            d = other[rows] - logits[rows]
            d -= np.einsum("tv,tv->t", shares[rows], d)[:, None]
            np.exp(d, out=d)
            d -= 1
            found = np.log1p(np.einsum("tv,tv->t", shares[rows], d).astype(np.float64))
        if not np.isfinite(found).all():  # beyond what exp can hold
            found = divergence(logits[rows], other[rows])
        total += float(np.maximum(found, 0).sum())
    return total


def _single(array: np.ndarray) -> np.ndarray:
    """Half precision as float32; everything else as it is."""
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array
