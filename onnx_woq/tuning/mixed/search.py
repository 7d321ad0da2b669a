"""The search for a mix: from sensitivities to the frontier, a few real points on it, and the model asked for.

Predictions order the mixes and say where to look; what is chosen has been measured. A mix is an ordinary recipe: its
overrides name the linears of each grid, so the written file says how to make it again.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnx_woq.engine.resume.store import MAPS
from onnx_woq.engine.statistics import SharedStatistics
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.data.feeds import Feed
from onnx_woq.tuning import bootstrap
from onnx_woq.tuning.budget import Budget
from onnx_woq.tuning.judge import Judge
from onnx_woq.tuning.mixed.candidates import MixCandidates
from onnx_woq.tuning.mixed.feasibility import check_sizes
from onnx_woq.tuning.mixed.knapsack import Allocation
from onnx_woq.tuning.mixed.layers import mixed_layers
from onnx_woq.tuning.mixed.sensitivity import measured
from onnx_woq.tuning.options import Search
from onnx_woq.tuning.results import FrontierPoint, SearchResult, Trial
from onnx_woq.tuning.trials import Run, drop, each_trial

logger = logging.getLogger(__name__)

POINTS = 6
"""Mixes measured along the frontier where the frontier is what is asked for."""

MOST_TRIALS = 8
"""Mixes measured on the way to a loss."""

CURVE = 60
"""Predicted points given back at most."""

SPAN = 1000.0
"""The frontier is looked at from the smallest mix to one that is predicted to lose this many times less."""

AIM = 0.97
"""Share of a loss limit that is aimed at first."""

AGAIN = 0.93
"""Factor that the aim is multiplied by after a miss."""

ENOUGH = 0.9
"""Share of a loss limit from which on a mix that keeps it is small enough."""

CLOSE = 0.01
"""Two mixes whose files differ by less than this share are not worth another trial between them."""

MIX = replace(
    preset("BEST_4BIT"),
    # One range of factors for all widths: the fewer levels there are, the more of a range may be given up.
    options={**preset("BEST_4BIT").options, "mse_range": (0.4, 1.0, 0.02)},
    embedding=preset("BEST_4BIT").spec,
    half_scales=True,
)
"""The recipe that mixes are made with unless somebody says otherwise."""


def limit_of(target: Budget, judge_limit: float | None) -> float | None:
    """Returns the limit of the built-in judge: a budget of bytes has none, so few samples make it clear."""
    if target.kind in ("bpw", "size"):
        return math.inf
    return target.value if target.kind == "kl" else judge_limit


def mix_candidates(run: Run, base: Recipe, out: Path | None) -> MixCandidates:
    """Returns the mixes of the run's model, with nothing measured yet."""
    hashes = run.source_hash, run.calibration_hash
    return MixCandidates(run.source, base, tuple(mixed_layers(run.source, base)), hashes, out)


def search_mixes(
    run: Run,
    mixer: MixCandidates,
    compared: Mapping[str, Recipe],
    judge: Judge,
    shared: SharedStatistics,
    batches: Sequence[Feed],
    target: Budget,
    search: Search,
) -> SearchResult:
    """Measures mixes until the one that `target` asks for is known.

    Args:
        run: tells model, journal and means.
        mixer: of the same model.
        compared: uniform configurations to try beside the mixes; where the target is one of bytes, those within it.
        judge: on held-out data.
        shared: statistics for the base recipe and those in `compared`.
        batches: calibration samples.
        target: see `Target`.
        search: tells how many mixes are measured along the frontier (by default `POINTS` where that is the target,
            else none), and how many configurations are tried at most.
    """
    mixer = replace(mixer, layers=tuple(measured(run, mixer.base, mixer.layers, shared, batches)))
    check_sizes(mixer, target)  # again: layers of which nothing is known have lost their choices
    most = math.inf if search.max_trials is None else search.max_trials
    lab = _MixSearch(run, mixer, judge, shared, target, most, compared)
    start, run.more = time.process_time(), MAPS
    if target.kind in ("bpw", "size"):
        _to_bytes(lab)
    elif target.kind in ("kl", "loss"):
        _to_loss(lab)
    wanted = (POINTS if target.kind == "pareto" else 0) if search.points is None else search.points
    for picks in _along(mixer, wanted):
        lab.measure(picks)
    for name, recipe in compared.items():
        if target.kind not in ("bpw", "size") or wanted or lab.fits(recipe):
            lab.compare(name, recipe)
    run.known.clear()
    logger.info("%d points: %.1f s of CPU", len(lab.trials), time.process_time() - start)
    best = lab.best
    layers = mixer.layer_choices(best.recipe) if best else ()
    return SearchResult(lab.trials, best, lab.stopped, lab.frontier(), layers)


@dataclass
class _MixSearch:
    """A search: its mixes, and what has been measured of them so far.

    Attributes:
        left: configurations that may still be tried.
        compared: names of configurations that are no mixes.
        trials: in the order they were made; only the best has its model on disk.
        mixes: of those that are mixes, by name, the choice of each layer.
        stopped: why it ended.
    """

    run: Run
    mixer: MixCandidates
    judge: Judge
    shared: SharedStatistics
    target: Budget
    left: float
    compared: Collection[str] = ()
    trials: list[Trial] = field(default_factory=list)
    mixes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stopped: str = "all tried"
    _bpw: dict[str, float] = field(default_factory=dict)
    _size: dict[str, int] = field(default_factory=dict)

    def measure(self, picks: tuple[int, ...]) -> Trial | None:
        """Makes and judges a mix; returns None if the run may try no more."""
        recipe = self.mixer.recipe(picks)
        if known := next((trial for trial in self.trials if trial.recipe == recipe), None):
            return known
        plain = f"mix {self.mixer.bits_per_weight(picks):.2f} bpw"
        numbered = (f"{plain} ({number})" for number in itertools.count(2))
        taken = {*self.compared, *self.mixes}
        trial = self._try(name := next(one for one in itertools.chain([plain], numbered) if one not in taken), recipe)
        if trial:
            self.mixes[name] = tuple(picks)
        return trial

    def compare(self, name: str, recipe: Recipe) -> None:
        """Tries a configuration that is no mix."""
        if not any(trial.recipe == recipe for trial in self.trials):
            self._try(name, recipe)

    def fits(self, recipe: Recipe) -> bool:
        """Tells whether a configuration is within a budget of bytes, as far as that is known before it is made."""
        if self.target.kind == "bpw":
            return self.bits_per_weight(recipe) <= self.target.value
        return self.mixer.planned(recipe) <= self.target.value

    def size(self, trial: Trial) -> int:
        """Returns the bytes of a trial's files at their final place; as planned, if it has no model."""
        if trial.name not in self._size:
            there = trial.path is not None and trial.path.exists()
            found = self.mixer.final(trial.path) if there and trial.path else self.mixer.planned(trial.recipe)
            self._size[trial.name] = found
        return self._size[trial.name]

    def bits_per_weight(self, recipe: Recipe) -> float:
        """Returns the bits per weight, over the weights that the base selects, under another recipe."""
        key = recipe.fingerprint()
        if key not in self._bpw:
            self._bpw[key] = 8 * sum(layer.bytes for layer in self.mixer.layer_choices(recipe)) / self.mixer.weights
        return self._bpw[key]

    def loss(self, trial: Trial) -> float | None:
        """Returns the loss of a trial on the scale of the budget: nats, share of noise, or decline of the metric."""
        if trial.metric is None:
            return None
        if trial.pairs:
            return bootstrap.estimate(np.array(trial.pairs))
        return self.judge.rank(trial.metric) - self.judge.rank(self.judge.baseline)

    def line(self) -> tuple[float, float]:
        """Returns (a, b) of `log measured = a + b · log predicted` over the mixes; (0, 1) while there are none."""
        known = [(self.mixer.loss(p), self.loss(t)) for t in self.trials if (p := self.mixes.get(t.name))]
        points = np.log([(x, y) for x, y in known if y is not None and x > 0 and 0 < y < math.inf] or [(1.0, 1.0)])
        x, y = points[:, 0], points[:, 1]
        spread = float(((x - x.mean()) ** 2).sum())
        # Points close together say nothing of the slope.
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if len(x) > 1 and spread > 0.01 else 1.0
        slope = min(max(slope, 0.5), 2.0)
        return float(y.mean() - slope * x.mean()), slope

    def corrected(self, predicted: float) -> float:
        """Returns a predicted loss corrected by the line."""
        a, b = self.line()
        return math.exp(a + b * math.log(predicted)) if predicted > 0 else 0.0

    def prediction_for(self, loss: float) -> float:
        """Returns the prediction that the line corrects to `loss`."""
        a, b = self.line()
        return math.exp((math.log(loss) - a) / b)

    @property
    def best(self) -> Trial | None:
        """Returns the best trial: the least loss within a budget of bytes, else the fewest bytes that meet it."""
        done = [trial for trial in self.trials if trial.metric is not None and self._within_bytes(trial)]
        rank = lambda trial: self.judge.rank(trial.metric or 0.0)  # noqa: E731
        met = [trial for trial in done if trial.met]
        if met and self.target.kind not in ("bpw", "size"):
            return min(met, key=lambda trial: (trial.bytes or 0, rank(trial)))
        return min(done, key=lambda trial: (rank(trial), trial.bytes or 0), default=None)

    def _within_bytes(self, trial: Trial) -> bool:
        if self.target.kind == "size":
            return self.size(trial) <= self.target.value
        return self.target.kind != "bpw" or self.bits_per_weight(trial.recipe) <= self.target.value

    def _try(self, name: str, recipe: Recipe) -> Trial | None:
        if self.left < 1:
            self.stopped = "max_trials"
            return None
        with closing(each_trial(self.run, {name: recipe}, self.judge, self.shared)) as finished:
            trial = next(finished, None)
        if trial is None:
            self.stopped = "timeout"
            return None
        self.left -= 1
        self.trials.append(trial)
        best = self.best
        self.trials = [one if best and one.name == best.name else drop(one) for one in self.trials]
        return trial

    def frontier(self) -> tuple[FrontierPoint, ...]:
        """Returns the measured points and the predicted curve."""
        best = self.best
        points = []
        for trial in self.trials:
            picks = self.mixes.get(trial.name)
            layers = self.mixer.layer_choices(trial.recipe)
            losses = [layer.predicted for layer in layers]
            alike = picks or (trial.recipe.method, trial.recipe.options) == (
                self.mixer.base.method,
                self.mixer.base.options,
            )
            known = alike and all(loss is not None for loss in losses)
            points.append(
                FrontierPoint(
                    name=trial.name,
                    kind="mix" if picks else "uniform",
                    bytes=trial.bytes or 0,
                    bpw=self.bits_per_weight(trial.recipe),
                    predicted=self.corrected(math.fsum(loss or 0.0 for loss in losses)) if known else None,
                    measured=self.loss(trial),
                    standard_error=trial.standard_error,
                    recipe=trial.recipe,
                    chosen=best is not None and trial.name == best.name,
                )
            )
        made = [
            (t.bytes, self.mixer.written(self.mixes[t.name])) for t in self.trials if t.bytes and t.name in self.mixes
        ]
        names = round(sum(size - added for size, added in made) / len(made)) if made else 0  # and padding
        for point in _thinned(self.mixer.points, CURVE):
            size, bpw = self.mixer.written(point.picks) + names, self.mixer.bits_per_weight(point.picks)
            recipe = self.mixer.recipe(point.picks)
            points.append(FrontierPoint("", "mix", size, bpw, self.corrected(point.loss), None, None, recipe))
        return tuple(sorted(points, key=lambda point: (point.bytes, point.name)))


def _along(mixer: MixCandidates, count: int) -> list[tuple[int, ...]]:
    """Returns so many mixes of the frontier, evenly spaced by the logarithm of their predicted loss."""
    points = [point for point in mixer.points if point.loss > 0] or mixer.points[:1]
    if not count:
        return []
    most = points[0].loss
    losses = np.array([max(point.loss, 1e-300) for point in points])
    wanted = np.geomspace(max(most, 1e-300), max(losses[-1], most / SPAN), count)
    nearest = {int(np.abs(np.log(losses / loss)).argmin()) for loss in wanted}
    return [points[index].picks for index in sorted(nearest)]


def _thinned(points: Sequence[Allocation], most: int) -> list[Allocation]:
    """Returns at most so many points of a frontier, evenly spaced by number, the ends among them."""
    if len(points) <= most:
        return list(points)
    return [points[index] for index in sorted({round(at) for at in np.linspace(0, len(points) - 1, most)})]


def _to_bytes(lab: _MixSearch) -> None:
    """Measures the best mix within a target of bytes."""
    mixer, value = lab.mixer, lab.target.value
    if lab.target.kind == "bpw":
        found = mixer.within_bytes(math.floor(value * mixer.weights / 8), "stored")
        if found:
            lab.measure(found.picks)
        return
    anything = mixer.points[0]
    most = math.floor(value) - (mixer.written(anything.picks) - anything.bytes)
    for attempt in range(MOST_TRIALS):
        found = mixer.within_bytes(most, "written")
        if found is None:
            break
        size = mixer.planned(mixer.recipe(found.picks))  # names and padding come on top of what has been added up
        if size <= value:
            trial = lab.measure(found.picks)
            if trial is None or (size := lab.size(trial)) <= value:
                return
        # Fewer bits may need more nodes around them: of a small file these are much, so steps must not shrink.
        most -= max(math.ceil(size - value), (most << attempt) >> 12)
    lab.measure(mixer.smallest("written").picks)


def _to_loss(lab: _MixSearch) -> None:
    """Measures mixes until the smallest that keeps a loss is known about: corrected predictions first, then halves."""
    mixer, misses = lab.mixer, 0
    low, high = mixer.smallest("written").bytes - 1, math.inf
    for _ in range(MOST_TRIALS):
        found = mixer.within_loss(lab.prediction_for(AIM * AGAIN**misses * lab.target.value))
        step = CLOSE * 2**misses if misses > 1 and math.isinf(high) else 0.0  # predictions may be of little use
        if found is None or not low * (1 + step) < found.bytes < high:
            if low >= (1 - CLOSE) * high:
                return
            between = (low + high) / 2 if math.isfinite(high) else low * (1 + max(step, 5 * CLOSE))
            found = mixer.within_bytes(math.floor(between), "written")
        if found is None or not low < found.bytes < high:  # steps of a small model may be larger than that
            found = next((point for point in mixer.points if low < point.bytes < high), None)
        if found is None or not (trial := lab.measure(found.picks)):
            return
        if trial.met:
            high = found.bytes
            if (lab.loss(trial) or 0.0) >= ENOUGH * lab.target.value:
                return
        else:
            low, misses = found.bytes, misses + 1
