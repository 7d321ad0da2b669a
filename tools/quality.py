"""What each method costs in accuracy on a language model: prints one row per configuration.

    python tools/quality.py build/models/smollm2-permuted/model.onnx --calib calib.txt --dev dev.txt

Body MatMuls only (the head stays float) at accuracy level 0 unless said otherwise, so that nothing but the weights
differs from the float model. The gap closed is `1 − KL / KL of RTN`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from onnx_woq import evaluate, quantize
from onnx_woq.presets import preset
from onnx_woq.recipe import Recipe

METHODS = {
    "RTN": Recipe("rtn"),
    "RTN, clip search": Recipe("rtn", options={"enable_mse_search": True}),
    "GPTQ": Recipe("gptq"),
    "GPTQ, clip search": Recipe("gptq", options={"enable_mse_search": True}),
    "GPTQ, act-order": Recipe("gptq", options={"actorder": True}),
    "GPTQ, act-order, clip search": Recipe("gptq", options={"actorder": True, "enable_mse_search": True}),
    "AWQ": Recipe("awq"),
}


def rows(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Quantizes and judges each method; dictionaries ready for JSON."""
    out = []
    chosen = {name: METHODS[name] for name in arguments.methods} if arguments.methods else METHODS
    for name, base in chosen.items():
        recipe = replace(
            base,
            spec=preset(arguments.config).spec if arguments.config else base.spec,
            lm_head=arguments.head,
            accuracy_level=arguments.accuracy_level,
            nsamples=arguments.samples,
            pad_max_length=arguments.seqlen,
        )
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.monotonic(), time.process_time()
            report = quantize(arguments.model, Path(folder) / "model.onnx", recipe, arguments.calib)
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            metrics = evaluate(
                report.output,
                arguments.model,
                arguments.dev,
                samples=arguments.rows,
                seqlen=arguments.seqlen,
                tokenizer=Path(arguments.model).parent,
            )
        out.append({"method": name, **metrics.to_dict(), "bytes": report.bytes_after, "seconds": wall, "cpu": cpu})
        first = out[0]["kl"]
        gap = 1 - metrics.kl / first  # type: ignore[operator]
        print(
            f"{name:<30} KL {metrics.kl:.4f} ± {metrics.kl_se:.4f}  closed {gap:5.2f}  top-1 {metrics.top1:.4f}  "
            f"ppl {metrics.ppl:.3f} (float {metrics.ppl_ref:.3f})  {report.bytes_after / 1e6:.1f} MB  "
            f"{wall:.1f} s, CPU {cpu:.1f} s",
            flush=True,
        )
    return out


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--dev", required=True, help="text to judge on, another than the calibration's")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="sequences judged")
    parser.add_argument("--head", action="store_true", help="quantize the head as well")
    parser.add_argument("--accuracy-level", type=int, default=0)
    parser.add_argument("--config", help="take the grid of this configuration")
    parser.add_argument("--methods", nargs="*", choices=METHODS)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    table = rows(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
