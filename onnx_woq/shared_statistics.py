"""One calibration for all configurations: a Gram matrix depends on neither bits nor group size nor method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from onnx_woq.core.methods import needs_data
from onnx_woq.graph.embeddings import Embedding, find_embeddings
from onnx_woq.graph.model import Model, clone
from onnx_woq.graph.taps import Tap, find_taps
from onnx_woq.making import Feed, Means
from onnx_woq.pipeline import collect, prepare, sharing
from onnx_woq.recipe import Recipe

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
        with_means: Means,
    ) -> None:
        self.batches = batches
        self._source, self._means = source, with_means
        self._recipes = [r for r in recipes if needs_data(r) and not r.true_sequential]
        self._stats: dict[tuple[str, ...], dict[Sources, Stats | Path]] = {}  # by what is done to the model first
        self._files = ExitStack()

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stats.clear()
        self._files.close()

    def of(
        self, model: Model, recipe: Recipe, taps: list[Tap], states: Path | None = None
    ) -> Iterable[tuple[Tap, Stats | None]]:
        """Each of `taps`, found in `model` by `recipe`, with its statistics; None where the method needs none.

        `true_sequential` needs those of the model as quantized so far, so it calibrates for itself.
        """
        if not needs_data(recipe):
            return collect(model, recipe, taps, [], self._means)
        if recipe.true_sequential or not self.batches:
            return collect(model, recipe, taps, self.batches, self._means, states)
        first = self._prepared(recipe)
        if first not in self._stats:
            self._stats[first] = self._collect([r for r in self._recipes if self._prepared(r) == first])
        stats = self._stats[first]
        return ((tap, _loaded(stats[tap.sources])) for tap in taps)

    def _prepared(self, recipe: Recipe) -> tuple[str, ...]:
        """Equal for recipes that do the same to the float model, so that its taps have the same statistics."""
        if not recipe.rotation:
            return ()
        embeddings = find_embeddings(self._source, recipe, find_taps(self._source, recipe)[0])[0]
        return ("rotated", *sharing(embeddings).values())

    def _collect(self, recipes: list[Recipe]) -> dict[Sources, Stats | Path]:
        model = clone(self._source)
        taps: dict[Sources, Tap] = {}
        embeddings: list[Embedding] = []
        for recipe in recipes:
            found = find_taps(model, recipe)[0]
            embeddings += find_embeddings(model, recipe, found)[0] if recipe.rotation else []
            for tap in found:
                taps.setdefault(tap.sources, tap)
        prepare(model, recipes[0], list(taps.values()), embeddings)
        collected: dict[Sources, Stats | Path] = {}
        held = 0
        for tap, stats in collect(model, recipes[0], list(taps.values()), self.batches, self._means):
            if stats is not None:
                held += stats.gram.nbytes
                collected[tap.sources] = (
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
