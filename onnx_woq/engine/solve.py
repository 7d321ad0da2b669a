"""Solving of one weight: a `Task` carries all that it takes to any executor, and comes back as a `Solved`, packed.

Wherever a task runs, BLAS uses one thread, so the numbers are the same bit for bit on processors of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.grids.scale_range import in_unit, large_unit
from onnx_woq.core.methods.registry import solve
from onnx_woq.core.methods.rtn import PIECE
from onnx_woq.core.refine.asymmetric import asymmetric_target
from onnx_woq.core.refine.bias import correction
from onnx_woq.core.refine.low_rank import Factors, compensate
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from onnx_woq.engine.executors import keep_blas_to_one_thread
from onnx_woq.engine.plan import Plan, PlannedWeight
from onnx_woq.errors import ModelError
from onnx_woq.graph.find.embeddings import Embedding
from onnx_woq.graph.find.linears import LinearGroup, WeightSource
from onnx_woq.graph.rewrite.fold_scale import can_fold
from onnx_woq.recipe import Recipe
from onnx_woq.targets.base import EmbeddingOperator, LinearOperator, Packed, Storage
from onnx_woq.targets.registry import operator_of

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor
    from onnx_woq.core.stats import Stats

UNSCALED: Mapping[str, Mapping[str, Any]] = {
    "awq": {"enable_auto_scale": False},
    "teq": {"enable_auto_scale": False},
    "gptq": {"scaling": "none"},
}
"""The options that keep each method from searching for an input scale."""

ERROR_CHANNELS = 256
"""The most output channels, evenly spread, that the reported error of a weight is measured on: on all of them it would
take several times as long as solving."""

PERCDAMP = 0.01
"""The damping of asymmetric calibration under methods that have no option for it."""

_TABLE_METHOD = "rtn"


@dataclass(frozen=True)
class Task:
    """A weight to solve. Pickling a task reads its float weights, in the type they are stored in, and takes them along.

    Attributes:
        name: the name of the weight.
        method: the name of the method.
        options: names and values of the method's options.
        spec: the number format.
        kind: "linear" or "embedding".
        target: the name of the target that the solution is packed for.
        storage: see `PlannedWeight`.
        weights: the distinct float weights, in order.
        stats: the statistics of their input; None if the recipe needs no data.
        rank: the rank of the low-rank factors; 0 for none.
        corrected: True if a bias is to correct the mean of the outputs.
        share: the strength of asymmetric calibration, up to 1; 0 for none (see `core.refine.asymmetric`).
        moved: True if the task came from another process, so that BLAS is not limited to one thread yet.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...]
    spec: Spec
    kind: str
    target: str
    storage: Storage
    weights: tuple[WeightSource, ...]
    stats: Stats | None
    rank: int = 0
    corrected: bool = False
    share: float = 0.0
    moved: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        weights = tuple(replace(w, read=partial(_same, np.asarray(w.read()))) for w in self.weights)
        fields = (self.name, self.method, self.options, self.spec, self.kind, self.target, self.storage, weights)
        return Task, (*fields, self.stats, self.rank, self.corrected, self.share, True)

    @property
    def operator(self) -> LinearOperator | EmbeddingOperator:
        """Returns the operator that packs the solution."""
        return operator_of(self.target, self.kind)


@dataclass(frozen=True)
class Solved:
    """The solution of a weight.

    Attributes:
        packed: the distinct weights, in order.
        input_scale: float32 `[K]` that the input is to be divided by; None for none.
        error: `‖X·ΔW‖² / ‖X·W‖²` on the calibration data, over at most `ERROR_CHANNELS` output channels, low-rank
            factors included; None without data.
        factors: the low-rank factors, `[K, r]` and then `[r, n]` for each weight; empty at rank 0.
        bias: float32 `[n]` for each weight, to be added to its output; empty without bias correction.
    """

    packed: tuple[Packed, ...]
    input_scale: np.ndarray | None = None
    error: float | None = None
    factors: tuple[Packed, ...] = ()
    bias: tuple[np.ndarray, ...] = ()


def task_of(recipe: Recipe, weight: PlannedWeight, stats: Stats | None) -> Task:
    """Returns the task of solving a weight as a recipe says.

    A table is rounded to nearest whatever the method, since its rows are looked up and not multiplied: with the
    recipe's options under RTN, with a clip search under any other method.

    Args:
        recipe: the recipe.
        weight: the weight.
        stats: the statistics of its input; None for a table, or if the recipe needs no data.
    """
    method, options, share = recipe.method, dict(recipe.options), 0.0
    if isinstance(weight.source, Embedding):
        method = _TABLE_METHOD
        if recipe.method != method:
            kept = {name: value for name, value in options.items() if name == "enable_full_range"}
            options = {"enable_mse_search": True} | kept
    else:
        if folding(recipe) and not can_fold(weight.source):
            options |= UNSCALED[method]
        share = recipe.asymmetric_strength if recipe.asymmetric_calibration else 0.0
    return Task(
        name=weight.name,
        method=method,
        options=tuple(options.items()),
        spec=weight.spec,
        kind=weight.kind,
        target=weight.target,
        storage=weight.storage,
        weights=tuple(weight.weight_sources()),
        stats=stats,
        rank=weight.rank,
        corrected=weight.corrected,
        share=share,
    )


def solves_alike(one: Recipe, other: Recipe) -> bool:
    """Tells whether two recipes solve a weight alike, if its statistics are equal and no override names it."""
    made_of = ("method", "spec", "options", "lowrank", "bias_correction", "rotation", "half_scales", "target")
    return all(getattr(one, name) == getattr(other, name) for name in made_of)


def cache_key(plan: Plan, weight: PlannedWeight) -> tuple[object, ...] | None:
    """Returns a key that is equal for weights of one model that plans solve alike, given the same data.

    It is None if the solution depends on the weights that were replaced before, and for tables, which are solved fast.
    """
    recipe = plan.recipe
    if recipe.true_sequential or folding(recipe) or not isinstance(weight.source, LinearGroup):
        return None
    stored = (weight.target, weight.storage, weight.rank, weight.corrected, plan.preparation)
    read = (weight.source.sources, *(linear.name for linear in weight.source.linears))
    return (recipe.method, *recipe.options.items(), weight.spec, *stored, *read)


def folding(recipe: Recipe) -> bool:
    """Tells whether a recipe uses an input scale only where it can be folded into the nodes in front of the input."""
    return bool(recipe.options.get("folding", False))


def solve_task(task: Task, parallel_map: ParallelMap = map) -> Solved:
    """Solves a task; in the process that made it, the caller keeps BLAS to one thread (`one_blas_thread`).

    Args:
        task: the task.
        parallel_map: a `map` that may run pieces of the task side by side.

    Raises:
        ModelError: a weight is not finite or cannot be read.
        ValueError: low-rank factors or a bias are asked for, and there are no statistics.
    """
    if task.moved:
        keep_blas_to_one_thread()
    if task.stats is None and (task.rank or task.corrected):
        raise ValueError("low-rank compensation and bias correction need the statistics of the weight's inputs")
    return _alone(task, parallel_map) if task.stats is None else _together(task, task.stats, parallel_map)


def _alone(task: Task, parallel_map: ParallelMap) -> Solved:
    """Solves each weight by itself, without statistics, in the type that it is stored in."""
    return Solved(tuple(_in_pieces(task, weight, parallel_map) for weight in task.weights))


def _in_pieces(task: Task, weight: WeightSource, parallel_map: ParallelMap) -> Packed:
    """Solves a weight a few output channels at a time, so that memory holds little of it unpacked."""
    width = max(1, PIECE // max(1, weight.k))
    if weight.n <= width or not task.operator.BY_CHANNEL or task.spec.group_dim == 0:
        q = _solved(task, weight.name, weight.read(), None, parallel_map)
        return task.operator.pack(q, task.storage)
    shapes = task.operator.shapes(weight.k, weight.n, task.spec, task.storage)
    arrays = [np.empty(shape, dtype) for shape, dtype in shapes]

    computed = weight.read() if weight.computed else None  # read once: each read would compute the whole weight

    def put(columns: slice) -> None:
        rows = weight.read() if computed is None else computed
        q = _solved(task, weight.name, rows[:, columns], None, map)
        for whole, part in zip(arrays, task.operator.pack(q, task.storage).arrays, strict=True):
            whole[columns] = part

    for _ in parallel_map(put, [slice(c, c + width) for c in range(0, weight.n, width)]):
        pass
    return task.operator.packed_from(arrays, weight.k, weight.n, task.spec, task.storage)


def _together(task: Task, stats: Stats, parallel_map: ParallelMap) -> Solved:
    """Solves all weights side by side as one matrix, since they share their input, its statistics and its scale.

    If a bias will correct the mean of the outputs, everything else is solved for the inputs less their mean.
    """
    original, unit = _side_by_side(task)
    felt = stats.less_mean() if task.corrected else stats
    weight = original
    if task.share:
        percdamp = dict(task.options).get("percdamp", PERCDAMP)
        weight = asymmetric_target(original, felt, percdamp=percdamp, share=task.share)
    q = _solved(task, task.weights[0].name, weight, felt, parallel_map)
    factors = _factors(task, weight, q, felt) if task.rank else None
    packed, ups, bias, start = [], [], [], 0
    for one in task.weights:
        columns = slice(start, start + one.n)
        packed.append(_packed(task, q.columns(columns), unit))
        if factors:
            ups.append(_packed(task, factors.up.columns(columns), unit))
        if task.corrected:
            own_factors = factors and factors.columns(columns)
            bias.append(np.ldexp(_bias(original[:, columns], q.columns(columns), own_factors, stats), unit))
        start += one.n
    error = _relative_error(weight, q, factors, felt, stats)
    down = (task.operator.pack(factors.down, task.storage),) if factors else ()
    return Solved(tuple(packed), q.input_scale, error, (*down, *ups), tuple(bias))


def _packed(task: Task, q: QuantizedTensor, unit: int) -> Packed:
    return task.operator.pack(in_unit(q, unit, task.storage.scale_dtype), task.storage)


def _factors(task: Task, weight: np.ndarray, q: QuantizedTensor, stats: Stats) -> Factors:
    """Returns the low-rank factors that make up for the error of a quantized weight `[K, n]`."""
    delta = q.effective()
    np.subtract(weight, delta, out=delta)
    return compensate(delta, stats.gram, task.rank, input_scale=q.input_scale, scale_dtype=task.storage.scale_dtype)


def _bias(weight: np.ndarray, q: QuantizedTensor, factors: Factors | None, stats: Stats) -> np.ndarray:
    def error(columns: slice) -> np.ndarray:
        return weight[:, columns] - _acting(q, factors, columns)

    bias = correction(error, weight.shape[1], stats)
    if stats.float_mean is not None:  # asymmetric calibration: the mean is to be that of the float model, on its inputs
        bias += ((stats.float_mean - stats.known_mean()) @ weight).astype(np.float32)
    return bias


def _acting(q: QuantizedTensor, factors: Factors | None, columns: slice) -> np.ndarray:
    """Returns columns of the weight `[K, n]` that acts on the unscaled input in the end, low-rank factors included."""
    acting = q.columns(columns).effective()
    if factors:
        acting += factors.columns(columns).product()
    return acting


def _solved(
    task: Task, name: str, weight: np.ndarray, stats: Stats | None, parallel_map: ParallelMap
) -> QuantizedTensor:
    arguments = {"scale_dtype": task.storage.scale_dtype, "parallel_map": parallel_map, **dict(task.options)}
    try:
        return solve(task.method, weight, stats, task.spec, **arguments)
    except FloatingPointError as error:
        raise not_finite(task, name) from error


def _side_by_side(task: Task) -> tuple[np.ndarray, int]:
    """Returns the weights as one float32 matrix `[K, n]`, and the exponent of the power of two it is a multiple of.

    That is 0 unless squares of the weights would leave float32.
    """
    out = np.empty((task.weights[0].k, sum(weight.n for weight in task.weights)), np.float32)
    start, largest = 0, 0.0
    for weight in task.weights:
        columns = out[:, start : start + weight.n]
        columns[...] = weight.read()
        low, high = float(columns.min()), float(columns.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # min and max of numbers with a NaN are NaN
            raise not_finite(task, weight.name)
        largest = max(largest, -low, high)
        start += weight.n
    if unit := large_unit(largest):
        np.ldexp(out, -unit, out=out)
    return out, unit


def _relative_error(
    weight: np.ndarray, q: QuantizedTensor, factors: Factors | None, felt: Stats, stats: Stats
) -> float:
    step = -(-weight.shape[1] // ERROR_CHANNELS)
    every = slice(None, None, step)
    sample = np.ascontiguousarray(weight[:, every])
    energy = output_error(sample, stats.gram)
    return output_error(_acting(q, factors, every) - sample, felt.gram) / energy if energy else 0.0


def not_finite(task: Task, weight: str) -> ModelError:
    """Returns the error to raise for a weight of a task that has NaN or infinite values."""
    return ModelError(
        f"weight {weight!r} of {task.name!r} has NaN or infinite values: export the model again, or exclude this node"
    )


def _same(array: np.ndarray) -> np.ndarray:
    return array
