"""Accumulation: runs one window over all samples and adds its activations to the statistics of the linear groups.

A *linear group* is the set of MatMul and Gemm nodes that read one activation, such as q/k/v; a *window* is the linear
groups collected together. The activations of a sample are added while the next sample runs, and are then dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from onnx_woq.core.cpu import one_blas_thread
from onnx_woq.core.stats import Stats
from onnx_woq.errors import DataError
from onnx_woq.graph.find.attention import FIRST_TOKEN
from onnx_woq.graph.find.linears import LinearGroup, Sources
from onnx_woq.graph.io.model import Model
from onnx_woq.runtime.calibration.replay import Replay
from onnx_woq.runtime.calibration.token_weights import token_weights
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.runtime.data.inputs import MASKS

logger = logging.getLogger(__name__)

FloatReplay = tuple[Replay, Model]
"""The float model and its samples, run in step with a partly quantized model."""


def collect_window(
    replay: Replay,
    model: Model,
    groups: list[LinearGroup],
    later: set[str],
    step: Callable[[], None],
    *,
    keep_used: bool = False,
    frozen: bool = False,
    block_inputs: Collection[str] = (),
    float_replay: FloatReplay | None = None,
) -> dict[LinearGroup, Stats]:
    """Collects the statistics of some linear groups over all samples.

    Args:
        replay: the samples.
        model: the model as it is now.
        groups: linear groups of it.
        later: names of the activations that later windows need.
        step: called after each sample.
        keep_used: see `Replay.run`.
        frozen: `model` is not edited any more.
        block_inputs: see `Replay.run`.
        float_replay: runs the float model in step, to collect its inputs together with those of `model`.

    Returns:
        Statistics by linear group, since groups of several plans may share a name; those with the same sources share
        one object.

    Raises:
        DataError: the model cannot be run on a sample, or computes NaN or infinite numbers.
        ModelError: the model cannot be run at all, or a weight is not finite.
    """
    stats = {group.sources: Stats.empty(group.k) for group in groups}
    values = [
        value
        for value in dict.fromkeys(v for group in groups for v in sorted(group.reads))
        if value not in replay.absent
    ]
    attention = _visible_attention(model, stats)
    values = [value for value in values if value in attention or not _only_weights(value, stats)]
    running: list[Future[None]] = []
    with one_blas_thread():
        parts = replay.run(
            model, values, later, keep_used=keep_used, frozen=frozen, block_inputs=block_inputs, attention=attention
        )
        activations = [v for v in values if v not in attention]
        exact = _float_values(float_replay, activations, later, replay.batches, keep_used)
        for number, (arrays, floats) in enumerate(zip(parts, exact, strict=True)):
            _wait(running, groups)
            mask = _padding_mask(replay.batches[number])
            running = [
                replay.pool.submit(
                    partial(_add_sample, one, _needed(arrays, sources), sources, mask, number, _needed(floats, sources))
                )
                for sources, one in stats.items()
            ]
            del arrays, floats
            step()
        _wait(running, groups)
    for sources, one in stats.items():
        if not one.tokens:
            names = ", ".join(name for name, _ in sources)
            logger.warning("no sample reaches %s: there is nothing to calibrate it on", names)
    return {group: stats[group.sources] for group in groups}


def _float_values(
    float_replay: FloatReplay | None, values: list[str], later: set[str], batches: Sequence[Feed], keep_used: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Yields for each sample the values of the float model by name; empty dictionaries if it does not run."""
    if float_replay is None:
        return iter([{} for _ in batches])
    replay, model = float_replay
    return replay.run(model, values, later, keep_used=keep_used, frozen=True)


def _visible_attention(model: Model, sources: Iterable[Sources]) -> set[str]:
    """Returns the names of attention probabilities that can be fetched: those outside bodies, such as If branches."""
    wanted = {name for source in sources for _, name in source if name not in ("", FIRST_TOKEN)}
    if not wanted:
        return wanted
    visible = wanted.intersection(value.name or "" for node in model.ir.graph for value in node.outputs)
    if hidden := sorted(wanted - visible):
        logger.warning("attention %s is inside a body and cannot be looked at: its tokens count alike", hidden[0])
    return visible


def _only_weights(value: str, sources: Iterable[Sources]) -> bool:
    """Tells whether a value only weights tokens and is itself no activation of a linear group."""
    return not any(value == name for source in sources for name, _ in source)


def _needed(arrays: dict[str, np.ndarray], sources: Sources) -> dict[str, np.ndarray]:
    """Returns the arrays that a linear group with these sources needs."""
    return {name: arrays[name] for source in sources for name in source if name in arrays}


def _add_sample(
    stats: Stats,
    arrays: dict[str, np.ndarray],
    sources: Sources,
    mask: np.ndarray | None,
    number: int,
    floats: dict[str, np.ndarray],
) -> None:
    """Adds the activations of one sample to the statistics of one linear group.

    Args:
        stats: the statistics.
        arrays: activations `[..., K]` and attention, by name.
        sources: sources of the linear group.
        mask: [B, T], True for tokens that count; None for all.
        number: number of the sample, from 0.
        floats: activations of the float model, by name; empty if it does not run.

    Raises:
        DataError: an activation does not have the channels of its weight, or another shape in the float model.
        _NotFiniteError: an activation is NaN or infinite.
    """
    for name, attention in sources:
        array, exact = arrays.get(name), floats.get(name)
        if array is None:
            continue
        if exact is not None and exact.shape != array.shape:
            raise DataError(
                f"{name!r} has another shape in the float model, {exact.shape}, than in the quantized one, "
                f"{array.shape} (sample {number + 1}): leave out asymmetric_calibration"
            )
        if array.shape[-1:] != stats.abs_max.shape:
            raise DataError(
                f"{name!r} has the shape {array.shape} (sample {number + 1}), and its weight has {len(stats.abs_max)} "
                "input channels: the model cannot be run on such data, give samples of another shape"
            )
        exact = None if exact is None else _unpadded(exact, mask)
        try:
            weights = None
            if attention == FIRST_TOKEN or attention in arrays:
                weights = _unpadded(token_weights(array, arrays.get(attention), mask), mask)
            stats.update(_unpadded(array, mask), weights, exact)
        except FloatingPointError as error:
            raise _NotFiniteError(f"{error} (value {name!r}, sample {number + 1})") from error


def _wait(running: list[Future[None]], groups: list[LinearGroup]) -> None:
    """Waits for all futures; raises the error of the first that failed.

    If an activation was not finite because a weight is not, the error names the weight.
    """
    for future in running:
        future.exception()
    for future in running:
        try:
            future.result()
        except _NotFiniteError as error:
            for group in groups:
                group.weight()  # raises if it is not finite
            raise DataError(f"{error}: leave out that sample, or find out what the float model gives for it") from error


class _NotFiniteError(Exception):
    """An activation is NaN or infinite."""


def _padding_mask(feed: Feed) -> np.ndarray | None:
    """Returns the attention mask `[B, T]` of a sample as booleans; None if it counts all tokens."""
    mask = next((feed[name] for name in MASKS if name in feed and feed[name].ndim == 2), None)
    return None if mask is None or np.all(mask != 0) else mask != 0


def _unpadded(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the tokens of `[B, T, K]` or `[B·T, K]` that the mask counts; other shapes as they are."""
    if mask is None:
        return array
    if array.ndim == 3 and array.shape[:2] == mask.shape:
        return array[mask]
    return array[mask.reshape(-1)] if array.ndim <= 2 and len(array) == mask.size else array
