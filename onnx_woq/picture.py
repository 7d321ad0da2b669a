"""The frontier as a picture: what was predicted, what was measured, and which model was taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_woq.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from onnx_woq.results import FrontierPoint, TuneResult

MIX, UNIFORM, CHOSEN, INK = "#1f6fb4", "#8a5a1a", "#c8312b", "#333333"

_LOSSES = {
    "kl": "mean KL divergence from the float model, nats per token",
    "sqnr_db": "noise in the outputs, share of their energy",
    "eval_fn": "how much worse the metric is than the float model's",
}


def check_picture(path: str | Path) -> Path:
    """`path`, if a picture can be drawn there; worth asking before the work.

    Raises:
        RecipeError: matplotlib is not installed, or does not know this kind of file.
        OutputError: there is no such folder.
    """
    path = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise RecipeError("--frontier needs the package matplotlib: pip install 'onnx-woq[plot]'") from error
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise RecipeError(f"{path}: no picture has this ending, choose one of {', '.join(kinds)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist: create it first")
    return path


def draw_frontier(result: TuneResult, path: str | Path) -> None:
    """Writes the frontier of a mixed-precision run to a picture, PNG or what the ending of `path` says.

    Raises:
        RecipeError, OutputError: see `check_picture`.
    """
    path = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _decorate(axes, result)
    _curve(axes, result.frontier)
    _measured(axes, [p for p in result.frontier if p.measured is not None])
    _limits(axes, result)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _decorate(axes: Axes, result: TuneResult) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("size of the files, MB")
    axes.set_ylabel(_LOSSES[result.metric_name])
    axes.set_title(f"Mixed precision: {result.target}", loc="left", fontsize=12, color=INK)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.grid(visible=True, which="minor", axis="y", color="#f0f0f0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _curve(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    line = [(p.bytes / 1e6, p.predicted) for p in points if not p.name and p.predicted]
    if line:
        axes.plot(*zip(*line, strict=True), color=MIX, linewidth=1.4, alpha=0.75, label="mixes, predicted", zorder=2)


def _measured(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    for kind, color, marker, label in (
        ("mix", MIX, "o", "mixes, measured ± standard error"),
        ("uniform", UNIFORM, "D", "uniform configurations"),
    ):
        some = [p for p in points if p.kind == kind and p.measured is not None and p.measured > 0]
        if not some:
            continue
        errors = [p.standard_error or 0.0 for p in some]
        axes.errorbar(
            [p.bytes / 1e6 for p in some],
            [p.measured or 0.0 for p in some],
            yerr=[[min(e, 0.95 * (p.measured or 0)) for e, p in zip(errors, some, strict=True)], errors],
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=1.2,
            capsize=3,
            label=label,
            zorder=3,
        )
    for point in points:
        if point.measured is None or not point.measured > 0:
            continue
        at = (point.bytes / 1e6, point.measured)
        if point.kind == "uniform":
            axes.annotate(point.name, at, (8, 6), textcoords="offset points", fontsize=8, color=UNIFORM)
        if point.chosen:
            axes.plot(
                *at, "o", markersize=14, markerfacecolor="none", markeredgecolor=CHOSEN, markeredgewidth=2, zorder=4
            )
            error = f" ± {point.standard_error:.2g}" if point.standard_error else ""
            text = f"chosen: {point.bytes / 1e6:.1f} MB, {point.bpw:.2f} bits per weight, {point.measured:.3g}{error}"
            axes.annotate(
                text,
                at,
                (14, -20),
                textcoords="offset points",
                fontsize=9,
                color=CHOSEN,
                weight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
                zorder=5,
            )


def _limits(axes: Axes, result: TuneResult) -> None:
    """The range that holds what was measured, with the predictions around it; and the loss that was asked for."""
    measured = [p for p in result.frontier if p.measured is not None]
    sizes = [p.bytes / 1e6 for p in measured]
    losses = [p.measured for p in measured if p.measured and p.measured > 0]
    if not losses:
        return
    predicted = [p for p in result.frontier if not p.name]
    least = min(losses) / 3
    near = [p.bytes / 1e6 for p in predicted if p.predicted and p.predicted >= least]
    low, high = min(sizes + near), max(sizes + near)
    room = 0.05 * (high - low) or 0.05 * high
    axes.set_xlim(low - room, high + 3 * room)
    tops = [p.predicted for p in predicted if p.predicted and p.bytes / 1e6 <= high]
    axes.set_ylim(least, 2 * max([*losses, *tops]))
    if math.isfinite(result.limit) and result.metric_name == "kl":
        axes.axhline(result.limit, color=CHOSEN, linewidth=0.9, linestyle=(0, (4, 4)), zorder=1, label="accepted")
