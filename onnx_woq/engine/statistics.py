"""One calibration for all configurations: a Gram matrix depends on neither bits nor group size nor method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.engine.execute import Resources
from onnx_woq.engine.quantize import collect, prepare, sharing
from onnx_woq.graph.find.embeddings import Embedding, find_embeddings
from onnx_woq.graph.find.linears import LinearGroup, find_linear_groups
from onnx_woq.graph.io.model import Model, clone
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats


Sources = tuple[tuple[str, str], ...]
"""Of a tap: what its statistics are taken of."""


class SharedStatistics:
    """The statistics of every tap of every recipe, collected once, when the first of them is asked for.

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
        self._source, self._means = source, resources
        self._recipes = [r for r in recipes if r.needs_data and not r.true_sequential]
        self._stats: dict[tuple[str, ...], dict[Sources, Stats | Path]] = {}  # by what is done to the model first
        self._files = ExitStack()

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stats.clear()
        self._files.close()

    def of(
        self, model: Model, recipe: Recipe, groups: list[LinearGroup], states: Path | None = None
    ) -> Iterable[tuple[LinearGroup, Stats | None]]:
        """Each of `taps`, found in `model` by `recipe`, with its statistics; None where the method needs none.

        `true_sequential` needs those of the model as quantized so far, so it calibrates for itself.
        """
        if not recipe.needs_data:
            return collect(model, recipe, groups, [], self._means)
        if recipe.true_sequential or not self.batches:
            return collect(model, recipe, groups, self.batches, self._means, states)
        first = self._prepared(recipe)
        if first not in self._stats:
            self._stats[first] = self._collect([r for r in self._recipes if self._prepared(r) == first])
        stats = self._stats[first]
        return ((group, _loaded(stats[group.sources])) for group in groups)

    def _prepared(self, recipe: Recipe) -> tuple[str, ...]:
        """Equal for recipes that do the same to the float model, so that its taps have the same statistics."""
        if not recipe.rotation:
            return ()
        embeddings = find_embeddings(self._source, recipe, find_linear_groups(self._source, recipe)[0])[0]
        return ("rotated", *sharing(embeddings).values())

    def _collect(self, recipes: list[Recipe]) -> dict[Sources, Stats | Path]:
        model = clone(self._source)
        groups: dict[Sources, LinearGroup] = {}
        embeddings: list[Embedding] = []
        for recipe in recipes:
            found = find_linear_groups(model, recipe)[0]
            embeddings += find_embeddings(model, recipe, found)[0] if recipe.rotation else []
            for group in found:
                groups.setdefault(group.sources, group)
        prepare(model, recipes[0], list(groups.values()), embeddings)
        collected: dict[Sources, Stats | Path] = {}
        held = 0
        for group, stats in collect(model, recipes[0], list(groups.values()), self.batches, self._means):
            if stats is not None:
                held += stats.gram.nbytes
                collected[group.sources] = (
                    self._spill(stats) if self._means.scarce or held > self._means.memory.window else stats
                )
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
