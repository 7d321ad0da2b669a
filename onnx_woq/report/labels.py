"""Labels: the words and units in which all reports speak of metrics, trials, sizes and number formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from onnx_woq.core.spec import Spec


@dataclass(frozen=True)
class MetricLabels:
    """The labels of one metric. Its loss is what is lost in it: lower is better, whatever the metric itself does.

    Attributes:
        name: its name.
        unit: its unit.
        column: name and unit, short, for the head of a table column.
        loss_column: name of its loss, short, for the head of a table column.
        loss_axis: name and unit of its loss, for the axis of a picture.
    """

    name: str
    unit: str
    column: str
    loss_column: str
    loss_axis: str


METRICS: Mapping[str, MetricLabels] = MappingProxyType(
    {
        "kl": MetricLabels(
            name="mean KL divergence",
            unit="nats per token",
            column="KL, nats/token",
            loss_column="KL, nats/token",
            loss_axis="mean KL divergence from the float model, nats per token",
        ),
        "sqnr_db": MetricLabels(
            name="output SQNR",
            unit="dB",
            column="SQNR, dB",
            loss_column="noise in the outputs",
            loss_axis="noise in the outputs, share of their energy",
        ),
        "eval_fn": MetricLabels(
            name="your metric",
            unit="your metric",
            column="metric",
            loss_column="loss of the metric",
            loss_axis="how much worse the metric is than the float model's",
        ),
    }
)
"""Labels by the names that metrics have in results."""


def size(count: float) -> str:
    """Formats bytes for people, `12.3 MB`, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spec_name(spec: Spec) -> str:
    """Formats a number format in short, `4 bit g32 asym`."""
    group = "per channel" if spec.group_size == -1 else f"g{spec.group_size}"
    dim = "" if spec.group_dim == 1 else " of outputs"
    return f"{spec.bits} bit {group}{dim} {'sym' if spec.symmetric else 'asym'}"


def outcome(status: str, dropped: bool, verdict: str) -> str:
    """Returns a word or two for the outcome of a trial: "failed", "no number", "fault", "dropped out" or its verdict.

    Args:
        status: "ok", "failed", "nan" or "fault".
        dropped: True if the trial was given up early because it was clearly worse than another one.
        verdict: "within", "outside", "undecided" or "".
    """
    if status != "ok":
        return "no number" if status == "nan" else status
    return "dropped out" if dropped else verdict


def error_measure(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the label and the key of the error that is known of some weights; ("bits per weight", "") if none is.

    Args:
        layers: rows of `summary.layers_of`.
    """
    for key, name in (("error", "output error"), ("weight_error", "weight error")):
        if any(row[key] is not None for row in layers):
            return name, key
    return "bits per weight", ""
