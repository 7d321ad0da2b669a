"""The rows of the table that time RTN, memory, growth and decoding; those of GPTQ's time are in gptq_rows.py."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import child, median, medians, paired, pick, ratio, run
from benchmarks.models import files, model, scratch, tokens
from benchmarks.records import Record
from benchmarks.runs import COMMAND, PEERS, RTN, ours, phases_of, remove


def machine(repeat: int) -> Record:
    """The rates everything is held against: matrix products, file copies, memory copies."""
    path = model("smollm2-permuted")
    sides = {
        f"sgemm {threads}": lambda threads=threads: child({"do": "sgemm", "threads": threads}).to_dict()
        for threads in (1, 2)
    }
    sides["memory"] = lambda: child({"do": "memory"}).to_dict()
    sides["file"] = lambda: child({"do": "copy", "files": files(path), "output": scratch("copy")}).to_dict()
    rounds = paired(repeat, sides)
    return Record(
        "machine",
        "",
        None,
        rounds,
        medians(
            rounds,
            {
                "sgemm GFLOP/s, 1 thread": "sgemm 1.gflops",
                "sgemm GFLOP/s, 2 threads": "sgemm 2.gflops",
                "memory copy GB/s": "memory.bytes_per_second",
                "warm file copy GB/s": "file.bytes_per_second",
            },
        ),
    )


def rtn_copy(name: str, repeat: int) -> Record:
    """RTN against copying the input: the call in a process that has imported everything, and the whole command."""
    path, out = model(name), scratch("command.onnx")
    command = [COMMAND, "quantize", path, "-o", out, "--config", RTN]

    def whole() -> dict[str, Any]:
        done = run(command).to_dict()
        remove(out)
        return done

    copy = {"do": "copy", "files": files(path), "output": scratch("copy")}
    rounds = paired(
        repeat,
        {
            "copy": lambda: child(copy).to_dict(),
            "quantize": ours(path, RTN, repeat=2),
            "command": whole,
        },
    )
    value, command_ratio = (ratio(rounds, key, "copy.wall") for key in ("quantize.wall", "command.process.wall"))
    first = ratio(rounds, "quantize.first.wall", "copy.wall")
    note = (
        f"quantize() with everything imported; the first call of a process, imports included: {first:.2f}; "
        f"the whole command: {command_ratio:.2f}"
    )
    return Record(
        "rtn-copy",
        name,
        value,
        rounds,
        medians(
            rounds,
            {
                "quantize() s": "quantize.wall",
                "first call s": "quantize.first.wall",
                "command s": "command.process.wall",
                "copy s": "copy.wall",
                "CPU s": "quantize.cpu",
                "RSS MB": "quantize.process.rss",
            },
        ),
        phases_of(path, RTN),
        note,
    )


def rtn_ort(name: str, repeat: int) -> Record:
    """RTN against onnxruntime's quantizer on the same MatMuls, load to saved; the head stays float in both."""
    path, out = model(name), scratch("theirs.onnx")

    def theirs() -> dict[str, Any]:
        done = run([sys.executable, PEERS / "ort_rtn.py", path, out, "--float-head"]).to_dict()
        return done | {"bytes_after": remove(out)}

    rounds = paired(repeat, {"theirs": theirs, "ours": ours(path, RTN, repeat=2, changes={"lm_head": False})})
    made, linears = int(median(rounds, "theirs.nodes")), int(median(rounds, "ours.sites"))
    note = (
        f"everything imported in both; the first call of a process, imports included: "
        f"{ratio(rounds, 'ours.first.wall', 'theirs.wall'):.2f}; CPU {ratio(rounds, 'ours.cpu', 'theirs.cpu'):.2f}; "
        f"{linears} MatMuls, theirs {made}"
    )
    return Record(
        "rtn-ort",
        name,
        ratio(rounds, "ours.wall", "theirs.wall"),
        rounds,
        medians(
            rounds,
            {
                "ours s": "ours.wall",
                "ours first call s": "ours.first.wall",
                "theirs s": "theirs.wall",
                "theirs load s": "theirs.load",
                "theirs quantize s": "theirs.solve",
                "theirs save s": "theirs.save",
                "ours MB": "ours.bytes_after",
                "theirs MB": "theirs.bytes_after",
                "ours RSS MB": "ours.process.rss",
                "theirs RSS MB": "theirs.process.rss",
            },
        ),
        note=note,
    )


def memory(config: str, name: str, samples: int, length: int, repeat: int, max_memory: int | None) -> Record:
    """Peak resident memory of a whole process, pages of mapped files included."""
    path = model(name)
    gptq = config != RTN
    ids = tokens(path, samples, length, None) if gptq else None
    limits = {"max_memory": max_memory} if max_memory else {}
    rounds = paired(repeat, {"ours": ours(path, config, ids, **limits)})
    private, wall = median(rounds, "ours.process.private"), median(rounds, "ours.wall")
    size = sum(Path(file).stat().st_size for file in files(path))
    bound = f", max_memory {max_memory / 1e9:.1f} GB" if max_memory else ""
    note = f"{size / 1e9:.1f} GB of input{bound}; private {private / 1e9:.2f} GB; {wall:.0f} s"
    case = f"{name}, {samples} × {length}" if gptq else name
    peak = max(pick(one, "ours.process.rss") for one in rounds)
    return Record(
        "memory-gptq" if gptq else "memory-rtn",
        case,
        peak / 1e9,
        rounds,
        medians(rounds, {"CPU s": "ours.cpu"})
        | {"peak RSS GB": peak / 1e9, "private GB": private / 1e9, "wall s": wall},
        note=note,
    )


def growth(config: str, family: str, layers: list[int], samples: int, length: int, repeat: int) -> Record:
    """Time per layer as layers are added; head and embedding, the same in all, are taken out by differences too."""
    sides = {}
    for count in layers:
        path = model(f"{family}-{count}layers")
        ids = None if config == RTN else tokens(path, samples, length, None)
        run_it = ours(path, config, ids, changes={"lm_head": False}, warm=model("tiny-float32"))
        sides[str(count)] = partial(_warm, path, run_it)
    rounds = paired(repeat, sides)
    few, most = layers[0], layers[-1]
    times = {count: median(rounds, f"{count}.wall") for count in layers}
    slopes = [(times[b] - times[a]) / (b - a) for a, b in pairwise(layers)]
    value = ratio(rounds, f"{most}.wall", f"{few}.wall") * few / most
    added = ", ".join(f"{slope:.3f}" for slope in slopes)
    note = f"whole time ÷ layers; seconds per layer added from one size to the next: {added}"
    return Record(
        "growth",
        f"{config}, {family}, {samples} × {length}",
        value,
        rounds,
        {f"{count} layers, s per layer": times[count] / count for count in layers}
        | medians(rounds, {f"{count} layers RSS MB": f"{count}.process.rss" for count in layers}),
        note=note,
    )


def _warm(path: Path, run_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads a model's files first: a layer costs the same only where reading it does."""
    for file in files(path):
        with Path(file).open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    return run_it()


def decode(name: str, threads: int, new: int, repeat: int) -> Record:
    """Tokens per second of the same loop on the float and the 4-bit model."""
    path, quantized = model(name), scratch("decode") / "model.onnx"
    run([COMMAND, "quantize", path, "-o", quantized, "--config", RTN])
    prompt = list(range(100, 116))
    job = {"do": "decode", "threads": threads, "prompt": prompt, "tokens": new}
    rounds = paired(
        repeat,
        {
            "float": lambda: child({**job, "model": path}).to_dict(),
            "4-bit": lambda: child({**job, "model": quantized}).to_dict(),
        },
    )
    shutil.rmtree(quantized.parent)
    value = ratio(rounds, "4-bit.tokens_per_second", "float.tokens_per_second")
    note = f"{new} tokens after {len(prompt)}, accuracy level 4, head quantized"
    return Record(
        "decode",
        f"{name}, {threads} thread{'s' * (threads > 1)}",
        value,
        rounds,
        medians(
            rounds,
            {
                "float tokens/s": "float.tokens_per_second",
                "4-bit tokens/s": "4-bit.tokens_per_second",
                "float prefill s": "float.prefill",
                "4-bit prefill s": "4-bit.prefill",
                "float RSS MB": "float.process.rss",
                "4-bit RSS MB": "4-bit.process.rss",
            },
        ),
        note=note,
    )
