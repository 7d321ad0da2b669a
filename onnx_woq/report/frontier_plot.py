"""The frontier of a mixed-precision run as a picture: predicted and measured losses, and the model that was chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.errors import OutputError, RecipeError
from onnx_woq.report.labels import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from onnx_woq.tuning.results import FrontierPoint, TuneResult

MIX, UNIFORM, CHOSEN, INK = "#1f6fb4", "#8a5a1a", "#c8312b", "#333333"
MARKERS = "Ds^vPX<>ph"


def check_picture(path: str | Path) -> Path:
    """Checks that a picture can be drawn to `path`, so that a mistake is found before the work begins; returns it.

    Raises:
        RecipeError: matplotlib is not installed, or does not know this kind of file.
        OutputError: the folder does not exist.
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
    """Draws the frontier of a mixed-precision run to a file of the kind that its ending names, such as .png or .svg.

    Raises:
        RecipeError: matplotlib is not installed, or does not know this kind of file.
        OutputError: the folder does not exist, or the file cannot be written.
    """
    path = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _decorate(axes, result)
    _curve(axes, result.frontier)
    _measured(axes, [p for p in result.frontier if p.measured is not None])
    _limits(axes, result)
    if not result.frontier:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=INK)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _decorate(axes: Axes, result: TuneResult) -> None:
    """Sets scales, titles and grid."""
    axes.set_yscale("log")
    axes.set_xlabel("size of the files, MB")
    axes.set_ylabel(METRICS[result.metric_name].loss_axis)
    axes.set_title(f"Mixed precision: {result.target}", loc="left", fontsize=12, color=INK)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.grid(visible=True, which="minor", axis="y", color="#f0f0f0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _curve(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    """Draws the predicted losses of mixes as a line."""
    line = [(p.bytes / 1e6, p.predicted) for p in points if not p.name and p.predicted]
    if line:
        axes.plot(*zip(*line, strict=True), color=MIX, linewidth=1.4, alpha=0.75, label="mixes, predicted", zorder=2)


def _measured(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    """Draws the measured losses with their standard errors, and marks the chosen model.

    Names stand in the legend, because those of configurations of the same size would overlap in the picture.
    """
    some = [p for p in points if p.measured is not None and p.measured > 0]
    series = [("mixes, measured ± standard error", [p for p in some if p.kind == "mix"], MIX, "o")]
    uniform = sorted((p for p in some if p.kind == "uniform"), key=lambda p: -(p.measured or 0.0))
    series += [(p.name, [p], UNIFORM, marker) for p, marker in zip(uniform, itertools.cycle(MARKERS), strict=False)]
    for label, found, color, marker in series:
        losses, errors = [p.measured or 0.0 for p in found], [p.standard_error or 0.0 for p in found]
        down = [min(error, 0.95 * loss) for error, loss in zip(errors, losses, strict=True)]
        style: dict[str, Any] = {"color": color, "markersize": 6, "elinewidth": 1.2, "capsize": 3, "zorder": 3}
        if found:
            axes.errorbar([p.bytes / 1e6 for p in found], losses, [down, errors], fmt=marker, label=label, **style)
    for p in (p for p in some if p.chosen):
        error = f" ± {p.standard_error:.2g}" if p.standard_error else ""
        text = f"chosen: {p.bytes / 1e6:.1f} MB, {p.bpw:.2f} bits per weight,\n{p.measured:.3g}{error}"
        ring: dict[str, Any] = {
            "markersize": 14,
            "markerfacecolor": "none",
            "markeredgecolor": CHOSEN,
            "markeredgewidth": 2,
        }
        axes.plot(p.bytes / 1e6, p.measured or 0.0, "o", label=text, zorder=4, **ring)


def _limits(axes: Axes, result: TuneResult) -> None:
    """Limits the axes to the measured losses and the predictions around them; draws the accepted loss as a line."""
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
