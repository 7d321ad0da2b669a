"""The rows of the table that time GPTQ: against its arithmetic, its peers, and all presets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import child, median, medians, paired, ratio, run
from benchmarks.models import model, scratch, tokens
from benchmarks.records import Record
from benchmarks.runs import BODY, GPTQ, PEERS, ours, phases_of, remove


def gptq_floor(name: str, samples: int, length: int, repeat: int, text: Path | None, **job: Any) -> Record:
    """GPTQ end to end against its arithmetic at the measured matrix-product rate, measured before each run."""
    path = model(name)
    ids = tokens(path, samples, length, text)
    counted = child({"do": "flops", "model": path, "config": GPTQ, "ids": ids}).said
    least, usual = sum(counted["least"].values()), sum(counted["usual"].values())
    cores = len(os.sched_getaffinity(0))
    rounds = paired(
        repeat,
        {
            "all cores": lambda: child({"do": "sgemm", "threads": cores}).to_dict(),
            "one core": lambda: child({"do": "sgemm", "threads": 1}).to_dict(),
            "ours": ours(path, GPTQ, ids, **job),
        },
    )
    for one in rounds:
        one["floor"] = {
            "wall": least / 1e9 / one["all cores"]["gflops"],
            "cpu": least / 1e9 / one["one core"]["gflops"],
        }
    cpu = ratio(rounds, "ours.cpu", "floor.cpu")
    value = ratio(rounds, "ours.wall", "floor.wall")
    parts = ", ".join(f"{part} {count / 1e12:.2f}" for part, count in counted["least"].items())
    note = (
        f"wall on all cores; CPU ÷ floor at one core's rate {cpu:.2f}; floor {least / 1e12:.2f} TFLOP ({parts}); "
        f"with full products counted for factor and solve {value * least / usual:.2f}"
    )
    return Record(
        "gptq-floor",
        f"{name}, {samples} × {length}",
        value,
        rounds,
        medians(
            rounds,
            {
                "wall s": "ours.wall",
                "CPU s": "ours.cpu",
                "floor wall s": "floor.wall",
                "floor CPU s": "floor.cpu",
                "sgemm all cores": "all cores.gflops",
                "sgemm one core": "one core.gflops",
                "RSS MB": "ours.process.rss",
            },
        )
        | {
            f"floor {part} CPU s": count / 1e9 / median(rounds, "one core.gflops")
            for part, count in counted["least"].items()
        },
        phases_of(path, GPTQ, ids, **job),
        note,
    )


def gptq_onc(
    name: str, samples: int, length: int, repeat: int, text: Path | None, python: Path, seconds: float
) -> Record:
    """GPTQ against onnx-neural-compressor's on the same calibration; the head stays float in both."""
    path, out = model(name), scratch("theirs.onnx")
    ids = tokens(path, samples, length, text)

    def theirs() -> dict[str, Any]:
        command = [python, PEERS / "onc_gptq.py", path, ids, out, "--seconds", seconds]
        done = run(command, env={"PYTHONHASHSEED": "0"}).to_dict()  # the order of its tensors follows from it
        remove(out)
        return done | _extrapolated(done)

    rounds = paired(repeat, {"theirs": theirs, "ours": ours(path, BODY, ids)})
    wall, cpu = (ratio(rounds, f"ours.{kind}", f"theirs.whole_{kind}") for kind in ("wall", "cpu"))
    finished = all(one["theirs"]["finished"] for one in rounds)
    done, total = (int(median(rounds, f"theirs.{key}")) for key in ("tensors_done", "tensors"))
    how = "ran to its end" if finished else f"stopped after {done} of {total} tensors, the rest by the mean of those"
    note = f"the larger of wall 1/{1 / wall:.0f} and CPU 1/{1 / cpu:.0f}; theirs {how}"
    return Record(
        "gptq-onc",
        f"{name}, {samples} × {length}",
        max(wall, cpu),
        rounds,
        medians(
            rounds,
            {
                "ours s": "ours.wall",
                "theirs s": "theirs.whole_wall",
                "ours CPU s": "ours.cpu",
                "theirs CPU s": "theirs.whole_cpu",
                "theirs measured s": "theirs.wall",
                "theirs RSS MB": "theirs.rss",
                "ours RSS MB": "ours.process.rss",
            },
        ),
        note=note,
    )


def _extrapolated(done: Mapping[str, Any]) -> dict[str, float]:
    """What all tensors take, from what those took that were done; what was measured if all were."""
    if done["finished"]:
        return {"whole_wall": done["wall"], "whole_cpu": done["cpu"]}
    if not done["per_tensor"]:
        raise RuntimeError("no tensor was done in that time: give it more --seconds")
    means = [sum(column) / len(column) for column in zip(*done["per_tensor"], strict=True)]
    return {
        "whole_wall": done["start_wall"] + means[0] * done["tensors"],
        "whole_cpu": done["start_cpu"] + means[1] * done["tensors"],
    }


def gptq_llmc(
    name: str, samples: int, length: int, repeat: int, text: Path | None, python: Path, checkpoint: Path
) -> Record:
    """GPTQ against llm-compressor's on one thread of one core, act-order with static groups, the head float in both."""
    path = model(name)
    ids = tokens(path, samples, length, text)
    alone = {"threads": 1, "one_core": True}
    rounds = paired(
        repeat,
        {
            "theirs": lambda: run([python, PEERS / "llmc_gptq.py", checkpoint, ids], **alone).to_dict(),
            "ours": ours(path, BODY, ids, alone, changes={"options": {"actorder": True}}),
            "rate": lambda: child({"do": "sgemm", "threads": 1}, **alone).to_dict(),
        },
    )
    whole = ratio(rounds, "ours.process.cpu", "theirs.process.cpu")
    note = f"the call alone, theirs without loading and saving; whole processes, imports included: {whole:.2f}"
    return Record(
        "gptq-llmc",
        f"{name}, {samples} × {length}",
        ratio(rounds, "ours.cpu", "theirs.cpu"),
        rounds,
        medians(
            rounds,
            {
                "ours CPU s": "ours.cpu",
                "theirs CPU s": "theirs.cpu",
                "ours process CPU s": "ours.process.cpu",
                "theirs process CPU s": "theirs.process.cpu",
                "sgemm one core": "rate.gflops",
                "ours RSS MB": "ours.process.rss",
                "theirs RSS MB": "theirs.process.rss",
            },
        ),
        phases_of(path, BODY, ids, alone, changes={"options": {"actorder": True}}),
        note,
    )


def presets(name: str, samples: int, length: int, repeat: int, text: Path | None) -> Record:
    """All five presets, judged by a function that costs nothing, against one of them."""
    path = model(name)
    ids = tokens(path, samples, length, text)
    job = {"do": "tune", "model": path, "ids": str(ids), "output": scratch("work")}
    rounds = paired(repeat, {"all": lambda: child(job).to_dict(), "gptq": ours(path, GPTQ, ids)})
    if failed := [text for one in rounds for text in one["all"]["failed"]]:
        raise RuntimeError(f"a preset failed: {failed}")
    trials = {f"{trial} s": median(rounds, f"all.trials.{trial}") for trial in rounds[0]["all"]["trials"]}
    note = f"CPU {ratio(rounds, 'all.cpu', 'gptq.cpu'):.2f}; the first trial that needs data pays for the calibration"
    return Record(
        "presets",
        f"{name}, {samples} × {length}",
        ratio(rounds, "all.wall", "gptq.wall"),
        rounds,
        medians(rounds, {"five presets s": "all.wall", "GPTQ alone s": "gptq.wall"}) | trials,
        phases_of_tune(job),
        note,
    )


def phases_of_tune(job: Mapping[str, Any]) -> dict[str, float]:
    """Thread-seconds by phase of tuning, from one more run that is sampled."""
    return dict(child({**job, "phases": True}).said["phases"])
