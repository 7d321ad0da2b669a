"""Solve taps, wherever an executor runs them: a task takes along what it needs and gives back what is to be stored.

An executor is anything with the protocol of `concurrent.futures.Executor`. Wherever a task runs, BLAS works with one
thread, so the numbers are the same bit for bit on cores of one kind. What an executor loses is solved again here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from onnx_woq.core.cpu import ParallelMap
from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.methods.rtn import PIECE
from onnx_woq.core.refine.asymmetric import asymmetric_target
from onnx_woq.core.refine.bias import correction
from onnx_woq.core.refine.low_rank import Factors, compensate
from onnx_woq.core.spec import Spec
from onnx_woq.core.stats import output_error
from onnx_woq.engine.executors import keep_blas_to_one_thread, pool_map, result_of, submitted, wait_for_any
from onnx_woq.errors import ModelError
from onnx_woq.graph.find.linears import LinearGroup, WeightSource
from onnx_woq.graph.rewrite.fold_scale import can_fold
from onnx_woq.recipe import Recipe
from onnx_woq.targets.matmulnbits import Packed, pack, packed_from, packed_shapes

if TYPE_CHECKING:
    from onnx_woq.core.grids.integer import QuantizedTensor
    from onnx_woq.core.stats import Stats

logger = logging.getLogger(__name__)

UNSCALED: Mapping[str, Mapping[str, Any]] = {
    "awq": {"enable_auto_scale": False},
    "teq": {"enable_auto_scale": False},
    "gptq": {"scaling": "none"},
}
"""What keeps a method from scaling the rows of a weight."""

ERROR_CHANNELS = 256
"""Output channels, evenly spread, on which the reported error of a tap is measured: on all of them it would take
several times as long as solving."""

PERCDAMP = 0.01
"""Damping of methods without an option for it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A tap to solve. Pickling it reads its weights, in the type they are stored in, and takes them along.

    Attributes:
        name: of the tap.
        method, options, spec: what to do.
        scale_dtype: name of the type scales are stored in.
        weights: the distinct weights of the tap, in order.
        stats: of their input; None where the method needs no data.
        rank: of the factors that make up for rounding; 0 for none.
        corrected: whether the mean of the outputs is put right.
        dense: see `Tap`.
        share: how far the weights are moved to what makes up for the errors of their inputs, see `core.target`.
        moved: it has come from another process, where nobody has limited BLAS.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...]
    spec: Spec
    scale_dtype: str
    weights: tuple[WeightSource, ...]
    stats: Stats | None
    rank: int = 0
    corrected: bool = False
    dense: bool = False
    share: float = 0.0
    moved: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        weights = tuple(replace(w, read=partial(_same, np.asarray(w.read()))) for w in self.weights)
        what = (self.name, self.method, self.options, self.spec, self.scale_dtype, weights, self.stats)
        return Task, (*what, self.rank, self.corrected, self.dense, self.share, True)


@dataclass(frozen=True)
class Solved:
    """What becomes of a tap.

    Attributes:
        packed: its distinct weights, in order.
        input_scale: float32 [K] that its input is to be divided by, or None.
        error: `‖X·ΔW‖² / ‖X·W‖²` on the calibration data, over at most `ERROR_CHANNELS` output channels and after all
            that is added; None without data.
        factors: that make up for rounding, [K, r] and for each weight [r, n]; empty at rank 0.
        bias: float32 [n] to be added to the output of each weight; empty where nothing is to be.
    """

    packed: tuple[Packed, ...]
    input_scale: np.ndarray | None = None
    error: float | None = None
    factors: tuple[Packed, ...] = ()
    bias: tuple[np.ndarray, ...] = ()


def task_of(recipe: Recipe, group: LinearGroup, stats: Stats | None) -> Task:
    """The task of solving `tap` as `recipe` says."""
    options = dict(recipe.options)
    if folding(recipe) and not can_fold(group):
        options |= UNSCALED[recipe.method]
    scale_dtype = np.dtype(group.scale_dtype).name
    what = (recipe.method, tuple(options.items()), group.spec, scale_dtype, tuple(group.weight_sources()), stats)
    share = recipe.asymmetric_strength if recipe.asymmetric_calibration else 0.0
    return Task(group.name, *what, group.rank, group.corrected, group.dense, share)


def solves_alike(one: Recipe, other: Recipe) -> bool:
    """Whether a tap that both choose becomes the same by both, given the same statistics and no override."""
    made_of = ("method", "spec", "options", "lowrank", "bias_correction", "rotation", "half_scales")
    return all(getattr(one, name) == getattr(other, name) for name in made_of)


def cache_key(recipe: Recipe, group: LinearGroup) -> tuple[object, ...] | None:
    """Equal for taps of one model that become the same; None where that depends on what has been put in before."""
    if recipe.true_sequential or folding(recipe):
        return None
    rotated = (recipe.rotation, recipe.rotation and recipe.embedding)
    added = (group.rank, group.corrected, group.scale_dtype, *rotated)
    return (
        recipe.method,
        *recipe.options.items(),
        group.spec,
        *added,
        group.sources,
        *(linear.name for linear in group.linears),
    )


def folding(recipe: Recipe) -> bool:
    """Whether an input scale that cannot be folded exactly is left out, rather than multiplied by in a new node."""
    return bool(recipe.options.get("folding", False))


def solve_task(task: Task, parallel_map: ParallelMap = map) -> Solved:
    """Solves a task. Where it has not been moved, the caller keeps BLAS to one thread (`one_blas_thread`).

    Args:
        task: to solve.
        each: how to go through what can be done side by side.

    Raises:
        ModelError: a weight is not finite or cannot be read.
        ValueError: something is to be added and there are no statistics.
    """
    if task.moved:
        keep_blas_to_one_thread()
    if task.stats is None and (task.rank or task.corrected):
        raise ValueError("low-rank compensation and bias correction need the statistics of the weight's inputs")
    return _alone(task, parallel_map) if task.stats is None else _together(task, task.stats, parallel_map)


def _alone(task: Task, parallel_map: ParallelMap) -> Solved:
    """Each weight by itself, as it is stored: nothing is widened or put side by side."""
    return Solved(tuple(_in_pieces(task, weight, parallel_map) for weight in task.weights))


def _in_pieces(task: Task, weight: WeightSource, parallel_map: ParallelMap) -> Packed:
    """A weight, a few of its output channels at a time: codes that are not packed yet, and mapped rows, are let go."""
    width = max(1, PIECE // max(1, weight.k))
    if weight.n <= width:
        return pack(_solved(task, weight.name, weight.read(), None, parallel_map), _type(task), dense=task.dense)
    shapes = packed_shapes(weight.k, weight.n, task.spec, _type(task), dense=task.dense)
    arrays = [np.empty(shape, dtype) for shape, dtype in shapes]

    computed = weight.read() if weight.computed else None

    def put(columns: slice) -> None:
        rows = weight.read() if computed is None else computed
        q = _solved(task, weight.name, rows[:, columns], None, map)
        for whole, part in zip(arrays, pack(q, _type(task), dense=task.dense).arrays, strict=True):
            whole[columns] = part

    for _ in parallel_map(put, [slice(c, c + width) for c in range(0, weight.n, width)]):
        pass
    return packed_from(arrays, weight.k, weight.n, task.spec, dense=task.dense)


def _together(task: Task, stats: Stats, parallel_map: ParallelMap) -> Solved:
    """All weights side by side, for they share their input, its statistics and its scale.

    Where a constant is going to take the mean of the error, all else is for what deviates from it.
    """
    original = _side_by_side(task)
    felt = stats.less_mean() if task.corrected else stats
    weight = original
    if task.share:
        percdamp = dict(task.options).get("percdamp", PERCDAMP)
        weight = asymmetric_target(original, felt, percdamp=percdamp, share=task.share)
    q = _solved(task, task.weights[0].name, weight, felt, parallel_map)
    factors = _factors(task, weight, q, felt) if task.rank else None
    packed, ups, bias, start = [], [], [], 0
    for part in task.weights:
        columns = slice(start, start + part.n)
        packed.append(pack(q.columns(columns), _type(task), dense=task.dense))
        if factors:
            ups.append(pack(factors.up.columns(columns), _type(task)))
        if task.corrected:
            part_factors = factors and factors.columns(columns)
            bias.append(_bias(original[:, columns], q.columns(columns), part_factors, stats))
        start += part.n
    error = _relative_error(weight, q, factors, felt, stats)
    down = (pack(factors.down, _type(task)),) if factors else ()
    return Solved(tuple(packed), q.input_scale, error, (*down, *ups), tuple(bias))


def _factors(task: Task, weight: np.ndarray, q: QuantizedTensor, stats: Stats) -> Factors:
    """What makes up for the error of `q`."""
    delta = q.effective()
    np.subtract(weight, delta, out=delta)
    return compensate(delta, stats.gram, task.rank, input_scale=q.input_scale, scale_dtype=_type(task))


def _bias(weight: np.ndarray, q: QuantizedTensor, factors: Factors | None, stats: Stats) -> np.ndarray:
    def error(columns: slice) -> np.ndarray:
        return weight[:, columns] - _acting(q, factors, columns)

    bias = correction(error, weight.shape[1], stats)
    if stats.float_mean is not None:  # the mean output is to be that of the float model, on its own inputs
        bias += ((stats.float_mean - stats.known_mean()) @ weight).astype(np.float32)
    return bias


def _acting(q: QuantizedTensor, factors: Factors | None, columns: slice) -> np.ndarray:
    """Columns of the weight [K, n] that acts on the original input in the end."""
    acting = q.columns(columns).effective()
    if factors:
        acting += factors.columns(columns).product()
    return acting


def _solved(
    task: Task, name: str, weight: np.ndarray, stats: Stats | None, parallel_map: ParallelMap
) -> QuantizedTensor:
    try:
        solve = METHODS[task.method].solve
        q: QuantizedTensor = solve(
            weight, stats, task.spec, scale_dtype=_type(task), parallel_map=parallel_map, **dict(task.options)
        )
        return q
    except FloatingPointError as error:
        raise not_finite(task, name) from error


def _side_by_side(task: Task) -> np.ndarray:
    """The weights as one float32 matrix `[K, n]`."""
    out = np.empty((task.weights[0].k, sum(weight.n for weight in task.weights)), np.float32)
    start = 0
    for weight in task.weights:
        columns = out[:, start : start + weight.n]
        columns[...] = weight.read()
        if not (np.isfinite(columns.min()) and np.isfinite(columns.max())):  # min and max pass NaN on
            raise not_finite(task, weight.name)
        start += weight.n
    return out


def _relative_error(
    weight: np.ndarray, q: QuantizedTensor, factors: Factors | None, felt: Stats, stats: Stats
) -> float:
    step = -(-weight.shape[1] // ERROR_CHANNELS)
    every = slice(None, None, step)
    sample = np.ascontiguousarray(weight[:, every])
    energy = output_error(sample, stats.gram)
    return output_error(_acting(q, factors, every) - sample, felt.gram) / energy if energy else 0.0


def not_finite(task: Task, weight: str) -> ModelError:
    """What to raise where a weight of a task holds NaN or infinite numbers."""
    return ModelError(
        f"weight {weight!r} of {task.name!r} has NaN or infinite values: export the model again, or exclude this node"
    )


def _type(task: Task) -> type[np.floating]:
    return np.float16 if task.scale_dtype == "float16" else np.float32


def _same(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class _Outcome:
    """A result, or what the solver raised: errors of the executor itself come as exceptions."""

    solved: Solved | None
    error: Exception | None


@dataclass
class _Job(Generic[T]):
    """A task on its way, kept for the case that it is lost."""

    item: T
    size: int
    task: Task | None
    future: Future[_Outcome]

    def is_done(self) -> bool:
        """Whether nothing runs for it any more; what a finished task was made of is let go."""
        if not self.future.done():
            return False
        if not self.future.cancelled() and self.future.exception() is None:
            self.task = None
        return True

    def result(self, executor: Executor) -> Solved:
        """Waits for the result, and solves the task here if the executor has lost it."""
        task = self.task
        try:
            outcome = result_of(self.future, executor)
        except Exception as error:
            if task is None:  # cannot be: it is let go only with a result
                raise
            logger.warning("the executor lost a task (%s: %s): it is solved here", type(error).__name__, error)
            outcome = _attempt(task)
        if outcome.solved is None:
            raise outcome.error or RuntimeError("a task came back empty")
        return outcome.solved


def solve_all(
    tasks: Iterable[tuple[T, int, Callable[[], Task | Solved]]],
    executor: Executor,
    *,
    workers: int,
    most_bytes: int,
    barrier_after: Callable[[T], bool] = lambda _: False,
    helping: bool = True,
) -> Iterator[tuple[T, Solved]]:
    """Solves tasks side by side and gives the results in order.

    A task is made only when there is room for it: never more than `workers` are being solved, together they never take
    more than `most_bytes` unless there is only one, and as many at most wait for their turn to be taken. A task that
    the executor loses (a killed worker, a broken pool) is solved again in this process, with the same result.

    Args:
        tasks: what each one is for, the bytes it takes, and how to make it; what is known already may be its result.
        executor: where they run.
        workers: at a time.
        most_bytes: at a time.
        settled_after: for which of them the next task is only asked for when all results have been taken.
        helping: threads with nothing to do take pieces of a task that is being solved, and memory for these.

    Raises:
        OnnxWoqError: what a solver raises, in the order of the tasks.
    """
    jobs: deque[_Job[T]] = deque()
    helpers = (pool_map(executor),) if helping and isinstance(executor, ThreadPoolExecutor) else ()
    try:
        for item, size, make in tasks:
            while running := [job for job in jobs if not job.is_done()]:
                if len(running) < workers and sum(job.size for job in running) + size <= most_bytes:
                    break
                if jobs[0].is_done():
                    job = jobs.popleft()
                    yield job.item, job.result(executor)
                else:
                    wait_for_any([job.future for job in running], executor)
            task = make()
            if isinstance(task, Solved):
                jobs.append(_Job(item, 0, None, _finished(task)))
            else:
                jobs.append(_Job(item, size, task, submitted(executor, _attempt, task, *helpers)))
            del task
            while jobs and (barrier_after(item) or jobs[0].is_done() or len(jobs) > 2 * workers):
                job = jobs.popleft()
                yield job.item, job.result(executor)
        while jobs:
            job = jobs.popleft()
            yield job.item, job.result(executor)
    finally:
        left = [job.future for job in jobs if not job.future.cancel()]
        if isinstance(executor, ThreadPoolExecutor):  # they read files that the caller may be about to remove
            wait(left)


def _attempt(task: Task, parallel_map: ParallelMap = map) -> _Outcome:
    try:
        return _Outcome(solve_task(task, parallel_map), None)
    except Exception as error:
        return _Outcome(None, error)


def _finished(solved: Solved) -> Future[_Outcome]:
    future: Future[_Outcome] = Future()
    future.set_result(_Outcome(solved, None))
    return future
