"""Perturbations: how far the outputs of a model move when one of its weights is replaced.

A *variant* is the model with other constants in some of its nodes. The float model and its variants run together, block
by block (`graph.find.blocks`). A variant starts from the hidden states of the float model in front of its first changed
block. So everything before the replaced weight is computed once for all variants, and only the weights of one block are
in use at a time.
"""

from __future__ import annotations

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
from onnx_woq.runtime.calibration.parts import cut_out, single_precision
from onnx_woq.runtime.calibration.structure import Structure
from onnx_woq.runtime.calibration.windows import prepacks, token_count
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.evaluation.output_distance import Measure, OutputDistance
from onnx_woq.runtime.session import make_session, run, thread_count

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

Replaced = Mapping[str, tuple[int, np.ndarray]]
"""First output of a node -> number of the input to replace, and the array that replaces it."""


@dataclass(frozen=True)
class Variant:
    """A model with other constants in some of its nodes.

    Attributes:
        name: its unique name.
        nodes: first outputs of the changed nodes.
        replaced: returns the new constants; called once for each block that holds some of the nodes.
    """

    name: str
    nodes: tuple[str, ...]
    replaced: Callable[[], Replaced]


def group_variant(group: LinearGroup, weight: Callable[[LinearGroup], np.ndarray]) -> Variant:
    """Returns the variant with `weight(group) [K, n]` in the place of `group.weight()`.

    Args:
        group: a linear group, the MatMul and Gemm nodes that read one activation.
        weight: returns the new weights of all its nodes, side by side.
    """

    def replaced() -> Replaced:
        whole = weight(group)
        found = {}
        for linear, columns in group.slices():
            array = whole[:, columns] / np.float32(linear.scale) if linear.scale != 1.0 else whole[:, columns]
            found[linear.name] = 1, array.T if linear.transposed() else array.reshape(linear.constant().shape)
        return found

    return Variant(group.name, tuple(linear.name for linear in group.linears), replaced)


def table_variant(table: Embedding, weight: Callable[[Embedding], np.ndarray]) -> Variant:
    """Returns the variant with the transpose of `weight(table) [k, n]` in the place of an embedding table [n, k]."""
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
    """Returns the distance of the outputs of each variant from those of the model, by the name of the variant.

    For a language model that is the mean KL divergence over tokens, in nats. For any other model it is the share of
    noise in the float outputs, `Σ (y − ŷ)² / Σ y²`. Everything is computed in float32. Tokens where a fed attention
    mask is 0 do not count.

    Args:
        model: the float model; not changed.
        variants: variants of it.
        feeds: samples with every input of the model; a few short ones are enough.
        memory_budget: bytes that hidden states of variants may take at once.
        progress: called after each block.

    Raises:
        DataError: there are no samples, the model cannot be run on one, or a distance is not finite.
        ModelError: the model cannot be run at all.
    """
    if not feeds:
        raise DataError("measuring sensitivities needs at least one sample")
    feeds = [{name: single_precision(array) for name, array in feed.items()} for feed in feeds]
    flat = inline_branches(model, _branches_taken(model, feeds))
    output_distance = OutputDistance(flat, feeds)
    totals: dict[str, float] = {}
    structure, cut = Structure(flat), cuts(flat)[0]
    at_once = max(1, memory_budget // (sum(map(token_count, feeds)) * _hidden_bytes(structure)))
    groups = [variants[i : i + at_once] for i in range(0, len(variants), at_once)]
    blocks = [block for block in (cut.side, *cut.blocks) if block is not None and block.outputs]
    with ThreadPoolExecutor(thread_count()) as pool:
        for number, group in enumerate(groups):
            variant_run = _VariantRun(list(group), feeds, output_distance, pool)
            for index, block in enumerate(blocks):
                block_model = _cut_block(flat, structure, block, variant_run.known[0], prepacks(cut))
                variant_run.run_block(block_model, {name for later in blocks[index + 1 :] for name in later.inputs})
                if progress:
                    progress(number * len(blocks) + index + 1, len(groups) * len(blocks))
            totals |= variant_run.totals
    return {name: output_distance.distance(total, name) for name, total in totals.items()}


@dataclass(frozen=True)
class _BlockModel:
    """A block cut out as a model of its own.

    Attributes:
        part: that model.
        inputs: names of its inputs.
        outputs: names of its outputs.
        nodes: its nodes by their first outputs, those in bodies (such as If branches) too.
        prepack: as for `make_session`.
    """

    part: Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: dict[str, ir.Node]
    prepack: bool


def _branches_taken(model: Model, feeds: Sequence[Feed]) -> dict[str, bool]:
    """Returns the branches of If nodes that all samples take, see `graph.rewrite.inline_branch.inline_branches`."""
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


def _cut_block(model: Model, structure: Structure, block: Block, known: Feed, prepack: bool) -> _BlockModel:
    """Cuts out a block for inputs of the types that the values in `known` have."""
    have = {name for name in block.inputs if name in known}
    part, inputs = cut_out(model, structure, have, block.outputs, {name: known[name].dtype for name in have})
    nodes = {node.outputs[0].name or "": node for node in part.ir.graph.all_nodes()}
    return _BlockModel(part, inputs, block.outputs, nodes, prepack)


@dataclass
class _VariantRun:
    """A run of the float model and some variants through all blocks, each block for all of them at once.

    Attributes:
        variants: the variants.
        feeds: the samples.
        output_distance: measures their outputs.
        pool: where variants are run side by side.
        known: values of the float model that later blocks still read, per sample.
        changed: those among them that differ in a variant, by its name and per sample.
        totals: the sum of the measured distances of each variant.
    """

    variants: list[Variant]
    feeds: Sequence[Feed]
    output_distance: OutputDistance
    pool: Executor
    known: list[Feed] = field(init=False)
    changed: dict[str, list[Feed]] = field(init=False)
    totals: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.known = [dict(feed) for feed in self.feeds]
        self.changed = {variant.name: [{} for _ in self.feeds] for variant in self.variants}
        self.totals = dict.fromkeys(self.changed, 0.0)

    def run_block(self, block: _BlockModel, alive: set[str]) -> None:
        """Runs one block for the float model and all variants; keeps only values that are `alive` afterwards."""
        plain = _session(block)
        own_sessions = {}
        for variant in self.variants:
            if not block.nodes.keys().isdisjoint(variant.nodes):
                own_sessions[variant.name] = _session(block, variant.replaced())
        for number, feed in enumerate(self.feeds):
            computed = self._run(plain, block, number, None)
            reference = {name: computed[name] for name in block.outputs if name in self.output_distance.outputs}
            measure = self.output_distance.measure(reference, feed)
            touched = [
                name
                for name, states in self.changed.items()
                if name in own_sessions or not states[number].keys().isdisjoint(block.inputs)
            ]
            work = partial(self._run_variant, own_sessions, plain, block, number, measure)
            for name, states, total in self.pool.map(work, touched):
                self.totals[name] += total
                self.changed[name][number] = {n: a for n, a in states.items() if n in alive}
            for per_sample in self.changed.values():
                per_sample[number] = {n: a for n, a in per_sample[number].items() if n in alive}
            self.known[number] = {n: a for n, a in (self.known[number] | computed).items() if n in alive}

    def _run_variant(
        self, own_sessions: dict[str, Any], plain: Any, block: _BlockModel, number: int, measure: Measure, name: str
    ) -> tuple[str, Feed, float]:
        """Runs a block for one variant and sample; returns its name, its changed values and the measured distance."""
        computed = self._run(own_sessions.get(name, plain), block, number, name)
        return name, self.changed[name][number] | computed, measure(computed)

    def _run(self, session: Any, block: _BlockModel, number: int, name: str | None) -> Feed:
        """Runs a block on one sample, with the changed values of the variant `name` if one is given."""
        known = self.known[number] | (self.changed[name][number] if name else {})
        arrays = run(session, block.outputs, {n: known[n] for n in block.inputs}, f"sample {number + 1}")
        return dict(zip(block.outputs, arrays, strict=True))


def _session(block: _BlockModel, replaced: Replaced | None = None) -> Any:
    """Makes a session of a block, with other constants in some of its nodes; the block itself stays as it is."""
    graph, before = block.part.ir.graph, []
    initializers = dict(graph.initializers)
    for name, (index, array) in (replaced or {}).items():
        if node := block.nodes.get(name):
            value = add_initializer(graph, f"{name}/replaced", np.ascontiguousarray(array, np.float32))
            before.append((node, index, node.inputs[index]))
            node.replace_input_with(index, value)
    for _, _, old in before:
        if old is not None and old.is_initializer() and not old.uses() and old.graph is graph:
            graph.initializers.pop(old.name or "", None)  # sessions refuse constants that nothing reads
    try:
        return make_session(block.part, threads=1, for_calibration=True, prepack=block.prepack)
    finally:
        for node, index, old in before:
            node.replace_input_with(index, old)
        for name in [name for name in graph.initializers if name not in initializers]:
            graph.initializers.pop(name)
        for name in initializers.keys() - graph.initializers.keys():
            graph.register_initializer(initializers[name])


def _hidden_bytes(structure: Structure) -> int:
    """Estimates the bytes of a token's hidden state in float32: as wide as the smaller side of the largest matrix."""
    shapes = [
        constant.shape
        for node in structure.graph.all_nodes()
        if node.op_type in ("MatMul", "Gemm")
        for constant in map(resolve, node.inputs)
        if constant and len(constant.shape) > 1
    ]
    return 4 * max((min(shape[-2:]) for shape in shapes), default=1)
