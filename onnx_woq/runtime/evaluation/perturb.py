"""How far the outputs of a model move when one of its weights is replaced: one short run for each.

The model is run block by block (`onnx_woq.graph.find.blocks`), every variant a block behind the float one it has come from:
what lies before the replaced weight is computed once for all of them, and one block's weights are in use at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_woq.errors import DataError
from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.find.blocks import Block, cuts
from onnx_woq.graph.find.constants import resolve
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model
from onnx_woq.graph.rewrite.inline_branch import find_conditions, inline_branches
from onnx_woq.runtime.calibration.replay import cut_out
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.calibration.windows import prepacks, token_count
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.evaluation.metrics import divergence, is_language_model, mask_of
from onnx_woq.runtime.session import make_session, run, thread_count

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

Replaced = Mapping[str, tuple[int, np.ndarray]]
"""By first output of a node, which of its inputs is replaced and by what."""

_CHUNK = 1 << 21  # logits worked on at once


@dataclass(frozen=True)
class Variant:
    """A model with other constants in some of its nodes.

    Attributes:
        name: unique.
        nodes: first outputs of these nodes.
        replaced: makes the constants; asked once, or again where the nodes lie in several blocks.
    """

    name: str
    nodes: tuple[str, ...]
    replaced: Callable[[], Replaced]


def tap_variant(group: LinearGroup, weight: Callable[[LinearGroup], np.ndarray]) -> Variant:
    """The model with `weight(tap)`, [K, n], in the place of `tap.weight()`."""

    def replaced() -> Replaced:
        whole = weight(group)
        found = {}
        for linear, columns in group.slices():
            array = whole[:, columns] / np.float32(linear.scale) if linear.scale != 1.0 else whole[:, columns]
            found[linear.name] = 1, array.T if linear.transposed() else array.reshape(linear.constant().shape)
        return found

    return Variant(group.name, tuple(linear.name for linear in group.linears), replaced)


def table_variant(table: Embedding, weight: Callable[[Embedding], np.ndarray]) -> Variant:
    """The model with `weight(table)`, [k, n], in the place of a table [n, k]."""
    nodes = tuple(node.outputs[0].name or "" for node in table.nodes)
    return Variant(table.name, nodes, lambda: {name: (0, rows) for rows in [weight(table).T] for name in nodes})


def distances(
    model: Model,
    variants: Sequence[Variant],
    feeds: Sequence[Feed],
    *,
    memory_budget: int = 1 << 30,
    progress: Progress | None = None,
) -> dict[str, float]:
    """By the variants' names, the distance of the outputs of each from those of the model.

    Of a language model the mean KL divergence from it over tokens, nats; of any other the share of noise in its float
    outputs, `Σ (y − ŷ)² / Σ y²`. Computed in float32; tokens where a fed attention mask is 0 do not count.

    Args:
        model: left as it is.
        variants: of it.
        feeds: samples, every input of the model in each; few and short ones will do.
        memory_budget: bytes that hidden states of variants may take at once.
        progress: called after each block.

    Raises:
        DataError: there are no samples, or the model cannot be run on one of them, or gives no finite number.
        ModelError: it cannot be run at all.
    """
    if not feeds:
        raise DataError("measuring sensitivities needs at least one sample")
    feeds = [{name: _single(array) for name, array in feed.items()} for feed in feeds]
    flat = inline_branches(model, _taken(model, feeds))
    ruler = _Ruler(flat, feeds)
    totals: dict[str, float] = {}
    structure, cut = Structure(flat), cuts(flat)[0]
    at_once = max(1, memory_budget // (sum(map(token_count, feeds)) * _widest(structure)))
    groups = [variants[i : i + at_once] for i in range(0, len(variants), at_once)]
    blocks = [block for block in (cut.side, *cut.blocks) if block is not None and block.outputs]
    with ThreadPoolExecutor(thread_count()) as pool:
        for number, group in enumerate(groups):
            wave = _Wave(list(group), feeds, ruler, pool)
            for index, block in enumerate(blocks):
                stage = _stage(flat, structure, block, wave.known[0], prepacks(cut))
                wave.through(stage, {name for later in blocks[index + 1 :] for name in later.inputs})
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
    for name, condition in find_conditions(model).items():
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
        variants: under way.
        known: values of the float model that are still read, per sample.
        moved: those of them that are others in a variant, by its name and sample.
        totals: what `ruler` has summed up for each variant.
    """

    variants: list[Variant]
    feeds: Sequence[Feed]
    ruler: _Ruler
    pool: Executor
    known: list[Feed] = field(init=False)
    moved: dict[str, list[Feed]] = field(init=False)
    totals: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.known = [dict(feed) for feed in self.feeds]
        self.moved = {variant.name: [{} for _ in self.feeds] for variant in self.variants}
        self.totals = dict.fromkeys(self.moved, 0.0)

    def through(self, stage: _Stage, alive: set[str]) -> None:
        """Takes everything through one block; values that are not `alive` afterwards are let go."""
        plain = _session(stage)
        own = {}
        for variant in self.variants:
            if not stage.nodes.keys().isdisjoint(variant.nodes):
                own[variant.name] = _session(stage, variant.replaced())
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
            for parallel_map in self.moved.values():
                parallel_map[number] = {n: a for n, a in parallel_map[number].items() if n in alive}
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


def _session(stage: _Stage, replaced: Replaced | None = None) -> Any:
    """A session of a block, with other constants in some of its nodes; the block is left as it is."""
    graph, before = stage.part.ir.graph, []
    initializers = dict(graph.initializers)
    for name, (index, array) in (replaced or {}).items():
        if node := stage.nodes.get(name):
            value = add_initializer(graph, f"{name}/replaced", np.ascontiguousarray(array, np.float32))
            before.append((node, index, node.inputs[index]))
            node.replace_input_with(index, value)
    for _, _, old in before:
        if old is not None and old.is_initializer() and not old.uses() and old.graph is graph:
            graph.initializers.pop(old.name or "", None)  # sessions refuse to be given what nothing reads
    try:
        return make_session(stage.part, threads=1, for_calibration=True, prepack=stage.prepack)
    finally:
        for node, index, old in before:
            node.replace_input_with(index, old)
        for name in [name for name in graph.initializers if name not in initializers]:
            graph.initializers.pop(name)
        for name in initializers.keys() - graph.initializers.keys():
            graph.register_initializer(initializers[name])


def _widest(structure: Structure) -> int:
    """Bytes of float32 that a token's hidden state takes: of the widest matrix's inputs."""
    shapes = [
        constant.shape
        for node in structure.graph.all_nodes()
        if node.op_type in ("MatMul", "Gemm")
        for constant in map(resolve, node.inputs)
        if constant and len(constant.shape) > 1
    ]
    return 4 * max((min(shape[-2:]) for shape in shapes), default=1)


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
            raise DataError(f"the outputs are no finite numbers once the weight of {name!r} is another one: exclude it")
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
