"""Results of a tuning run: its trials, the frontier of its mixes, and the model it chose."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onnx_woq.core.spec import Spec
from onnx_woq.recipe import Recipe


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        name: of the configuration.
        status: "ok", "failed" (it cannot be made or judged, `error` says why), "nan" (no finite number is its metric),
            or "fault" (a fault of this program, which says nothing of the configuration and is not remembered).
        metric: what `eval_fn` or the judge gave; None unless status is "ok". The SQNR of a model without any noise is
            infinite.
        met: whether the metric is within the limit, as sure as its samples make it.
        verdict: "within", "outside" or "undecided": too close to the limit for the samples there were. "" without a
            metric.
        standard_error: of the estimate behind the metric, over samples (of `kl`; of noise per signal for `sqnr_db`);
            None where it is not known.
        dropped: clearly worse than the best on the samples both had seen: it was not looked at any further.
        pairs: what was measured on each sample.
        bytes: of the model file and its data; None when it was not written.
        seconds: quantizing and evaluating.
        error: what was raised.
        recipe: the configuration itself.
        resumed: taken from the journal of an earlier run.
        path: the model file, while it is kept.
    """

    name: str
    status: Literal["ok", "failed", "nan", "fault"]
    metric: float | None
    met: bool
    bytes: int | None
    seconds: float
    error: str
    recipe: Recipe
    resumed: bool = False
    path: Path | None = None
    verdict: Literal["within", "outside", "undecided", ""] = ""
    standard_error: float | None = None
    dropped: bool = False
    pairs: tuple[tuple[float, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        return {
            "name": self.name,
            "status": self.status,
            "metric": None if self.metric is None or not math.isfinite(self.metric) else self.metric,
            "met": self.met,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "error": self.error,
            "recipe": self.recipe.to_dict(),
            "resumed": self.resumed,
            "path": self.path and str(self.path),
            "verdict": self.verdict,
            "standard_error": self.standard_error,
            "dropped": self.dropped,
            "samples": len(self.pairs) or None,
        }


@dataclass(frozen=True)
class LayerChoice:
    """The choice of a mix for one of its layers.

    Attributes:
        name: of the linear group: its first linear, by its output value.
        nodes: output value names of the MatMuls and Gemms.
        k, n: shape of the concatenated weights `[k, n]`.
        spec: the grid; None where it stays float.
        bytes: of the weights as they are stored.
        alpha: what local loss does to the outputs: nats per token, or share of noise.
        predicted: loss of the outputs that this choice makes; None for a grid that was not among the choices.
    """

    name: str
    nodes: tuple[str, ...]
    k: int
    n: int
    spec: Spec | None
    bytes: int
    alpha: float
    predicted: float | None

    @property
    def sites(self) -> tuple[str, ...]:
        """Returns `nodes`, by the name that version 0.1 gave them."""
        return self.nodes

    @property
    def bits(self) -> float:
        """Returns the bits per weight, scales and zero points included."""
        return 8 * self.bytes / (self.k * self.n)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        row = {"sites" if name == "nodes" else name: value for name, value in asdict(self).items()}
        row["spec"] = self.spec and self.spec.to_dict()
        return row | {"bits": self.bits, "alpha": self.alpha if math.isfinite(self.alpha) else None}


@dataclass(frozen=True)
class FrontierPoint:
    """One model on the way from small to accurate, or beside it.

    Attributes:
        name: of the trial that measured it; of a predicted point "".
        kind: "mix", or "uniform" for a configuration that was tried beside them.
        bytes: of the files; of a predicted point by addition, names and padding as of those that were made.
        bpw: bits per weight over all weights that the base recipe selects, scales and zero points included.
        predicted: loss by the sensitivities, corrected by the line through what was measured; None where unknown.
        measured: loss on held-out data, in the same unit: nats per token, share of noise in the outputs, or how much
            worse the user's metric is; None where it was not measured.
        standard_error: of `measured`; None where it is not known.
        recipe: that makes it.
        chosen: this is the model that was written.
    """

    name: str
    kind: Literal["mix", "uniform"]
    bytes: int
    bpw: float
    predicted: float | None
    measured: float | None
    standard_error: float | None
    recipe: Recipe
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        out = {name: getattr(self, name) for name in ("name", "kind", "bytes", "bpw", "predicted", "measured")}
        return out | {
            "standard_error": self.standard_error,
            "recipe": self.recipe.to_dict(),
            "chosen": self.chosen,
        }


@dataclass(frozen=True)
class SearchResult:
    """The result of a search; its fields are those of `TuneResult`."""

    trials: list[Trial]
    best: Trial | None
    stopped: str
    frontier: tuple[FrontierPoint, ...] = ()
    layers: tuple[LayerChoice, ...] = ()


@dataclass(frozen=True)
class TuneResult:
    """The history of a tuning run and its best model.

    Attributes:
        met: whether `best` is within the tolerance; if not it is merely the best so far.
        best: the chosen trial; None when no trial gave a model.
        path: the chosen model on disk.
        trials: all trials in the order they were made.
        metric_name: "eval_fn", "kl" or "sqnr_db".
        baseline: the metric of the float model.
        limit: a metric up to (or from, if higher is better) this value is within the tolerance.
        float_bytes: of the float model's files.
        stopped: why no more trials were made: "met", "all tried", "max_trials" or "timeout".
        target: what a mix was made for, such as "at most 4.25 bits per weight"; "" if none was.
        frontier: of mixes, what was predicted and what was measured, by rising bytes.
        layers: what the chosen mix makes of each layer, in graph order.
        model: the float model.
    """

    met: bool
    best: Trial | None
    path: Path | None
    trials: tuple[Trial, ...]
    metric_name: str
    baseline: float
    limit: float
    higher_is_better: bool
    float_bytes: int
    stopped: str
    seconds: float
    target: str = ""
    frontier: tuple[FrontierPoint, ...] = ()
    layers: tuple[LayerChoice, ...] = ()
    model: Path | None = None

    @property
    def faults(self) -> tuple[Trial, ...]:
        """Returns the trials that were lost to a fault of this program."""
        return tuple(trial for trial in self.trials if trial.status == "fault")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        return {
            "met": self.met,
            "best": self.best and self.best.name,
            "path": self.path and str(self.path),
            "trials": [trial.to_dict() for trial in self.trials],
            "metric": self.metric_name,
            "baseline": self.baseline if math.isfinite(self.baseline) else None,
            "limit": self.limit if math.isfinite(self.limit) else None,
            "higher_is_better": self.higher_is_better,
            "float_bytes": self.float_bytes,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "target": self.target,
            "frontier": [point.to_dict() for point in self.frontier],
            "layers": [layer.to_dict() for layer in self.layers],
        }
