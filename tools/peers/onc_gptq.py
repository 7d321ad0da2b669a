"""GPTQ by onnx-neural-compressor, in an environment of its own; prints one line of JSON.

    python -m venv VENV && VENV/bin/pip install onnx-neural-compressor==1.0 prettytable scipy  (it imports the last two)
    VENV/bin/python tools/peers/onc_gptq.py MODEL.onnx IDS.npz OUT.onnx [--seconds 300]

It runs the whole model once per input tensor and sample. With --seconds it stops at the first tensor past that time;
what the rest would take then follows from the tensors that are done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from pathlib import Path

import numpy as np
import onnx
from onnx_neural_compressor import data_reader, utility
from onnx_neural_compressor.quantization import algorithm_entry, config


class OutOfTime(Exception):
    """The seconds that were given are over."""


class Samples(data_reader.CalibrationDataReader):
    """The rows of `ids [B, T]` as feeds of a decoder with an empty past."""

    def __init__(self, model: Path, ids: np.ndarray):
        graph = onnx.load(model, load_external_data=False).graph
        self.feeds = [_feed(graph, row[None]) for row in ids]
        self.rewind()

    def get_next(self):  # noqa: D102
        return next(self.left, None)

    def rewind(self):  # noqa: D102
        self.left = iter(self.feeds)


def _feed(graph: onnx.GraphProto, ids: np.ndarray) -> dict[str, np.ndarray]:
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for value in graph.input:
        if value.name.startswith("past"):
            dims = value.type.tensor_type.shape.dim
            feed[value.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), np.float32)
    return {value.name: feed[value.name] for value in graph.input}


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    ids = np.load(arguments.ids)["input_ids"]
    samples = Samples(arguments.model, ids)
    marks: list[tuple[float, float]] = []  # (wall, CPU) seconds when work on each tensor began
    totals: list[int] = []

    def mark(total: int, number: int) -> None:
        marks.append((time.monotonic(), cpu()))
        totals.append(total)
        if time.monotonic() - begin > arguments.seconds:
            raise OutOfTime(f"{number - 1} of {total}")

    utility.simple_progress_bar = mark
    settings = config.GPTQConfig(
        weight_bits=4, weight_group_size=32, weight_sym=False, accuracy_level=4, quant_last_matmul=False
    )
    begin, begin_cpu = time.monotonic(), cpu()
    try:
        model = algorithm_entry.gptq_quantize_entry(str(arguments.model), settings, samples)
        onnx.save_model(
            model, str(arguments.output), save_as_external_data=True, location=arguments.output.name + ".data"
        )
        finished = True
    except OutOfTime:
        finished = False
    wall, used = time.monotonic() - begin, cpu() - begin_cpu
    done = len(marks) - (not finished)
    first = (marks[0][0] - begin, marks[0][1] - begin_cpu)
    print(json.dumps({
        "wall": wall, "cpu": used, "finished": finished, "tensors": totals[-1], "tensors_done": done,
        "start_wall": first[0], "start_cpu": first[1],  # before the first tensor: load and session
        "per_tensor": [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)],
        "samples": ids.shape, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
