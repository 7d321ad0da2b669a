"""Sensitivities: the loss of each layer of a mix by each way of storing it.

The loss of a choice c for layer l is predicted as `α_l · L_l(c)`: L is the squared error of the linear group's output,
`Σ ΔW ∘ (H·ΔW)`, which needs no data beyond the Gram matrix H; α says what that does to the model's outputs, and is
measured once, by rounding that layer alone (`onnx_woq.runtime.evaluation.perturb`). Rows of a table are looked up, not
multiplied: there H is the identity. A tied head adds up both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.grids.integer import QuantizedTensor
from onnx_woq.core.methods import rtn
from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from onnx_woq.engine.executors import keep_blas_to_one_thread, result_of, submitted
from onnx_woq.engine.plan import PlannedWeight, prepared_plan
from onnx_woq.engine.solve import Task, not_finite, task_of
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.tuning import journal
from onnx_woq.tuning.mixed.layers import MixedLayer, bytes_on
from onnx_woq.tuning.trials import Run

if TYPE_CHECKING:
    from onnx_woq.engine.statistics import SharedStatistics

logger = logging.getLogger(__name__)

COLUMNS = 256
"""Output channels, evenly spread, on which local losses are measured: columns are independent of each other."""

FINE = 4
"""Bits up to which local losses are measured; each more halves the step, and makes a quarter of the loss.

On SmolLM2 with GPTQ, 5 bits lose .235 to .265 of what 4 do, 6 lose .057 to .068, and 8 .0035 to .0043.
"""

POLISH = ("descent_passes",)
"""Options left out in local losses: what takes a few percent off every choice and costs as much as all the rest."""

NOISE = Spec(3, 32, symmetric=False)
"""The grid that a layer is rounded to, to nearest, to see what its errors do to the outputs."""

PROBES, PROBE_TOKENS = 3, 96
"""Calibration samples that this is seen on, and how much of each: its first tokens, where it has tokens."""


@dataclass(frozen=True)
class Losses:
    """Local losses of one layer.

    Attributes:
        group: `‖X·ΔW‖²` of each choice on the calibration data, estimated from `COLUMNS` of the output channels.
        group_noise: that of rounding to `NOISE`.
        table: `‖ΔW‖²` of each choice, of a table and of the codes that a linear group would share with it.
        table_noise: that of rounding to `NOISE`.
    """

    group: tuple[float, ...] = ()
    group_noise: float = 0.0
    table: tuple[float, ...] = ()
    table_noise: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Gives them as journals have them, with the keys of the first version."""
        group = {"tap": self.group, "tap_noise": self.group_noise}
        return group | {"table": self.table, "table_noise": self.table_noise}


def measured(
    run: Run, recipe: Recipe, layers: Sequence[MixedLayer], shared: SharedStatistics, batches: Sequence[Feed]
) -> list[MixedLayer]:
    """Measures what each choice of each layer is predicted to lose.

    A layer of which nothing is known (no sample reaches it, or no output that counts depends on it) keeps the grid of
    the recipe: rounding it as coarsely as possible would be a guess. What the journal of the run has is not measured
    again.

    Args:
        run: tells model, journal and means.
        recipe: method and options are those of the mix.
        layers: found by it in the float model.
        shared: statistics of their linear groups.
        batches: calibration samples, of which some are looked at.
    """
    keys = {layer.name: _key(run, recipe, layer) for layer in layers}
    known = journal.read(run.journal)
    missing = [layer for layer in layers if not _is_whole(known.get(keys[layer.name], {}), layer)]
    if missing:
        losses = dict(_losses(run, recipe, shared, missing))
        moved = _distances(run, recipe, missing, batches)
        for layer in missing:
            found, (group, table) = losses[layer.name], moved[layer.name]
            entry = {
                "key": keys[layer.name],
                "losses": found.to_dict(),
                "alpha": group / found.group_noise if found.group_noise else 0.0,
                "table_alpha": table / found.table_noise if found.table_noise else 0.0,
            }
            journal.append(run.journal, entry)
            known[keys[layer.name]] = entry
    return [_with_losses(layer, known[keys[layer.name]]) for layer in layers]


def _is_whole(entry: Mapping[str, Any], layer: MixedLayer) -> bool:
    """Tells whether a journal entry has a loss for each choice of a layer, so that it need not be measured again."""
    choices = sum(spec is not None for spec in layer.specs)
    try:
        numbers = [entry["alpha"], entry["table_alpha"]]
        for name, there in (("tap", layer.group), ("table", layer.table)):
            losses = entry["losses"][name]
            if len(losses) != (choices if there else 0):
                return False
            numbers += losses
        return all(math.isfinite(number) for number in numbers)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _with_losses(layer: MixedLayer, entry: Mapping[str, Any]) -> MixedLayer:
    specs = [spec for spec in layer.specs if spec is not None]
    losses, alpha, table_alpha = entry["losses"], entry["alpha"], entry["table_alpha"]
    predicted = np.zeros(len(specs))
    if losses["tap"]:
        predicted += alpha * np.array(losses["tap"])
    if losses["table"]:
        predicted += table_alpha * np.array(losses["table"])
    main = alpha if layer.group is not None else table_alpha
    if layer.settled or (main > 0 and predicted.any()):
        return replace(layer, losses=(*predicted.tolist(), *[0.0] * (len(layer.specs) - len(specs))), alpha=main)
    spec = layer.main.spec
    size = bytes_on(layer.group, layer.table, spec)
    return replace(layer, specs=(spec,), stored=(size,), written=(size,), losses=(0.0,), alpha=main)


def statistics_recipe(recipe: Recipe) -> Recipe:
    """Returns a recipe whose statistics losses are measured with: those of the float model, for any method."""
    if not recipe.needs_data:
        recipe = replace(recipe, method="gptq", options={})
    return replace(recipe, true_sequential=False, asymmetric_calibration=False)


def layer_losses(task: Task, specs: Sequence[Spec], *, shares: bool = False) -> Losses:
    """Measures what a layer loses by each of `specs`, on a sample of its columns; and by rounding it to `NOISE`.

    What more than `FINE` bits lose follows from what those do. The statistics of the task are those of its input; where
    they are empty every loss is 0. A task without statistics is a table's.

    Args:
        task: of the linear group or of the table.
        specs: its choices.
        shares: a table takes the codes of this linear group.

    Raises:
        ModelError: a weight is not finite or cannot be read.
    """
    if task.moved:
        keep_blas_to_one_thread()
    weight, share = _sampled(task)
    stats, solve = task.stats and task.stats.keeping(), METHODS[task.method].solve
    options = {name: value for name, value in task.options if name not in POLISH}
    scale_dtype = task.storage.scale_dtype

    def loss(q: QuantizedTensor) -> tuple[float, float]:
        delta = q.effective() - weight
        local = 0.0 if stats is None else output_error(delta, stats.gram) * share
        return local, float(np.square(delta, dtype=np.float64).sum()) * share

    def solved(spec: Spec) -> QuantizedTensor:
        if stats is None or stats.gram.diagonal().any():
            return solve(weight, stats, spec, scale_dtype=scale_dtype, **options)
        full_range = bool(options.get("enable_full_range", False))
        return rtn.solve(weight, None, spec, scale_dtype=scale_dtype, enable_full_range=full_range)

    try:
        coarse = [replace(spec, bits=min(spec.bits, FINE)) for spec in specs]
        measured = {spec: loss(solved(spec)) for spec in dict.fromkeys(coarse)}
        finer = [4.0 ** (least.bits - spec.bits) for least, spec in zip(coarse, specs, strict=True)]
        pairs = [(measured[spec][0] * part, measured[spec][1] * part) for spec, part in zip(coarse, finer, strict=True)]
        local, plain = loss(rtn.solve(weight, None, NOISE, scale_dtype=scale_dtype))
    except FloatingPointError as error:
        raise not_finite(task, task.weights[0].name) from error
    table = (tuple(pair[1] for pair in pairs), plain) if shares or stats is None else ((), 0.0)
    return Losses(tuple(pair[0] for pair in pairs) if stats else (), local, *table)


def _losses(
    run: Run, recipe: Recipe, shared: SharedStatistics, layers: list[MixedLayer]
) -> Iterator[tuple[str, Losses]]:
    """Measures the losses of each layer, several at a time."""
    resources, start = run.resources, time.process_time()
    running: deque[tuple[str, Callable[[], Losses], Future[Losses]]] = deque()
    done = 0

    def finished() -> tuple[str, Losses]:
        nonlocal done
        name, work, future = running.popleft()
        try:
            found = result_of(future, resources.executor)
        except Exception as error:
            logger.info("the losses of %s are measured here (%s: %s)", name, type(error).__name__, error)
            found = work()
        done += 1
        run.say("losses", done, len(layers))
        return name, found

    with one_blas_thread():
        for layer, task in _tasks(run, recipe, shared, layers):
            specs = tuple(spec for spec in layer.specs if spec is not None)
            work = partial(layer_losses, task, specs, shares=layer.table is not None)
            while len(running) >= resources.memory.workers:
                yield finished()
            running.append((layer.name, work, submitted(resources.executor, work)))
        while running:
            yield finished()
    logger.info("losses of %d layers: %.1f s of CPU", len(layers), time.process_time() - start)


def _tasks(
    run: Run, recipe: Recipe, shared: SharedStatistics, layers: list[MixedLayer]
) -> Iterator[tuple[MixedLayer, Task]]:
    """Gives the layers with the tasks of solving them: groups with their statistics, and then tables."""
    start = time.process_time()
    plan = prepared_plan(run.source, recipe)
    weights = {weight.name: weight for weight in (*plan.groups, *plan.embeddings)}
    by_group = {layer.group.name: layer for layer in layers if layer.group}
    left = [weights[name] for name in by_group]
    collected = shared.of(replace(plan, recipe=statistics_recipe(recipe)), left)
    logger.info("calibration: %.1f s of CPU", time.process_time() - start)
    for group, stats in collected:
        yield by_group[group.name], task_of(recipe, weights[group.name], stats)
    for layer in layers:
        if layer.group is None:
            yield layer, task_of(recipe, weights[layer.name], None)


def _distances(
    run: Run, recipe: Recipe, layers: Sequence[MixedLayer], batches: Sequence[Feed]
) -> dict[str, tuple[float, float]]:
    """Returns how far each layer moves the outputs once its group, and once its table, is rounded to `NOISE`."""
    from onnx_woq.runtime.evaluation.perturb import distances, group_variant, table_variant

    start = time.process_time()
    plan = prepared_plan(run.source, recipe)
    groups = {group.name: (weight, group) for weight, group in zip(plan.groups, plan.linear_groups, strict=True)}
    tables = {one.name: (one, one.source) for one in plan.embeddings if isinstance(one.source, Embedding)}
    step = max(1, len(batches) // PROBES)
    variants = []
    for layer in layers:
        if layer.group:
            weight, group = groups[layer.group.name]
            variants.append(group_variant(group, partial(_noisy, weight)))
    for layer in layers:
        if layer.table:
            weight, table = tables[layer.table.name]
            variants.append(table_variant(table, partial(_noisy, weight)))
    found = distances(
        plan.model,
        variants,
        [shortened(feed, PROBE_TOKENS) for feed in batches[::step][:PROBES]],
        memory_budget=run.resources.memory.window,
        progress=lambda done, total: run.say("sensitivities", done, total),
    )
    logger.info("sensitivities of %d layers: %.1f s of CPU", len(layers), time.process_time() - start)
    of = lambda weight: found[weight.name] if weight else 0.0  # noqa: E731
    return {layer.name: (of(layer.group), of(layer.table)) for layer in layers}


def _noisy(weight: PlannedWeight, source: LinearGroup | Embedding) -> np.ndarray:
    """Returns a weight `[K, N]` rounded to `NOISE`."""
    if isinstance(source, LinearGroup):
        array = source.weight()
    else:
        [part] = source.weight_sources()
        array = np.asarray(part.read(), np.float32)
    return rtn.solve(array, None, NOISE, scale_dtype=weight.storage.scale_dtype).dequantize()


def shortened(feed: Feed, tokens: int) -> Feed:
    """Returns the first tokens of a sample with `input_ids [B, T]`, of every input `[B, T, …]`; others as they are."""
    ids = feed.get("input_ids")
    if ids is None or ids.ndim != 2:
        return feed
    cut = {name: array[:, :tokens] for name, array in feed.items() if array.shape[:2] == ids.shape}
    return feed | {name: np.ascontiguousarray(array) for name, array in cut.items()}


def _sampled(task: Task) -> tuple[np.ndarray, float]:
    """Returns some columns of a task's weights, float32 [K, at most COLUMNS], and how many times as many there are."""
    n = sum(part.n for part in task.weights)
    step = -(-n // COLUMNS)
    columns, start = [], 0
    for part in task.weights:
        columns.append(np.asarray(part.read()[:, -start % step :: step], np.float32))
        start += part.n
    weight = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return weight, n / weight.shape[1]


def _key(run: Run, recipe: Recipe, layer: MixedLayer) -> str:
    """Returns the journal's key of the sensitivity of a layer: everything that it follows from."""
    collecting = statistics_recipe(recipe)
    follows: list[object] = [recipe.method, dict(recipe.options), collecting.to_dict(), str(layer.specs)]
    follows += [COLUMNS, FINE, str(NOISE), PROBES, PROBE_TOKENS, layer.names]
    digest = hashlib.blake2b(json.dumps(follows, sort_keys=True, default=list).encode(), digest_size=8).hexdigest()
    return f"{run.key}/sensitivity/{digest}/{layer.name}"
