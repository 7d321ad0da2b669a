"""What each unit of a mix loses by each way of storing it: local losses from the statistics, a short run for the rest.

A unit is a tap. The loss of a choice c for unit l is predicted as `α_l · L_l(c)`: L is the squared error of the tap's
output, `Σ ΔW ∘ (H·ΔW)`, which needs no data beyond the Gram matrix H; α says what that does to the model's outputs, and
is measured once, by rounding that unit alone (`onnx_woq.runtime.perturb`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq import journal
from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.grid import QuantizedTensor
from onnx_woq.core.methods import METHODS, needs_data, rtn
from onnx_woq.core.stats import output_error
from onnx_woq.executors import keep_blas_to_one_thread, result_of, submitted
from onnx_woq.graph.lower.lowrank import tap_bytes
from onnx_woq.graph.model import Model
from onnx_woq.graph.taps import Tap
from onnx_woq.making import Feed
from onnx_woq.pipeline import prepared
from onnx_woq.recipe import Recipe, Spec
from onnx_woq.solving import Task, not_finite, task_of
from onnx_woq.trials import Run

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats
    from onnx_woq.shared_statistics import SharedStatistics

logger = logging.getLogger(__name__)

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)

COLUMNS = 256
"""Output channels, evenly spread, on which local losses are measured: columns are independent of each other."""

ROUNDED = 8
"""Bits from which on local losses are those of rounding to nearest."""

NOISE = Spec(3, 32, symmetric=False)
"""What a unit is rounded to, to nearest, to see what its errors do to the outputs."""

PROBES, PROBE_TOKENS = 3, 96
"""Calibration samples that this is seen on, and how much of each: its first tokens, where it has tokens."""


@dataclass(frozen=True)
class Sensitivity:
    """What is known of one unit.

    Attributes:
        tap: the unit, with the spec that the recipe gives it.
        specs: the ways to quantize it.
        losses: `‖X·ΔW‖²` of each on the calibration data, estimated from `COLUMNS` of the output channels.
        alpha: nats per token, or share of noise in the outputs, per unit of loss.
    """

    tap: Tap
    specs: tuple[Spec, ...]
    losses: tuple[float, ...]
    alpha: float


def specs_for(tap: Tap, recipe: Recipe) -> tuple[Spec, ...]:
    """The ways a mix may quantize a tap; the recipe's own alone where an override has named it.

    Left out is what another one is no larger than and no worse: more bits for the same groups (3 bits where they are
    stored as 4), or smaller groups for the same bits (where the last group of 128 is padded).
    """
    if _named(tap, recipe):
        return (tap.spec,)
    every = [Spec(bits, group, symmetric) for group in GROUPS for bits in BITS for symmetric in (False, True)]
    size = {spec: tap_bytes(replace(tap, spec=spec)) for spec in every}

    def needless(spec: Spec) -> bool:
        return any(
            other != spec
            and other.symmetric == spec.symmetric
            and other.bits >= spec.bits
            and other.group_size <= spec.group_size
            and size[other] <= size[spec]
            for other in every
        )

    return tuple(spec for spec in every if not needless(spec))


def sensitivities(run: Run, recipe: Recipe, shared: SharedStatistics, batches: Sequence[Feed]) -> list[Sensitivity]:
    """What there is to know of each tap that `recipe` quantizes in the float model, in graph order.

    What the journal of the run has is not measured again.

    Args:
        run: tells model, journal and means.
        recipe: method and options are those of the mix.
        shared: statistics of these taps.
        batches: calibration samples, of which some are looked at.
    """
    model, taps = prepared(run.source, recipe)
    keys = {tap.name: _key(run, recipe, tap) for tap in taps}
    known = journal.read(run.journal)
    missing = [tap for tap in taps if keys[tap.name] not in known]
    if missing:
        losses = dict(_losses(run, recipe, shared, missing))
        moved = _distances(run, model, missing, batches)
        for tap in missing:
            found, noise = losses[tap.name]
            alpha = moved[tap.name] / noise if noise else 0.0
            entry = {"key": keys[tap.name], "losses": found, "alpha": alpha}
            journal.append(run.journal, entry)
            known[keys[tap.name]] = entry
    return [
        Sensitivity(tap, specs_for(tap, recipe), tuple(known[key]["losses"]), known[key]["alpha"])
        for tap, key in ((tap, keys[tap.name]) for tap in taps)
    ]


def statistics_recipe(recipe: Recipe) -> Recipe:
    """A recipe whose statistics are those that losses are measured with: of the float model, for any method."""
    if not needs_data(recipe):
        recipe = replace(recipe, method="gptq", options={})
    return replace(recipe, true_sequential=False, both_streams=False)


def unit_losses(task: Task, specs: Sequence[Spec]) -> tuple[list[float], float]:
    """What a tap loses by each of `specs`, solved on a sample of its columns; and what by rounding it to `NOISE`.

    Specs of `ROUNDED` bits and more are rounded to nearest: what they lose is next to nothing either way. The
    statistics of the task are those of its input; where they are empty every loss is 0.

    Raises:
        ModelError: a weight is not finite or cannot be read.
    """
    if task.moved:
        keep_blas_to_one_thread()
    if task.stats is None:
        raise ValueError(f"{task.name!r}: local losses need statistics")
    weight, share = _sampled(task)
    stats, solve, options = task.stats.keeping(), METHODS[task.method].solve, dict(task.options)
    scale_dtype = np.float16 if task.scale_dtype == "float16" else np.float32

    def loss(q: QuantizedTensor) -> float:
        return output_error(q.effective() - weight, stats.gram) * share

    def solved(spec: Spec) -> QuantizedTensor:
        if spec.bits < ROUNDED:
            return solve(weight, stats, spec, scale_dtype=scale_dtype, **options)
        full_range = bool(options.get("enable_full_range", False))
        return rtn.solve(weight, None, spec, scale_dtype=scale_dtype, enable_full_range=full_range)

    if not stats.gram.diagonal().any():
        return [0.0] * len(specs), 0.0
    try:
        found = [loss(solved(spec)) for spec in specs]
        return found, loss(rtn.solve(weight, None, NOISE, scale_dtype=scale_dtype))
    except FloatingPointError as error:
        raise not_finite(task, task.weights[0].name) from error


def _losses(
    run: Run, recipe: Recipe, shared: SharedStatistics, taps: list[Tap]
) -> Iterator[tuple[str, tuple[list[float], float]]]:
    """The losses of each tap, several taps at a time."""
    means, collecting = run.means, statistics_recipe(recipe)
    running: deque[tuple[str, Task, tuple[Spec, ...], Future[tuple[list[float], float]]]] = deque()
    start, done = time.process_time(), 0

    def finished() -> tuple[str, tuple[list[float], float]]:
        name, task, specs, future = running.popleft()
        try:
            return name, result_of(future, means.executor)
        except Exception as error:
            logger.info("the losses of %s are measured here (%s: %s)", name, type(error).__name__, error)
            return name, unit_losses(task, specs)

    with one_blas_thread():
        for tap, stats in _calibrated(run, shared, collecting, taps):
            task = task_of(recipe, tap, stats)
            specs = specs_for(tap, recipe)
            while len(running) >= means.memory.workers:
                yield finished()
                done += 1
                run.say("losses", done, len(taps))
            running.append((tap.name, task, specs, submitted(means.executor, unit_losses, task, specs)))
        while running:
            yield finished()
            done += 1
            run.say("losses", done, len(taps))
    logger.info("losses of %d units: %.1f s of CPU", len(taps), time.process_time() - start)


def _calibrated(
    run: Run, shared: SharedStatistics, recipe: Recipe, taps: list[Tap]
) -> Iterable[tuple[Tap, Stats | None]]:
    start = time.process_time()
    found = shared.of(run.source, recipe, taps)
    logger.info("calibration: %.1f s of CPU", time.process_time() - start)
    return found


def _distances(run: Run, model: Model, taps: Sequence[Tap], batches: Sequence[Feed]) -> dict[str, float]:
    from onnx_woq.runtime.perturb import distances

    start = time.process_time()
    step = max(1, len(batches) // PROBES)
    probes = [shortened(feed, PROBE_TOKENS) for feed in batches[::step][:PROBES]]
    found = distances(
        model,
        taps,
        probes,
        _noisy,
        memory_budget=run.means.memory.window,
        progress=lambda done, total: run.say("sensitivities", done, total),
    )
    logger.info("sensitivities of %d units: %.1f s of CPU", len(taps), time.process_time() - start)
    return found


def _noisy(tap: Tap) -> np.ndarray:
    """The weights [K, n] of a tap rounded to `NOISE`."""
    return rtn.solve(tap.weight(), None, NOISE, scale_dtype=tap.scale_dtype).dequantize()


def shortened(feed: Feed, tokens: int) -> Feed:
    """The first tokens of a sample with `input_ids [B, T]`: of every input `[B, T, …]`; another sample as it is."""
    ids = feed.get("input_ids")
    if ids is None or ids.ndim != 2:
        return feed
    cut = {name: array[:, :tokens] for name, array in feed.items() if array.shape[:2] == ids.shape}
    return feed | {name: np.ascontiguousarray(array) for name, array in cut.items()}


def _sampled(task: Task) -> tuple[np.ndarray, float]:
    """Some columns of a task's weights, float32 [K, at most COLUMNS]; and how many times as many there are."""
    n = sum(part.n for part in task.weights)
    step = -(-n // COLUMNS)
    columns, start = [], 0
    for part in task.weights:
        columns.append(np.asarray(part.read()[:, -start % step :: step], np.float32))
        start += part.n
    weight = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return weight, n / weight.shape[1]


def _named(tap: Tap, recipe: Recipe) -> bool:
    """Whether an override of the recipe finds a site of the tap."""
    names = [name for site in tap.sites for name in (site.node_name, site.name, site.weight_name) if name]
    return any(re.search(expression, name) for expression in recipe.overrides for name in names)


def _key(run: Run, recipe: Recipe, tap: Tap) -> str:
    """What the journal knows the sensitivity of a tap by: everything that it follows from."""
    collecting = statistics_recipe(recipe)
    follows: list[object] = [recipe.method, dict(recipe.options), collecting.to_dict(), str(specs_for(tap, recipe))]
    follows += [COLUMNS, str(NOISE), PROBES, PROBE_TOKENS, [site.name for site in tap.sites]]
    digest = hashlib.blake2b(json.dumps(follows, sort_keys=True, default=list).encode(), digest_size=8).hexdigest()
    return f"{run.key}/sensitivity/{digest}/{tap.name}"
