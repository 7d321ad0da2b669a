"""What the command line says about mixed precision: a target, and a picture of the frontier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from onnx_woq.errors import RecipeError

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Size(click.ParamType):
    """Bytes, as people write them: 3GB, 800MB, 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(value).strip(), re.ASCII)
        factor = _SIZES.get((found[2] or "B").upper()) if found else None
        if found is None or factor is None or not (count := int(float(found[1]) * factor)):
            self.fail(f"{value!r} is not a size: write 3GB, 800MB or 512MiB", param, ctx)
        return count


TARGET_OPTIONS = (
    click.option("--target-bpw", type=float, metavar="BITS", help="Mix precisions within so many bits per weight."),
    click.option("--target-size", type=Size(), help="Mix precisions within so many bytes of files, such as 90MB."),
    click.option("--max-kl", type=float, metavar="NATS", help="Mix precisions for the smallest file this close."),
    click.option("--max-loss", type=float, help="Likewise with --eval's metric worse by at most so much."),
    click.option("--points", type=click.IntRange(0), help="Mixes measured along the frontier as well (6 for pareto)."),
    click.option("--frontier", metavar="FILE.png", type=click.Path(), help="Draw the frontier of the mixes."),
)
_TARGETS = ("target_bpw", "target_size", "max_kl", "max_loss")


def wants_mix(given: Mapping[str, Any]) -> bool:
    """Whether the flags ask for mixed precision.

    Raises:
        RecipeError: they contradict each other, or say what a mix decides by itself.
    """
    flags = [_flag(name) for name in _TARGETS if given[name] is not None]
    flags += ["--objective pareto"] if given["objective"] == "pareto" else []
    if len(flags) > 1:
        raise RecipeError(f"{' and '.join(flags)} are different targets: give one of them")
    if not flags:
        if named := next((name for name in ("frontier", "points") if given[name] is not None), None):
            raise RecipeError(
                f"{_flag(named)} is about mixed precision: "
                "add --objective pareto, or a target such as --target-bpw 4.25"
            )
        return False
    if given["max_kl"] is not None and given["evaluation"]:
        raise RecipeError("--max-kl is judged without --eval: leave one of them out, or use --max-loss")
    if given["max_loss"] is not None and not given["evaluation"]:
        raise RecipeError("--max-loss is a loss of --eval's metric: add --eval, or use --max-kl")
    grid = ("bits", "group_size", "scheme", "embedding_bits", "embedding_group")
    if named := next((name for name in grid if given[name] is not None), None):
        raise RecipeError(f"{flags[0]} chooses the grid of each layer: leave out {_flag(named)}")
    if given["objective"] not in ("first", "pareto"):
        raise RecipeError(f"{flags[0]} and --objective {given['objective']} are different ways to choose: give one")
    return True


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
