"""What mixed precision gains: prints a mix beside the uniform configuration that it is held against.

    python tools/mixes.py build/models/smollm2-permuted/model.onnx --calib calib.jsonl --dev wiki.txt code.txt --bpw 3.5
    python tools/mixes.py … --equal-bytes

`--bpw`: a mix of the body MatMuls (the head stays float) of so many bits per weight, and RTN with 4 bits in groups of
32. `--equal-bytes`: BEST_4BIT of everything, head and embedding included, and a mix in at most as many bytes of files.
Accuracy level 0, so that nothing but the weights differs from the float model. Nothing is drawn by chance: the same
command prints the same rows. Seconds are of the whole command that makes the model, calibration included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from quality import Measured, head, measure, parser_of, recipe_of, show

from onnx_woq import PRESETS, Recipe, quantize, tune
from onnx_woq.tuning.mixed.search import MIX


def row(
    arguments: argparse.Namespace, name: str, make: Callable[[Path], object], first: Measured | None
) -> tuple[Measured, int]:
    """Makes a model, judges and prints it; returns what was measured, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        wall, cpu = time.monotonic(), time.process_time()
        make(out)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        measured = measure(arguments, out)
        size = sum(file.stat().st_size for file in out.parent.iterdir())
    show(name, measured, first or measured, size, wall, cpu)
    return measured, size


def main() -> None:
    """Reads the command line and prints both rows."""
    parser = parser_of(__doc__)
    parser.add_argument("--workdir", type=Path, help="of the mix: sensitivities are kept there for other targets")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bpw", type=float)
    what.add_argument("--equal-bytes", action="store_true")
    arguments = parser.parse_args()
    arguments.head, arguments.accuracy_level = arguments.equal_bytes, 0
    arguments.bits = arguments.group_size = arguments.symmetric = None
    best = PRESETS["BEST_4BIT"]
    uniform = replace(best, embedding=best.spec) if arguments.equal_bytes else Recipe("rtn")
    recipe = recipe_of(uniform, arguments)
    name = "BEST_4BIT, head and embedding too" if arguments.equal_bytes else "RTN"
    head(arguments)
    first, size = row(arguments, name, lambda out: quantize(arguments.model, out, recipe, arguments.calib), None)
    target = {"target_size": size} if arguments.equal_bytes else {"target_bpw": arguments.bpw}
    base = recipe_of(MIX, arguments)
    row(
        arguments,
        "mix",
        lambda out: tune(
            arguments.model, None, arguments.calib, configs={"uniform": base}, output=out, workdir=arguments.workdir,
            samples=arguments.samples, seqlen=arguments.seqlen, **target,
        ),
        first,
    )  # fmt: skip


if __name__ == "__main__":
    main()
