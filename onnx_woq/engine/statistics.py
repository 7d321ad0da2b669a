"""One calibration for all configurations: a Gram matrix depends on neither bits nor group size nor method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.engine.plan import Plan, PlannedWeight, make_plan, prepare
from onnx_woq.engine.resources import Resources
from onnx_woq.graph.find.linears import LinearGroup
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats


Sources = tuple[tuple[str, str], ...]
"""The activations that the statistics of a linear group are taken of, each with what weights its tokens."""


def collect(
    plan: Plan,
    left: Sequence[PlannedWeight],
    batches: list[Feed],
    resources: Resources,
    states: Path | None = None,
) -> Iterator[tuple[LinearGroup, Stats | None]]:
    """Gives each linear group that is left with its statistics, in graph order; without data these are None.

    Args:
        plan: its model is taken as it is at the time of the call, unless the recipe is sequential.
        left: linear groups of the plan.
        batches: calibration samples.
        resources: memory, and whom to tell.
        states: a private folder for hidden states that a later run can go on from.
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


class SharedStatistics:
    """Statistics of every linear group of every recipe, collected once, when the first is asked for.

    A resumed run with nothing left to do therefore calibrates nothing. Gram matrices beyond what calibration may take,
    and all of them where memory is limited, live in private temporary files, removed at the end of the `with` block.
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
        self._stats: dict[tuple[str, ...], dict[Sources, Stats | Path]] = {}  # by what is done to the model first
        self._files = ExitStack()

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stats.clear()
        self._files.close()

    def of(
        self, plan: Plan, left: Sequence[PlannedWeight], states: Path | None = None
    ) -> Iterable[tuple[LinearGroup, Stats | None]]:
        """Gives each of some linear groups of a plan with its statistics; None where the method needs none.

        `true_sequential` needs those of the model as quantized so far, so it calibrates for itself.

        Args:
            plan: of the same source.
            left: its linear groups that are asked for, in graph order.
            states: a private folder for hidden states that a later run can go on from.
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
        """Collects the statistics of every group of every recipe that prepares the model in one way."""
        model = clone(self._source)
        plans = [plan for recipe in self._recipes if (plan := make_plan(model, recipe)).preparation == preparation]
        first: dict[Sources, PlannedWeight] = {}
        for plan in plans:
            for weight, group in zip(plan.groups, plan.linear_groups, strict=True):
                first.setdefault(group.sources, weight)
        if plans[0].recipe.rotation:
            prepare(model, plans)
        collected: dict[Sources, Stats | Path] = {}
        held = 0
        for group, stats in collect(plans[0], list(first.values()), self.batches, self._resources):
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
