"""What was measured, kept as JSON: one file per row of the table, one entry per measurement."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench")
PACKAGES = ("onnx-woq", "onnxruntime", "onnx", "onnx-ir", "numpy", "scipy")


@dataclass(frozen=True)
class Target:
    """A row of the table: what is compared, and what must be reached. Lower is better unless `at_least`."""

    measure: str
    must: float
    stretch: float | None = None
    unit: str = ""
    at_least: bool = False

    def verdict(self, value: float) -> str:
        """Whether `value` reaches the stretch goal, the goal, or neither."""
        reaches = (lambda goal: value >= goal) if self.at_least else (lambda goal: value <= goal)
        if self.stretch is not None and reaches(self.stretch):
            return "stretch"
        return "reached" if reaches(self.must) else "**not reached**"


TARGETS = {
    "rtn-copy": Target("RTN 4-bit, warm files: time ÷ time to copy the input file", 3, 1.5),
    "rtn-ort": Target("RTN time ÷ onnxruntime's own quantizer (C++), load to saved", 0.6, 0.3),
    "gptq-floor": Target("GPTQ end to end ÷ flop floor", 2.0, 1.3),
    "gptq-onc": Target("GPTQ time ÷ onnx-neural-compressor's", 1 / 15, 1 / 40),
    "gptq-llmc": Target("GPTQ CPU time ÷ llm-compressor's in PyTorch, one thread each", 0.5, 0.3),
    "presets": Target("the five presets, without evaluation ÷ GPTQ_G32ASYM alone", 2.0, 1.5),
    "memory-rtn": Target("peak RSS: RTN on a 7B-shaped float16 model", 1.5, 0.8, "GB"),
    "memory-gptq": Target("peak RSS: GPTQ on the same, 8 × 512 tokens", 5, 3, "GB"),
    "growth": Target("growth: time per layer, 32 layers ÷ 8 layers of one shape", 1.1),
    "decode": Target("decode tokens/s, 4-bit ÷ float", 2, 3, at_least=True),
}


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        row: a key of `TARGETS`, or "machine".
        case: the model and data it was made on.
        value: the number that stands in the table; None for the machine's own rates.
        rounds: every repetition, one dictionary per side.
        medians: the numbers worth reading.
        phases: thread-seconds by phase, from a run of its own.
        note: what a reader must know to judge the number.
    """

    row: str
    case: str
    value: float | None
    rounds: Sequence[Mapping[str, Any]]
    medians: Mapping[str, float]
    phases: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    command: str = ""
    time: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model, memory = "", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            memory = int(line.split()[1]) * 1024
    load = os.getloadavg()[0]
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory": memory, "load": load}


def versions() -> dict[str, str]:
    """Of Python and of what takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def add(record: Record) -> Record:
    """Appends a record to its row's file, with what it was measured on, and returns it so."""
    given = [
        f"…/{Path(part).name}" if os.path.isabs(part) else part for part in sys.argv[1:]
    ]  # others have other paths
    command = " ".join(["python", "tools/bench.py", *given])
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    whole = Record(**{**asdict(record), "command": command, "time": now, "machine": machine(), "versions": versions()})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record.row}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    open_store = path.with_suffix(".tmp")
    open_store.write_text(json.dumps([*kept, asdict(whole)], indent=1))
    os.replace(open_store, path)
    return whole


def latest() -> list[Record]:
    """The last measurement of each row and case, rows in the table's order."""
    found: dict[tuple[str, str], Record] = {}
    for row in ("machine", *TARGETS):
        path = RESULTS / f"{row}.json"
        for entry in json.loads(path.read_text()) if path.exists() else []:
            found[row, entry["case"]] = Record(**entry)
    return list(found.values())


def line(record: Record) -> str:
    """One line for people: the number, its goals and the medians."""
    medians = ", ".join(f"{name} {value:.4g}" for name, value in record.medians.items())
    target = TARGETS.get(record.row)
    if target is None or record.value is None:
        return f"{record.row} | {record.case} | {medians}"
    goals = f"must {target.must:.3g}" + (f", stretch {target.stretch:.3g}" if target.stretch else "")
    verdict = target.verdict(record.value).strip("*")
    unit = f" {target.unit}" if target.unit else ""
    return f"{record.row} | {record.case} | {record.value:.3g}{unit} ({goals}) {verdict} | {medians} | {record.note}"
