"""Evaluations for workers to import: they write down where they ran, and misbehave when they are told to."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import measure
from tests.zoo import small as zoo

PATIENCE = 30.0


@dataclass(frozen=True)
class Call:
    """One call of an evaluation.

    Attributes:
        pid: of the process it ran in.
        bits: of the model it judged; 0 for the float one.
        overlapped: whether the next model was being made before it ended.
        journal: names of the trials whose verdicts were known when it ended.
        bytes: of all files in the work folder when it ended.
    """

    pid: int
    bits: int
    overlapped: bool
    journal: list[str]
    bytes: int


@dataclass
class Recorded:
    """A metric by number of bits.

    Attributes:
        log: gets a line for every call.
        metrics: by number of bits, 0 being the float model; "raise", "odd", "exit", "kill" and "missing" misbehave, the
            last two only in another process.
        work: the work folder. If it is given, a call does not end before the folder of the next trial is there.
        order: bits in the order of the trials, the last of which waits for nothing.
        home: the process it was made in.
    """

    log: Path
    metrics: dict[int, Any]
    work: Path | None = None
    order: tuple[int, ...] = (2, 3, 4, 8)
    home: int = field(default_factory=os.getpid)

    def __call__(self, path: Path) -> Any:
        recipe = measure.recipe_of(Path(path))
        bits = recipe["spec"]["bits"] if recipe else 0
        overlapped = bool(bits and self.work) and self._seen_next(bits)
        names = [line["name"] for line in self._journal() if "name" in line]
        size = sum(p.stat().st_size for p in self.work.rglob("*") if p.is_file()) if self.work else 0
        call = {"pid": os.getpid(), "bits": bits, "overlapped": overlapped, "journal": names, "bytes": size}
        with self.log.open("a") as file:
            file.write(json.dumps(call) + "\n")
        return self._metric(self.metrics[bits])

    def _metric(self, metric: Any) -> Any:
        if metric == "raise":
            raise ValueError("out of cheese")
        if metric == "odd":
            raise OddError(1, 2)
        if metric == "exit":
            raise SystemExit("enough")
        if os.getpid() != self.home:
            if metric == "kill" and self.log.read_text().count("\n") < 3:  # once, and not the float model
                os.kill(os.getpid(), signal.SIGKILL)
            if metric == "missing":
                raise FileNotFoundError("no such file on this machine")
        return 0.5 if metric in ("kill", "missing") else metric

    def _seen_next(self, bits: int) -> bool:
        """Whether the next trial's folder comes into being while this one is waiting."""
        assert self.work is not None
        if os.getpid() == self.home or bits == self.order[-1]:
            return False
        following = self.order[self.order.index(bits) + 1]
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if any(self.work.glob(f"b{following}-*/.*.onnx-woq-partial/journal")) or any(
                self.work.glob(f"b{following}-*/*.onnx")
            ):
                return True
            time.sleep(0.01)
        return False

    def _journal(self) -> list[dict[str, Any]]:
        file = self.work / "journal.jsonl" if self.work else None
        return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def calls(log: Path) -> list[Call]:
    """What has been recorded, but for the float model."""
    found = [Call(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    return [call for call in found if call.bits]


class OddError(Exception):
    """Can be pickled, and not be unpickled: in a pool's result it would break the pool."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class OnlyHere:
    """An evaluation that a worker cannot unpickle."""

    def __call__(self, path: Path) -> float:
        return 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_in, (os.getpid(),)


def _only_in(pid: int) -> OnlyHere:
    if os.getpid() != pid:
        raise ImportError("this module is not installed here")
    return OnlyHere()


def note(log: Path) -> float:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return 1.0


@dataclass
class Distance:
    """dB between the float model's outputs and a quantized one's."""

    model: Path
    log: Path

    def __call__(self, path: Path) -> float:
        note(self.log)
        data = zoo.lm_feeds(zoo.token_ids(4, seed=3))
        noise = measure.sqnr(measure.run(self.model, data)["logits"], measure.run(Path(path), data)["logits"])
        return noise if math.isfinite(noise) else 100.0
