"""docs/benchmarks.md and its charts, from the records in build/bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.phases import PHASES as PHASES_IN_ORDER
from benchmarks.records import TARGETS, Record, latest

WIDEST = 2.5  # times what must be reached: longer bars are cut there

HEAD = """# What it costs: time and memory

Written by `python tools/bench.py report` from what its other commands measured. What is compared runs in turn, A B A B
…, each in a process of its own; numbers are medians, a ratio is the median of the ratios of the pairs. Wall time
unless it says CPU. Memory is the peak of the whole process's resident bytes, pages of mapped files included. The
environment variables `OPENBLAS_CORETYPE` and `OPENBLAS_L2_SIZE`, which make BLAS choose other kernels than the machine
has, are unset for everything that is measured.

"""

FLOOR = """## The flop floor

"""

PHASES = """## Where the time goes

Thread-seconds of work by phase, from one more run whose stacks are looked at a hundred times a second; threads that
wait for others do not count, and neither do the runtime's own threads.

"""


def write(folder: Path) -> str:
    """Writes benchmarks.md and the charts into `folder`; says what it wrote.

    Raises:
        ValueError: nothing was measured yet.
    """
    records = latest()
    rows = [record for record in records if record.row in TARGETS]
    if not rows:
        raise ValueError("nothing was measured yet: run one of the other commands first")
    folder.mkdir(parents=True, exist_ok=True)
    charts = [chart for chart in (ratios(rows, folder), phases(rows, folder), timeline(rows, folder)) if chart]
    parts = [HEAD, _machine(records), "\n## The table\n\n", _table(rows)]
    parts += [f"\n![{text}]({name})\n" for name, text in charts[:1]]
    parts += ["\n", FLOOR, (floor.__doc__ or "").strip(), "\n\n", PHASES, _phases(rows)]
    parts += [f"\n![{text}]({name})\n" for name, text in charts[1:]]
    parts += ["\n## Every measurement\n\n", _details(records)]
    path = folder / "benchmarks.md"
    path.write_text("".join(parts))
    return ", ".join([str(path), *(name for name, _ in charts)])


def _machine(records: Sequence[Record]) -> str:
    """The machine, the versions and the measured rates."""
    last = max(records, key=lambda record: record.time)
    memory = last.machine["memory"] / 2**30
    text = f"Machine: {last.machine['cpu']}, {last.machine['cores']} cores, {memory:.0f} GiB. "
    text += "Versions: " + ", ".join(f"{name} {number}" for name, number in last.versions.items()) + ".\n"
    rates = next((record for record in records if record.row == "machine"), None)
    if rates:
        lines = [f"| {name} | {value:.4g} |" for name, value in rates.medians.items()]
        text += "\n" + "\n".join(["| rate | measured |", "|---|---|", *lines]) + "\n"
    return text


def _table(rows: Sequence[Record]) -> str:
    lines = ["| measure | case | must | stretch | measured | verdict | note |", "|---|---|---|---|---|---|---|"]
    measured = {record.row for record in rows}
    for row, target in TARGETS.items():
        sign = "≥" if target.at_least else "≤"
        goals = [f"{sign} {_number(target.must)}", f"{sign} {_number(target.stretch)}" if target.stretch else ""]
        if row not in measured:
            lines.append(f"| {target.measure} | | {' | '.join(goals)} | | not measured | |")
        for record in rows:
            if record.row == row and record.value is not None:
                value = f"**{_number(record.value)}**{' ' + target.unit if target.unit else ''}"
                cells = [target.measure, record.case, *goals, value, target.verdict(record.value), record.note]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _phases(rows: Sequence[Record]) -> str:
    with_phases = [record for record in rows if record.phases]
    names = list(dict.fromkeys(name for record in with_phases for name in record.phases))
    lines = ["| seconds | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for record in with_phases:
        cells = [f"{record.phases[name]:.2f}" if name in record.phases else "" for name in names]
        lines.append("| " + " | ".join([_label(record), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _details(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        medians = "; ".join(f"{name} {value:.4g}" for name, value in record.medians.items())
        count = len(record.rounds)
        load = record.machine["load"]
        parts.append(
            f"- **{_label(record)}**, {record.time[:10]}, {count} round{'s' * (count > 1)}, load average before the "
            f"record {load:.1f}: {medians}\n  `{record.command}`\n"
        )
    return "".join(parts)


def ratios(rows: Sequence[Record], folder: Path) -> tuple[str, str] | None:
    """How far each number is from what it must be: measured ÷ must, so that left of 1 is reached."""
    shown = [record for record in rows if record.value]
    if not shown:
        return None
    figure, axes = _figure(8, 0.4 * len(shown) + 1.2)
    for place, record in enumerate(reversed(shown)):
        target = TARGETS[record.row]
        turn = (lambda a, b: b / a) if target.at_least else (lambda a, b: a / b)
        value = turn(record.value, target.must)
        axes.barh(place, min(value, WIDEST), color="tab:green" if value <= 1 else "tab:red", height=0.6)
        if target.stretch:
            axes.plot([turn(target.stretch, target.must)] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
        more = " …" if value > WIDEST else ""
        axes.text(min(value, WIDEST), place, f" {_number(record.value)}{more}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [_label(record) for record in reversed(shown)], fontsize=8)
    axes.set_xlabel("measured ÷ must (thin lines: stretch; left is better)")
    return _saved(figure, folder, "benchmarks-ratios.png", "measured against what must be reached")


def phases(rows: Sequence[Record], folder: Path) -> tuple[str, str] | None:
    """Thread-seconds by phase, and beneath each GPTQ run the seconds its arithmetic needs on one core."""
    shown = [record for record in rows if record.phases and record.row in ("gptq-floor", "gptq-llmc", "presets")]
    if not shown:
        return None
    bars: list[tuple[str, dict[str, float]]] = []
    for record in shown:
        needed = {name: record.medians.get(f"floor {name} CPU s") for name in ("forward", "gram", "factor", "solve")}
        bars.append((_label(record), dict(record.phases)))
        if needed["forward"]:
            bars.append(("its floor", {name: value for name, value in needed.items() if value}))
    figure, axes = _figure(8, 0.45 * len(bars) + 1.5)
    seen = dict.fromkeys(name for _, parts in bars for name in parts)
    names = sorted(seen, key=lambda name: PHASES_IN_ORDER.index(name) if name in PHASES_IN_ORDER else -1)
    left, colours = [0.0] * len(bars), _colours()
    for number, name in enumerate(names):
        widths = [parts.get(name, 0.0) for _, parts in bars]
        axes.barh(range(len(bars)), widths, left=left, label=name, color=colours(number % 20), height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("thread-seconds")
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.25))
    return _saved(figure, folder, "benchmarks-phases.png", "where the time goes")


def timeline(rows: Sequence[Record], folder: Path) -> tuple[str, str] | None:
    """Memory over time of the runs on a model larger than it."""
    shown = [record for record in rows if record.row.startswith("memory")]
    if not shown:
        return None
    figure, axes = _figure(8, 3)
    for number, record in enumerate(shown):
        seconds, resident, private = zip(*record.rounds[-1]["ours"]["timeline"], strict=True)
        share = [second / seconds[-1] for second in seconds]
        axes.plot(share, [size / 1e9 for size in resident], color=f"C{number}", label=f"{_label(record)}, resident")
        axes.plot(share, [size / 1e9 for size in private], color=f"C{number}", linestyle=":", label="private")
        axes.axhline(TARGETS[record.row].must, color=f"C{number}", linewidth=0.5)
    axes.set_xlabel("share of the run")
    axes.set_ylabel("GB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return _saved(figure, folder, "benchmarks-memory.png", "memory over time; thin lines: what must be kept")


def _label(record: Record) -> str:
    return f"{record.row}, {record.case}" if record.case else record.row


def _number(value: float) -> str:
    """A number as a person would write it: small ratios as fractions."""
    return f"1/{1 / value:.0f}" if 0 < value < 0.1 else f"{value:.3g}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the charts need matplotlib: pip install 'onnx-woq[bench]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height))


def _colours() -> Any:
    """Twenty colours by number, after `_figure`."""
    from matplotlib import colormaps

    return colormaps["tab20"]


def _saved(figure: Any, folder: Path, name: str, text: str) -> tuple[str, str]:
    from matplotlib import pyplot as plt

    figure.savefig(folder / name, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return name, text
