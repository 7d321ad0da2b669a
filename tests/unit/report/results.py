"""Results made up by hand, whose every number is known."""

from __future__ import annotations

from pathlib import Path

from onnx_woq.core.spec import Spec
from onnx_woq.engine.results import Inspection, QuantizeReport, WeightReport
from onnx_woq.graph.find.linears import Skipped
from onnx_woq.recipe import Recipe
from onnx_woq.tuning.results import FrontierPoint, LayerChoice, Trial, TuneResult

SKIPPED = (
    Skipped("s1", "", "MatMul", "both inputs are computed", 0),
    Skipped("s2", "node2", "MatMul", "both inputs are computed", 0),
    Skipped("g", "gather", "Gather", "an embedding", 2_000_000),
)


def weight(name: str, error: float | None = None, **more: object) -> WeightReport:
    nodes = more.pop("nodes", (name,))
    return WeightReport(name, "linear", nodes, Spec(4, 32), 64, 128, 32768, 5120, error, **more)


TABLE = WeightReport("e", "embedding", ("e",), Spec(8, 64), 64, 1000, 256_000, 0, weight_name="wte", shared_with="head")


def quantized(*weights: WeightReport, copies: dict[str, int] | None = None) -> QuantizeReport:
    return QuantizeReport(
        Path("m.onnx"), Path("q.onnx"), Recipe(), weights, SKIPPED, copies or {}, 4_000_000, 1_000_000, "abc", 2.5
    )


def inspected(*weights: WeightReport) -> Inspection:
    return Inspection(Path("m.onnx"), Recipe(), weights, SKIPPED, {"wte": 2000}, 4_000_000, 1_000_000, ())


def trial(name: str, metric: float | None, **more: object) -> Trial:
    fields = {"status": "ok", "met": False, "bytes": 500_000, "seconds": 1.25, "error": "", "verdict": "outside"}
    return Trial(name=name, metric=metric, recipe=Recipe(), **(fields | more))


TRIALS = (
    trial("good", 0.01, met=True, verdict="within", standard_error=0.002),
    trial("bad", 0.5, resumed=True),
    trial("lost", 0.9, dropped=True),
    trial("broken", None, status="failed", bytes=None, error="RuntimeError: [no] memory", verdict=""),
    trial("odd", None, status="nan", verdict=""),
)


def tuned(best: Trial | None = TRIALS[0], **more: object) -> TuneResult:
    fields = {
        "met": best is not None, "best": best, "path": best and Path("out.onnx"), "trials": TRIALS,
        "metric_name": "kl", "baseline": 0.0, "limit": 0.05, "higher_is_better": False, "float_bytes": 2_000_000,
        "stopped": "all tried", "seconds": 9.0,
    }  # fmt: skip
    return TuneResult(**(fields | more))


POINTS = (
    FrontierPoint("", "mix", 400_000, 3.0, 0.4, None, None, Recipe()),
    FrontierPoint("", "mix", 600_000, 5.0, 0.004, None, None, Recipe()),
    FrontierPoint("good", "mix", 500_000, 4.25, 0.012, 0.01, 0.002, Recipe(), chosen=True),
    FrontierPoint("bad", "uniform", 500_000, 4.5, None, 0.5, None, Recipe()),
)

LAYERS = (
    LayerChoice("q", ("q", "k", "v"), 64, 192, Spec(3, 64), 64 * 192 * 3 // 8, 1.0, 0.009),
    LayerChoice("head", ("head",), 64, 100, None, 64 * 100 * 4, 1.0, 0.001),
)


def mixed(**more: object) -> TuneResult:
    return tuned(target="at most 4.25 bits per weight", frontier=POINTS, layers=LAYERS, **more)
