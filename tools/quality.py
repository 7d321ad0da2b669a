"""What each method costs in accuracy: prints one row per configuration, all on one calibration.

    python tools/quality.py build/models/smollm2-permuted/model.onnx --calib calib.jsonl --dev wiki.txt code.txt
    python tools/quality.py … --bits 2 --methods RTN GPTQ BEST_2BIT
    python tools/quality.py build/models/minilm/model.onnx --calib calib.jsonl --dev wiki.txt code.txt --seqlen 128

Body MatMuls only (the head stays float) at accuracy level 0 unless said otherwise, so that nothing but the weights
differs from the float model. Every row is judged on each text of `--dev` by itself. The distance is the mean KL
divergence (nats per token) of language models, and 1 − cosine of the embeddings of others. The share removed is
`1 − distance / distance of RTN`; the one that counts is that of the worst text. Calibration takes the first samples of
its text and the judge the first rows of each of its own: nothing is drawn by chance, and the same command prints the
same rows (of a rotation, the seed is in its name). Seconds are of solving and writing; `--alone` gives every row a
calibration of its own and counts it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_woq import PRESETS, Recipe, evaluate, quantize, tune
from onnx_woq.runtime.evaluation.metrics import Metrics

CLIP = {"enable_mse_search": True}
ORDER = CLIP | {"group_order": True}
BALANCED = PRESETS["BALANCED_4BIT"]


STEPS: Mapping[str, dict[str, Any]] = {
    "rotated": {"rotation": True},
    "true sequential": {"true_sequential": True, "sequential_unit": "block"},
    "both streams": {"both_streams": True, "sequential_unit": "block"},
}
"""What goes on top of a preset: fields of its recipe."""


def _with(option: str, value: object) -> Recipe:
    return replace(BALANCED, options={**BALANCED.options, option: value})


METHODS: Mapping[str, Recipe] = {
    "RTN": Recipe("rtn"),
    "RTN, clip search": Recipe("rtn", options=CLIP),
    "GPTQ": Recipe("gptq"),
    "GPTQ, clip search": Recipe("gptq", options=CLIP),
    "GPTQ, act-order": Recipe("gptq", options={"actorder": True}),
    "GPTQ, act-order, clip search": Recipe("gptq", options={"actorder": True} | CLIP),
    "GPTQ, clip search, group order": Recipe("gptq", options=ORDER),
    "GPTQ, clip search, attention": Recipe("gptq", options=CLIP, attention_weighted=True),
    "GPTQ, clip search, group order, attention": Recipe("gptq", options=ORDER, attention_weighted=True),
    "AWQ": Recipe("awq"),
    "TEQ": Recipe("teq"),
    "HQQ": Recipe("hqq"),
    "BALANCED_4BIT, scaled by AWQ": _with("scaling", "awq"),
    "BALANCED_4BIT, scaled by TEQ": _with("scaling", "teq"),
    "BALANCED_4BIT, 1 descent": _with("descent_passes", 1),
    "BALANCED_4BIT, 2 descents": _with("descent_passes", 2),
    "BALANCED_4BIT, bias correction": replace(BALANCED, bias_correction=True),
    "BALANCED_4BIT, rank 16": replace(BALANCED, lowrank=16),
    "BALANCED_4BIT, groups of 64, rank 16": replace(BALANCED.with_spec(group_size=64), lowrank=16),
} | {
    f"{preset}, {step}": replace(PRESETS[preset], **fields)
    for preset in ("BALANCED_4BIT", "BEST_2BIT")
    for step, fields in STEPS.items()
}


Measured = Mapping[str, Metrics]
"""What was measured of one model, by text."""


class Judge:
    """A metric for `tune` that remembers all that it measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.measured: dict[str, Measured] = {}

    def __call__(self, path: Path) -> float:
        """Returns the distance on the worst text; 0 of the float model from itself."""
        if Path(path) == self.arguments.model:
            return 0.0
        measured = self.measured[Path(path).parent.name] = measure(self.arguments, path)
        worst = max(map(distance, measured.values()))
        print(f"  {Path(path).parent.name}: {worst:.4f}", file=sys.stderr, flush=True)
        return worst


def measure(arguments: argparse.Namespace, path: Path) -> Measured:
    """Returns the distance of a written model from the float one on each text."""
    model = arguments.model
    judged = {"samples": arguments.rows, "seqlen": arguments.seqlen, "tokenizer": model.parent}
    return {text.stem: evaluate(path, model, text, **judged) for text in arguments.dev}


def distance(metrics: Metrics) -> float:
    """Returns what a share is taken of."""
    if metrics.kl is not None:
        return metrics.kl
    return 1 - (metrics.cosine or 0.0)


def removed(measured: Measured, rtn: Measured) -> float:
    """Returns the share of RTN's distance that is removed, on the worst text."""
    return min(1 - distance(measured[text]) / distance(rtn[text]) for text in measured)


def recipe_of(base: Recipe, arguments: argparse.Namespace) -> Recipe:
    """A configuration on the grid and the data that the command line names."""
    grid = {name: getattr(arguments, name) for name in ("bits", "group_size") if getattr(arguments, name) is not None}
    if arguments.symmetric:
        grid["symmetric"] = True
    return replace(
        base.with_spec(**grid),
        lm_head=arguments.head,
        accuracy_level=arguments.accuracy_level,
        nsamples=arguments.samples,
        pad_max_length=arguments.seqlen,
    )


def head(arguments: argparse.Namespace) -> None:
    """Prints the head of the table, in Markdown."""
    texts = [text.stem for text in arguments.dev]
    columns = ["method", *texts, "removed, worst text", "same top-1, worst", "MB", "s", "CPU s"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def show(name: str, measured: Measured, rtn: Measured, size: int, seconds: float, cpu: float | None) -> dict[str, Any]:
    """Prints a row of the table; returns it as a dictionary ready for JSON."""
    cells = [f"{distance(one):.4f} ± {one.kl_se or 0:.4f}" for one in measured.values()]
    top1 = [one.top1 for one in measured.values() if one.top1 is not None]
    share = removed(measured, rtn)
    cells += [f"{share:.3f}", f"{min(top1):.4f}" if top1 else "", f"{size / 1e6:.1f}", f"{seconds:.0f}"]
    print("| " + " | ".join([name, *cells, "" if cpu is None else f"{cpu:.0f}"]) + " |", flush=True)
    texts = {text: one.to_dict() for text, one in measured.items()}
    return {"method": name, "removed": share, "bytes": size, "seconds": seconds, "cpu": cpu, "texts": texts}


def together(arguments: argparse.Namespace, recipes: Mapping[str, Recipe]) -> list[dict[str, Any]]:
    """Prints the rows on one calibration for all."""
    judge = Judge(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        result = tune(
            arguments.model, judge, arguments.calib, configs=recipes, higher_is_better=False, objective="best",
            tolerance=1e9, criterion="absolute", workdir=folder, tokenizer=arguments.model.parent,
        )  # fmt: skip
    rtn: Measured = {}
    for trial in result.trials:
        found = [m for name, m in judge.measured.items() if name.endswith(trial.recipe.fingerprint())]
        if trial.status != "ok" or not found:
            print(f"| {trial.name} | {trial.status}: {trial.error} |")
            continue
        rtn = rtn or found[0]
        rows.append(show(trial.name, found[0], rtn, trial.bytes or 0, trial.seconds, None))
    return rows


def alone(arguments: argparse.Namespace, recipes: Mapping[str, Recipe]) -> list[dict[str, Any]]:
    """Prints the rows on a calibration for each."""
    rows: list[dict[str, Any]] = []
    rtn: Measured = {}
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.monotonic(), time.process_time()
            report = quantize(arguments.model, Path(folder) / "model.onnx", recipe, arguments.calib)
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            measured = measure(arguments, report.output)
        rtn = rtn or measured
        rows.append(show(name, measured, rtn, report.bytes_after, wall, cpu))
    return rows


def parser_of(description: str) -> argparse.ArgumentParser:
    """A command line that names a model, and what it is calibrated and judged on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--dev", required=True, nargs="+", type=Path, help="texts to judge on, not the calibration's")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="sequences judged")
    return parser


def main() -> None:
    """Reads the command line and prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--head", action="store_true", help="quantize the head as well")
    parser.add_argument("--accuracy-level", type=int, default=0)
    parser.add_argument("--bits", type=int, help="of every row")
    parser.add_argument("--group-size", type=int, help="of every row")
    parser.add_argument("--symmetric", action="store_true", help="every row on symmetric grids")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *PRESETS], metavar="NAME", help="rows; RTN first")
    parser.add_argument("--alone", action="store_true", help="calibrate for each row, and count it")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    known = {**METHODS, **PRESETS}
    four = [name for name, recipe in METHODS.items() if recipe.spec.bits == 4]
    recipes = {name: recipe_of(known[name], arguments) for name in arguments.methods or four}
    head(arguments)
    table = (alone if arguments.alone else together)(arguments, recipes)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
