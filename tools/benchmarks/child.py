"""One measured job, in a process of its own: `python child.py JOB`, JSON in and one line of JSON out.

Nothing is imported before it is needed: what a job imports is part of what it takes, and is told apart.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Quantizes `model` to `output`, `repeat` times in this process; the first call still imports on the way.

    `warm` names a small model that is quantized before the clock starts.
    """
    start = time.monotonic()
    from dataclasses import replace

    import onnx_woq
    from onnx_woq.presets import preset

    recipe = replace(preset(job["config"]), **job.get("changes", {}))
    imported = time.monotonic() - start
    if job.get("warm"):  # a model that takes no time, so that nothing is imported while the clock runs
        onnx_woq.quantize(job["warm"], job["output"], recipe, "random", samples=1, seqlen=8)
    limits = {"max_memory": job["max_memory"]} if job.get("max_memory") else {}

    def work(progress: Callable[[str, int, int], None]) -> Any:
        return onnx_woq.quantize(job["model"], job["output"], recipe, job.get("ids"), progress=progress, **limits)

    runs = [_timed(work, job) for _ in range(job.get("repeat", 1))]
    made = runs[-1].pop("returned")
    for run in runs[:-1]:
        del run["returned"]
    groups = [(group.k, group.n) for group in made.groups]
    sizes = {"sites": sum(len(group.nodes) for group in made.groups), "bytes_after": made.bytes_after}
    return {**runs[-1], "first": runs[0], "import": imported, "taps": groups, **sizes}


def tune(job: dict[str, Any]) -> dict[str, Any]:
    """Tries every preset on `model` with an evaluation that costs nothing."""
    import onnx_woq

    def work(progress: Callable[[str, int, int], None]) -> Any:
        return onnx_woq.tune(
            job["model"], lambda _: 1.0, job["ids"], objective="best", workdir=job["output"], progress=progress
        )

    run = _timed(work, job)
    result = run.pop("returned")
    trials = {trial.name: trial.seconds for trial in result.trials}
    failed = [f"{trial.name}: {trial.error}" for trial in result.trials if trial.status != "ok"]
    return {**run, "trials": trials, "failed": failed}


def _timed(work: Callable[[Callable[[str, int, int], None]], Any], job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one call into a place where nothing is yet, when each stage ended, and, if asked for, phases."""
    from benchmarks.phases import Sampler

    _remove(Path(job["output"]))
    stages: dict[str, float] = {}
    sampler = Sampler() if job.get("phases") else None
    os.sync()  # nobody else's pages are written while the clock runs
    wall, cpu = time.monotonic(), _cpu()
    with sampler or nullcontext():
        returned = work(lambda stage, *_: stages.__setitem__(stage, time.monotonic() - wall))
    run = {"wall": time.monotonic() - wall, "cpu": _cpu() - cpu, "stages_end": stages, "returned": returned}
    if sampler:
        run |= {"phases": sampler.seconds(), "phases_other": sampler.unsorted()}
    _remove(Path(job["output"]))
    return run


def copy(job: dict[str, Any]) -> dict[str, Any]:
    """Copies the files of a model to `output` and removes them again."""
    target = Path(job["output"])
    target.mkdir(parents=True)
    os.sync()
    wall, cpu = time.monotonic(), _cpu()
    for file in job["files"]:
        shutil.copyfile(file, target / Path(file).name)
    run = {"wall": time.monotonic() - wall, "cpu": _cpu() - cpu}
    size = sum(file.stat().st_size for file in target.iterdir())
    _remove(target)
    return run | {"bytes": size, "bytes_per_second": size / run["wall"]}


def sgemm(job: dict[str, Any]) -> dict[str, Any]:
    """float32 matrix products of numpy's BLAS for a while: median and best rate."""
    import statistics

    import numpy as np
    from threadpoolctl import threadpool_limits

    n = job.get("n", 3072)
    a, b = (np.random.default_rng(i).standard_normal((n, n), np.float32) for i in range(2))
    out = np.empty_like(a)
    rates = []
    with threadpool_limits(job["threads"]):
        np.matmul(a, b, out=out)
        until = time.monotonic() + job.get("seconds", 4)
        while time.monotonic() < until or len(rates) < 3:
            start = time.monotonic()
            np.matmul(a, b, out=out)
            rates.append(2 * n**3 / (time.monotonic() - start) / 1e9)
    return {"gflops": statistics.median(rates), "best": max(rates), "n": n, "products": len(rates)}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Copies of a large array: bytes copied per second, best and median."""
    import statistics

    import numpy as np

    source = np.ones(job.get("bytes", 1 << 29), np.uint8)
    target = np.zeros_like(source)
    rates = []
    for _ in range(job.get("repeat", 7)):
        start = time.monotonic()
        np.copyto(target, source)
        rates.append(source.nbytes / (time.monotonic() - start))
    return {"bytes_per_second": statistics.median(rates), "best": max(rates)}


def ids(job: dict[str, Any]) -> dict[str, Any]:
    """Writes `samples` rows of `length` token ids: of a text by the model's tokenizer, else drawn from its words."""
    import numpy as np

    from onnx_woq.graph.io.model import load
    from onnx_woq.runtime.data.feeds import feeds, model_inputs

    model = Path(job["model"])
    inputs = model_inputs(load(model))
    samples, length = job["samples"], job["length"]
    if job.get("text"):
        rows = feeds(job["text"], inputs, samples=samples, seqlen=length, exact_length=True, model_dir=model.parent)
        tokens = np.concatenate([row["input_ids"] for row in rows])
    else:
        words = next(info.limit for info in inputs if info.name == "input_ids") or 1000
        tokens = np.random.default_rng(0).integers(0, words, (samples, length))
    np.savez(job["output"], input_ids=tokens)
    return {"shape": tokens.shape}


def llama(job: dict[str, Any]) -> dict[str, Any]:
    """Writes a Llama-shaped model with random weights."""
    from dataclasses import replace

    from llama import SHAPES, write_llama

    shape = SHAPES[job["shape"]]
    if job.get("layers"):
        shape = replace(shape, layers=job["layers"])
    return {"path": str(write_llama(job["output"], shape, dtype=job["dtype"], style=job.get("style", "optimum")))}


def flops(job: dict[str, Any]) -> dict[str, Any]:
    """What GPTQ cannot do without on `model`: see `floor.py`."""
    from benchmarks.floor import needed

    return needed(Path(job["model"]), job["config"], job.get("changes", {}), Path(job["ids"]))


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Generates tokens with `model`: see `decode.py`."""
    from benchmarks.decode import generate

    return generate(Path(job["model"]), job["threads"], job["prompt"], job["tokens"])


def _cpu() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def _remove(place: Path) -> None:
    """Removes a result: a folder, or an .onnx file and its data."""
    if place.is_dir():
        shutil.rmtree(place)
    for file in place.parent.glob(f"{place.name}*"):
        file.unlink()


JOBS = {job.__name__: job for job in (quantize, tune, copy, sgemm, memory, ids, llama, flops, decode)}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(JOBS[given["do"]](given)))
