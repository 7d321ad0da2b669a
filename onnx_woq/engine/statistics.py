"""Statistics of calibration data: collected for one plan, or once for all configurations of a tuning run.

They can be shared because the Gram matrix of an activation depends on neither bits nor group size nor method.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_woq.engine.plan import Plan, PlannedWeight, make_plan, prepare
from onnx_woq.engine.resources import Resources
from onnx_woq.graph.find.linears import LinearGroup, Sources
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats


def collect(
    plan: Plan,
    left: Sequence[PlannedWeight],
    batches: list[Feed],
    resources: Resources,
    states: Path | None = None,
) -> Iterator[tuple[LinearGroup, Stats | None]]:
    """Yields linear groups with their statistics, in graph order; the statistics are None if there are no samples.

    Args:
        plan: the plan. Its model is run as it is at the time of the call; under `true_sequential`, as it is by the time
            that each group is asked for.
        left: the linear groups to calibrate.
        batches: calibration samples.
        resources: tell how much memory this may take, and get its progress.
        states: a private folder for hidden states that a resumed run goes on from; None to keep none.
    """
    groups = [weight.source for weight in left if isinstance(weight.source, LinearGroup)]
    if not batches:
        return ((group, None) for group in groups)
    from onnx_woq.runtime.calibration.collect import Sequential, collect_statistics  # brings onnxruntime

    recipe = plan.recipe
    sequential: Sequential = "off"
    if recipe.true_sequential:
        sequential = "block" if recipe.sequential_unit == "block" else "tap"
    return collect_statistics(
        plan.model,
        groups,
        batches,
        memory_budget=resources.memory.window,
        sequential=sequential,
        progress=lambda done, total: resources.say("calibrate", done, total),
        checkpoint=states,
        asymmetric_calibration=recipe.asymmetric_calibration,
    )


def weights_by_sources(plans: Sequence[Plan]) -> dict[Sources, PlannedWeight]:
    """Returns the largest linear group for each of the statistics that plans of one model need, in graph order.

    Only their sources tell groups of several plans apart: one recipe may join linears that another one separates, and
    both groups are called after the same first linear.

    Args:
        plans: plans of the same model object.
    """
    largest: dict[Sources, PlannedWeight] = {}
    places: dict[Sources, ir.Node] = {}
    for plan in plans:
        for weight, group in zip(plan.groups, plan.linear_groups, strict=True):
            other = largest.setdefault(group.sources, weight)
            if (weight.n, weight.rank) >= (other.n, other.rank):
                largest[group.sources], places[group.sources] = weight, group.linears[0].node
    order = {node: number for number, node in enumerate(plans[0].model.ir.graph.all_nodes())} if plans else {}
    return {sources: largest[sources] for sources in sorted(largest, key=lambda one: order[places[one]])}


class SharedStatistics:
    """The statistics of every linear group of several recipes, collected in one calibration run.

    That run starts when the first of them is asked for, so a resumed tuning run with nothing left to do calibrates
    nothing. Gram matrices are kept in memory as long as they fit into the memory for calibration, and beyond that, or
    if the user has set a memory limit, in private temporary files, which the end of the `with` block removes.

    Args:
        source: the float model, which is not changed.
        recipes: the recipes; those that need no data or are sequential are left out.
        batches: calibration samples.
        resources: tell how much memory this may take, and get its progress.
    """

    def __init__(
        self,
        source: Model,
        recipes: list[Recipe],
        batches: list[Feed],
        resources: Resources,
    ) -> None:
        self.batches = batches
        self._source, self._resources = source, resources
        self._recipes = [r for r in recipes if r.needs_data and not r.true_sequential]
        self._stats: dict[tuple[str, ...], dict[Sources, Stats | Path]] = {}  # by `Plan.preparation`
        self._files = ExitStack()

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stats.clear()
        self._files.close()

    def of(
        self, plan: Plan, left: Sequence[PlannedWeight], states: Path | None = None
    ) -> Iterable[tuple[LinearGroup, Stats | None]]:
        """Yields linear groups of a plan with their statistics, None if its recipe needs no data.

        Under `true_sequential`, statistics depend on the weights replaced so far. They cannot be shared, so the plan is
        calibrated by itself.

        Args:
            plan: a plan of the same model, by one of the recipes.
            left: the linear groups that are asked for, in graph order.
            states: a private folder for hidden states that a resumed run goes on from; None to keep none.
        """
        if not plan.recipe.needs_data:
            return collect(plan, left, [], self._resources)
        if plan.recipe.true_sequential or not self.batches:
            return collect(plan, left, self.batches, self._resources, states)
        if plan.preparation not in self._stats:
            self._stats[plan.preparation] = self._collect(plan.preparation)
        stats = self._stats[plan.preparation]
        groups = [weight.source for weight in left if isinstance(weight.source, LinearGroup)]
        return ((group, _loaded(stats[group.sources])) for group in groups)

    def _collect(self, preparation: tuple[str, ...]) -> dict[Sources, Stats | Path]:
        """Returns the statistics of all linear groups of the recipes that prepare the model in the same way."""
        model = clone(self._source)
        plans = [plan for recipe in self._recipes if (plan := make_plan(model, recipe)).preparation == preparation]
        asked = weights_by_sources(plans)
        if plans[0].recipe.rotation:
            prepare(model, plans)
        collected: dict[Sources, Stats | Path] = {}
        held = 0
        for group, stats in collect(plans[0], [*asked.values()], self.batches, self._resources):
            if stats is not None:
                held += stats.gram.nbytes
                scarce = self._resources.scarce or held > self._resources.memory.window
                collected[group.sources] = self._spill(stats) if scarce else stats
        return collected

    def _spill(self, stats: Stats) -> Path:
        folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="onnx-woq-"))
        file = Path(folder) / "stats.npz"
        np.savez(
            file,
            gram=stats.gram,
            abs_mean=stats.abs_mean,
            abs_max=stats.abs_max,
            tokens=np.asarray(stats.tokens),
            mean=stats.mean,
            weight=np.asarray(stats.weight),
        )
        return file


def _loaded(stats: Stats | Path) -> Stats:
    if not isinstance(stats, Path):
        return stats

    from onnx_woq.core.stats import Stats

    with np.load(stats, allow_pickle=False) as file:
        sums = (file["gram"], file["abs_mean"], file["abs_max"], int(file["tokens"]))
        return Stats(*sums, file["mean"], float(file["weight"]))
