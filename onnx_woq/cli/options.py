"""The options of the commands, in lists, and the flags that each list hands to a command.

A **flag** is the value of an option as the user gave it. A decorator such as `data_options` adds a list of options to
a command and hands their flags over as one object, `data: DataFlags`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Size(click.ParamType):
    """Bytes, as people write them: 3GB, 800MB, 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(value).strip(), re.ASCII)
        factor = _BYTES.get((found[2] or "B").upper()) if found else None
        if found is None or factor is None or not (count := int(float(found[1]) * factor)):
            self.fail(f"{value!r} is not a size: write 3GB, 800MB or 512MiB", param, ctx)
        return count


@dataclass(frozen=True)
class RecipeFlags:
    """Flags that describe a recipe: a base, and what changes in it. None and () mean that a flag was not given."""

    config: str | None = None
    recipe_file: str | None = None
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    group_dim: int | None = None
    scheme: str | None = None
    embedding_bits: int | None = None
    embedding_group: int | None = None
    options: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    accuracy_level: int | None = None
    target: str | None = None


@dataclass(frozen=True)
class DataFlags:
    """Flags that say how data is read and the model run on it; keywords of `quantize`, `tune` and `evaluate`."""

    samples: int | None = None
    seqlen: int | None = None
    tokenizer: str | None = None
    custom_ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuneFlags:
    """Flags that choose among several quantized models: a metric, a budget for mixes, limits of the search."""

    evaluation: str | None = None
    higher_is_better: bool = True
    tolerance: float | None = None
    criterion: str = "relative"
    objective: str = "first"
    target_bpw: float | None = None
    target_size: int | None = None
    max_kl: float | None = None
    max_loss: float | None = None
    points: int | None = None
    frontier: str | None = None
    max_trials: int | None = None
    timeout: float | None = None
    workdir: str | None = None


@dataclass(frozen=True)
class RunFlags:
    """Flags that say where the work is done and how many bytes of memory it may take."""

    max_memory: int | None = None
    executor: str | None = None
    verify: bool = True
    convert: bool = False
    dask: str | None = None


# A misspelt value is answered with the nearest known one, which click.Choice does not do: presets, methods and targets
# are checked by the recipe, not here.
NUMBER_FORMAT = (
    click.option("--config", "config", metavar="NAME", help="A predefined configuration: see `onnx-woq configs`."),
    click.option("--recipe", "recipe_file", metavar="FILE", type=click.Path(), help="A recipe in JSON or TOML."),
    click.option("--method", "--algorithm", "method", metavar="NAME", help="RTN, GPTQ, AWQ, TEQ or HQQ."),
    click.option("--bits", type=int, help="Bits per weight, 1 to 8 (2, 4 and 8 are native)."),
    click.option("--group-size", type=int, help="Input channels per scale; -1 for one scale per output channel."),
    click.option(
        "--group-dim", type=int, metavar="0|1", help="Group input channels (1, default) or output channels (0)."
    ),
    click.option("--scheme", metavar="sym|asym", help="Symmetric grid, or one zero point per group."),
    click.option("--embedding-bits", type=int, metavar="N", help="Quantize embeddings too: 2, 4 or 8 bits are native."),
    click.option("--embedding-group", type=int, metavar="N", help="Columns of an embedding per scale."),
    click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the algorithm."),
    click.option("--include", multiple=True, metavar="REGEX", help="Quantize only what this finds. Repeatable."),
    click.option("--exclude", multiple=True, metavar="REGEX", help="Leave float what this finds. Repeatable."),
    click.option("--accuracy-level", type=int, help="0: compute in float; 4: int8 activations (fast, default)."),
    click.option(
        "--target",
        metavar="NAME",
        help="Operators to write: matmulnbits (default), qdq (ONNX's own), or auto for the first that fits.",
    ),
)
DATA = (
    click.option("--samples", type=click.IntRange(1), help="Samples used; an error when there are fewer."),
    click.option("--seqlen", type=click.IntRange(1), help="Tokens per sample, for text."),
    click.option("--tokenizer", type=click.Path(), metavar="DIR", help="When it is not beside the model."),
    click.option(
        "--custom-ops",
        multiple=True,
        type=click.Path(),
        metavar="FILE",
        help="A library of custom operators that the model needs. Repeatable.",
    ),
)
_TOLERANCE = "Accepted loss of --eval's metric (0.01); without --eval, of the judge."
_OBJECTIVES = "first|smallest|best|pareto"
JUDGE = (
    click.option("--eval", "evaluation", metavar="MODULE:FUNCTION", help="Your metric: takes a path, gives a number."),
    click.option("--higher-is-better/--lower-is-better", default=True, help="Direction of --eval's metric."),
    click.option("--tolerance", type=float, help=_TOLERANCE),
    click.option("--criterion", default="relative", metavar="relative|absolute", help="What the tolerance is of."),
    click.option("--objective", default="first", metavar=_OBJECTIVES, help="Which configuration wins."),
)
MIXED_PRECISION = (
    click.option("--target-bpw", type=float, metavar="BITS", help="Mix precisions within so many bits per weight."),
    click.option("--target-size", type=Size(), help="Mix precisions within so many bytes of files, such as 90MB."),
    click.option("--max-kl", type=float, metavar="NATS", help="Mix precisions for the smallest file this close."),
    click.option("--max-loss", type=float, help="Likewise with --eval's metric worse by at most so much."),
    click.option("--points", type=click.IntRange(0), help="Mixes measured along the frontier as well (6 for pareto)."),
    click.option("--frontier", metavar="FILE.png", type=click.Path(), help="Draw the frontier of the mixes."),
)
TRIALS = (
    click.option("--max-trials", type=int, help="Configurations tried at most."),
    click.option("--timeout", type=float, metavar="SECONDS", help="No trial starts later."),
    click.option("--workdir", type=click.Path(), metavar="DIR", help="Journal and trial models; a killed run resumes."),
)
RUN = (
    click.option("--max-memory", type=Size(), help="What the process may take, such as 3GB, 800MB or 512MiB."),
    click.option("--executor", metavar="threads|processes|serial", help="Where taps are solved; threads by default."),
    click.option(
        "--no-verify", "verify", flag_value=False, default=True, help="Write a result that ONNX Runtime may not open."
    ),
    click.option("--convert", is_flag=True, help="Convert a model of an old opset or in double precision first."),
    click.option("--dask", metavar="ADDRESS", help="Solve on the workers of this Dask scheduler."),
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _bundle(
    argument: str, kind: type[RecipeFlags | DataFlags | TuneFlags | RunFlags], options: tuple[Decorator, ...]
) -> Decorator:
    """Makes a decorator that adds options to a command and hands their flags over as one `kind`, named `argument`."""
    names = [field.name for field in fields(kind)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def hand_over(*args: Any, **given: Any) -> Any:
            flags = kind(**{name: given.pop(name) for name in names})
            return command(*args, **given, **{argument: flags})

        bundled: Callable[..., Any] = functools.update_wrapper(hand_over, command)
        for option in reversed(options):  # the outermost decorator comes first in the help
            bundled = option(bundled)
        return bundled

    return decorate


recipe_options = _bundle("recipe", RecipeFlags, NUMBER_FORMAT)
data_options = _bundle("data", DataFlags, DATA)
tune_options = _bundle("tuning", TuneFlags, JUDGE + MIXED_PRECISION + TRIALS)
run_options = _bundle("run", RunFlags, RUN)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
