"""Rounding to nearest by onnxruntime's own quantizer, load to saved; prints one line of JSON.

    python tools/peers/ort_rtn.py MODEL.onnx OUT.onnx [--float-head]

Any environment with onnxruntime and onnx_ir will do. 4 bits, groups of 32, asymmetric, MatMulNBits at accuracy level 4.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


def quantize(model: Path, output: Path, float_head: bool) -> dict[str, float]:
    """Seconds of one run, by phase."""
    start, cpu = time.monotonic(), time.process_time()
    loaded = onnx.load(model)
    marks = [time.monotonic()]
    head = [node.name for node in loaded.graph.node if "logits" in node.output and float_head]
    quantizer = MatMulNBitsQuantizer(
        loaded, block_size=32, is_symmetric=False, accuracy_level=4, bits=4, nodes_to_exclude=head
    )
    quantizer.process()
    marks.append(time.monotonic())
    quantizer.model.save_model_to_file(str(output), use_external_data_format=True)
    end = time.monotonic()
    phases = {"load": marks[0] - start, "solve": marks[1] - marks[0], "save": end - marks[1]}
    return {"wall": end - start, "cpu": time.process_time() - cpu, **phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--float-head", action="store_true", help="leave the MatMul that makes the logits float")
    arguments = parser.parse_args()
    run = quantize(arguments.model, arguments.output, arguments.float_head)
    result = onnx.load(arguments.output, load_external_data=False)
    nodes = sum(node.op_type == "MatMulNBits" for node in result.graph.node)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**run, "nodes": nodes, "rss": rss}))


if __name__ == "__main__":
    main()
