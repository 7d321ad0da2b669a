"""Run a command as a process of its own and say what it took: wall and CPU seconds, peak memory.

The parent stays small and imports nothing heavy: Linux counts the parent's memory at the time of the fork into the
child's peak.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")
STEERING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # they choose slower kernels than the machine has: unset
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ONNX_WOQ_THREADS")
SAMPLE_SECONDS = 0.05  # between two looks at a child's memory


class ChildFailed(RuntimeError):
    """A measured command did not end well; the message ends on what it printed."""


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        wall, cpu: seconds; `cpu` is user and system time, of its children as well.
        rss: peak resident bytes, pages of mapped files included.
        private: peak of its private bytes alone, as far as seen every 50 ms, its child processes' included.
        timeline: (seconds, resident bytes, private bytes) now and then.
        said: the JSON object it printed last.
    """

    wall: float
    cpu: float
    rss: int
    private: int
    timeline: list[tuple[float, int, int]]
    said: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For the record: the timeline thinned out."""
        step = max(1, len(self.timeline) // 200)
        whole = {"wall": self.wall, "cpu": self.cpu, "rss": self.rss, "private": self.private}
        return {"process": whole, "timeline": self.timeline[::step], **self.said}


def environment(threads: int | None = None, **more: str) -> dict[str, str]:
    """This process's environment without what steers BLAS; with so many threads everywhere, if given."""
    kept = {name: value for name, value in os.environ.items() if name not in (*STEERING, *THREADS)}
    if threads is not None:
        kept |= dict.fromkeys(THREADS, str(threads))
    return kept | more


def run(
    command: Sequence[str | Path],
    *,
    threads: int | None = None,
    one_core: bool = False,
    limit: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Usage:
    """Runs `command`, on the last core alone if so asked, and kills it with its children after `limit` seconds.

    Raises:
        ChildFailed: it returned another code than 0.
    """
    core = {max(os.sched_getaffinity(0))}
    start = time.monotonic()
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(threads, **(env or {})),
        start_new_session=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, core)) if one_core else None,
    ) as child:
        watch = _Watch(child.pid, start)
        readers = [_Reader(stream) for stream in (child.stdout, child.stderr)]
        timer = threading.Timer(limit or 0, _kill_group, [child.pid])
        if limit:
            timer.start()
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - start
        timer.cancel()
        watch.stop()
        child.returncode = os.waitstatus_to_exitcode(status)
        out, err = (reader.text() for reader in readers)
    if child.returncode:
        raise ChildFailed(f"{' '.join(map(str, command))} returned {child.returncode}: {(err or out)[-2000:]}")
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, watch.private, watch.seen, _last_json(out))


def child(job: Mapping[str, Any], **settings: Any) -> Usage:
    """Does a job of `child.py` in a process of its own."""
    return run([sys.executable, CHILD, json.dumps(dict(job), default=str)], **settings)


def paired(repeat: int, sides: Mapping[str, Callable[[], dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Runs the sides in turn, A B A B …, so that a machine that drifts is the same for all."""
    rounds = []
    for number in range(repeat):
        done = {}
        for name, side in sides.items():
            done[name] = side()
            print(f"  {number + 1}/{repeat} {name}: {_brief(done[name])}", file=sys.stderr, flush=True)
        rounds.append(done)
    return rounds


def pick(run: Mapping[str, Any], path: str) -> float:
    """The number at "process.wall" in a repetition."""
    found: Any = run
    for key in path.split("."):
        found = found[key]
    return float(found)


def median(rounds: Sequence[Mapping[str, Any]], path: str) -> float:
    """The median over repetitions of the number at `path`."""
    return statistics.median(pick(one, path) for one in rounds)


def ratio(rounds: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> float:
    """The median over repetitions of ours ÷ theirs, each pair measured in turn."""
    return statistics.median(pick(one, ours) / pick(one, theirs) for one in rounds)


def medians(rounds: Sequence[Mapping[str, Any]], paths: Mapping[str, str]) -> dict[str, float]:
    """The median at each path under its label, in the unit that the label ends on."""
    units = {"MB": 1e6, "GB": 1e9, "GB/s": 1e9}
    return {label: median(rounds, path) / units.get(label.rsplit(" ", 1)[-1], 1) for label, path in paths.items()}


@dataclass
class _Watch:
    """Looks at the memory of a process and of its children until told to stop."""

    pid: int
    start: float
    seen: list[tuple[float, int, int]] = field(default_factory=list)
    private: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            sizes = [_memory(pid) for pid in _family(self.pid)]
            resident, private = (sum(column) for column in zip(*sizes, strict=True))
            if resident:
                self.private = max(self.private, private)
                self.seen.append((round(time.monotonic() - self.start, 2), resident, private))

    def stop(self) -> None:
        self.done.set()
        self.thread.join()


class _Reader:
    """Empties a pipe so that the child never waits for us."""

    def __init__(self, stream: Any) -> None:
        self.parts: list[str] = []
        self.thread = threading.Thread(
            target=lambda: self.parts.extend(iter(lambda: stream.read(65536), "")), daemon=True
        )
        self.thread.start()

    def text(self) -> str:
        self.thread.join()
        return "".join(self.parts)


def _family(pid: int) -> list[int]:
    """A process, its children and theirs."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Resident and private bytes of a process."""
    sizes = {"VmRSS": 0, "RssAnon": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) * 1024
    return sizes["VmRSS"], sizes["RssAnon"]


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # a group of its own: start_new_session


def _last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with suppress(ValueError):
                return dict(json.loads(line))
    return {}


def _brief(result: Mapping[str, Any]) -> str:
    numbers = {name: result[name] for name in ("wall", "cpu", "tokens_per_second", "gflops") if name in result}
    numbers |= {f"process {name}": value for name, value in result.get("process", {}).items() if name != "private"}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float))
