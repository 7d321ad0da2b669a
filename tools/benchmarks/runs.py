"""What the rows have in common: our own runs, in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import child
from benchmarks.models import scratch

PEERS = Path(__file__).resolve().parent.parent / "peers"
RTN, GPTQ, BODY = "RTN_G32ASYM", "GPTQ_G32ASYM", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL"
COMMAND = Path(sys.executable).with_name("onnx-woq")


def ours(
    path: Path, config: str, ids: Path | None = None, settings: Mapping[str, Any] | None = None, **job: Any
) -> Callable[[], dict[str, Any]]:
    """A function that quantizes `path` in a process of its own and says what it took; nothing is left behind."""
    whole = {"do": "quantize", "model": path, "config": config, "output": scratch("ours.onnx"), **job}
    whole |= {"ids": str(ids)} if ids else {}
    return lambda: child(whole, **(settings or {})).to_dict()


def phases_of(
    path: Path, config: str, ids: Path | None = None, settings: Mapping[str, Any] | None = None, **job: Any
) -> dict[str, float]:
    """Thread-seconds by phase, from one more run that is sampled."""
    return dict(ours(path, config, ids, settings, phases=True, **job)()["phases"])


def remove(path: Path) -> int:
    """Removes an .onnx file and its data; their bytes."""
    found = list(path.parent.glob(f"{path.name}*"))
    size = sum(file.stat().st_size for file in found)
    for file in found:
        file.unlink()
    return size
