"""One calibration for all configurations: a Gram matrix depends on neither bits nor group size nor method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.graph.model import Model, clone
from onnx_woq.graph.taps import Tap, find_taps
from onnx_woq.pipeline import Feed, Progress, collect
from onnx_woq.recipe import Recipe

if TYPE_CHECKING:
    from onnx_woq.core.stats import Stats


class SharedStatistics:
    """The statistics of every tap of every recipe, collected once, when the first of them is asked for.

    A resumed run with nothing left to do therefore calibrates nothing. Gram matrices beyond the memory budget live in
    private temporary files, removed at the end of the `with` block.
    """

    def __init__(
        self,
        source: Model,
        recipes: list[Recipe],
        batches: list[Feed],
        memory_budget: int,
        progress: Progress | None,
    ) -> None:
        self.batches = batches
        self._source, self._recipes = source, recipes
        self._memory_budget, self._progress = memory_budget, progress
        self._stats: dict[tuple[str, ...], Stats | Path] | None = None
        self._files = ExitStack()

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stats = None
        self._files.close()

    def of(self, model: Model, recipe: Recipe, taps: list[Tap]) -> Iterable[tuple[Tap, Stats | None]]:
        """Each of `taps`, found in `model` by `recipe`, with its statistics.

        `true_sequential` needs those of the model as quantized so far, so it calibrates for itself.
        """
        if recipe.true_sequential or not self.batches:
            return collect(model, recipe, taps, self.batches, self._memory_budget, self._progress)
        if self._stats is None:
            self._stats = self._collect()
        stats = self._stats
        return ((tap, _loaded(stats[tap.values])) for tap in taps)

    def _collect(self) -> dict[tuple[str, ...], Stats | Path]:
        model = clone(self._source)
        taps: dict[tuple[str, ...], Tap] = {}
        recipes = [recipe for recipe in self._recipes if not recipe.true_sequential]
        for recipe in recipes:
            for tap in find_taps(model, recipe)[0]:
                taps.setdefault(tap.values, tap)
        collected: dict[tuple[str, ...], Stats | Path] = {}
        held = 0
        walk = collect(model, recipes[0], list(taps.values()), self.batches, self._memory_budget, self._progress)
        for tap, stats in walk:
            if stats is not None:
                held += stats.gram.nbytes
                collected[tap.values] = self._spill(stats) if held > self._memory_budget else stats
        return collected

    def _spill(self, stats: Stats) -> Path:
        folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="onnx-woq-"))
        file = Path(folder) / "stats.npz"
        np.savez(file, gram=stats.gram, abs_mean=stats.abs_mean, abs_max=stats.abs_max, tokens=np.asarray(stats.tokens))
        return file


def _loaded(stats: Stats | Path) -> Stats:
    if not isinstance(stats, Path):
        return stats
    from onnx_woq.core.stats import Stats

    with np.load(stats, allow_pickle=False) as file:
        return Stats(file["gram"], file["abs_mean"], file["abs_max"], int(file["tokens"]))
