"""Measure onnx-woq: one command per row of docs/benchmarks.md.

\b
    python tools/bench.py machine
    python tools/bench.py rtn-copy --model smollm2-permuted --repeat 5
    python tools/bench.py report

Each prints its row and appends it to build/bench/ROW.json with the machine, the versions and every repetition; `report`
writes docs/benchmarks.md and its charts from the last record of each row and case. What is compared runs in turn,
A B A B …, each in a process of its own; numbers are medians. Models are those of `make real-models` and Llama shapes
with random weights (tools/llama.py), made when first asked for. Nothing is downloaded. The peers live in environments
of their own: see tools/peers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from benchmarks import gptq_rows, rows
from benchmarks.records import Record, add, line
from benchmarks.runs import GPTQ, RTN

SMOLLM2 = "smollm2-permuted"
GENAI = "smollm2-permuted-genai"


class _Named(click.Group):
    """Lists commands in the order of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


@click.group(
    cls=_Named, help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)


def _kept(command: Callable[..., list[Record]]) -> Callable[..., None]:
    """Keeps and prints the records that a command gives."""

    @functools.wraps(command)
    def keeping(**given: Any) -> None:
        for record in command(**given):
            click.echo(line(add(record)))

    return keeping


def _repeat(count: int) -> Callable[..., Any]:
    return click.option("--repeat", default=count, show_default=True, help="Rounds of A B.")


def _model(*default: str) -> Callable[..., Any]:
    return click.option("--model", "models", multiple=True, default=default, show_default=True, help="Repeatable.")


def _data(samples: int, length: int) -> Callable[..., Any]:
    def add_options(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--samples", default=samples, show_default=True),
            click.option("--length", default=length, show_default=True, help="Tokens per sample."),
            click.option("--text", type=click.Path(path_type=Path), help="Calibration text; random tokens without."),
        ):
            function = option(function)
        return function

    return add_options


_existing = click.Path(exists=True, path_type=Path, resolve_path=False)
_onc = click.option("--onc", type=_existing, required=True, help="The python of onnx-neural-compressor's environment.")
_llmc = click.option("--llmc", type=_existing, required=True, help="The python of llm-compressor's environment.")


@main.command()
@_repeat(3)
@_kept
def machine(repeat: int) -> list[Record]:
    """Rates of matrix products, file copies and memory copies."""
    return [rows.machine(repeat)]


@main.command()
@_model(SMOLLM2, "1.1b-float32", "1.1b-float16")
@_repeat(5)
@_kept
def rtn_copy(models: tuple[str, ...], repeat: int) -> list[Record]:
    """RTN ÷ copying the input file."""
    return [rows.rtn_copy(name, repeat) for name in models]


@main.command()
@_model(SMOLLM2, "1.1b-float32")
@_repeat(5)
@_kept
def rtn_ort(models: tuple[str, ...], repeat: int) -> list[Record]:
    """RTN ÷ onnxruntime's own quantizer."""
    return [rows.rtn_ort(name, repeat) for name in models]


@main.command()
@click.option("--model", default=SMOLLM2, show_default=True, help="Also 1.1b-float32, with --samples 4.")
@_data(16, 512)
@_repeat(3)
@_kept
def gptq_floor(model: str, samples: int, length: int, text: Path | None, repeat: int) -> list[Record]:
    """GPTQ ÷ its arithmetic at the measured rate."""
    return [gptq_rows.gptq_floor(model, samples, length, repeat, text)]


@main.command()
@click.option("--model", default=SMOLLM2, show_default=True)
@_data(2, 256)
@_onc
@click.option("--seconds", default=3600.0, show_default=True, help="Stop theirs after that long and extrapolate.")
@_repeat(1)
@_kept
def gptq_onc(
    model: str, samples: int, length: int, text: Path | None, onc: Path, seconds: float, repeat: int
) -> list[Record]:
    """GPTQ ÷ onnx-neural-compressor's."""
    return [gptq_rows.gptq_onc(model, samples, length, repeat, text, onc, seconds)]


@main.command()
@click.option("--model", default=SMOLLM2, show_default=True)
@_data(16, 512)
@_llmc
@click.option("--checkpoint", type=_existing, required=True, help="See tools/peers/checkpoint.py.")
@_repeat(3)
@_kept
def gptq_llmc(
    model: str, samples: int, length: int, text: Path | None, llmc: Path, checkpoint: Path, repeat: int
) -> list[Record]:
    """GPTQ CPU time ÷ llm-compressor's, one thread each."""
    return [gptq_rows.gptq_llmc(model, samples, length, repeat, text, llmc, checkpoint)]


@main.command()
@click.option("--model", default=SMOLLM2, show_default=True)
@_data(16, 512)
@_repeat(3)
@_kept
def presets(model: str, samples: int, length: int, text: Path | None, repeat: int) -> list[Record]:
    """The five presets ÷ GPTQ alone."""
    return [gptq_rows.presets(model, samples, length, repeat, text)]


@main.command()
@click.option("--model", default="7b-float16", show_default=True)
@click.option("--config", "configs", multiple=True, default=(RTN, GPTQ), show_default=True)
@click.option("--samples", default=8, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--max-memory", type=int, help="Bytes, passed on to quantize().")
@_repeat(1)
@_kept
def memory(
    model: str, configs: tuple[str, ...], samples: int, length: int, max_memory: int | None, repeat: int
) -> list[Record]:
    """Peak memory on a model larger than it."""
    return [rows.memory(config, model, samples, length, repeat, max_memory) for config in configs]


@main.command()
@click.option("--model", default="1.1b-float32", show_default=True, help="A Llama shape.")
@click.option("--config", default=GPTQ, show_default=True)
@click.option("--layers", multiple=True, type=int, default=(8, 16, 32), show_default=True)
@click.option("--samples", default=2, show_default=True)
@click.option("--length", default=256, show_default=True)
@_repeat(3)
@_kept
def growth(model: str, config: str, layers: tuple[int, ...], samples: int, length: int, repeat: int) -> list[Record]:
    """Time per layer as layers are added."""
    return [rows.growth(config, model, sorted(layers), samples, length, repeat)]


@main.command()
@click.option("--model", default=GENAI, show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--tokens", default=128, show_default=True)
@_repeat(5)
@_kept
def decode(model: str, threads: tuple[int, ...], tokens: int, repeat: int) -> list[Record]:
    """Tokens per second, 4-bit ÷ float."""
    return [rows.decode(model, count, tokens, repeat) for count in threads]


@main.command("all")
@click.option("--text", type=click.Path(path_type=Path), help="Calibration text; random tokens without.")
@click.option("--onc", type=_existing, help="Without it that row is left out.")
@click.option("--llmc", type=_existing, help="Without it that row is left out.")
@click.option("--checkpoint", type=_existing)
@click.option("--seconds", default=300.0, show_default=True, help="For onnx-neural-compressor.")
@click.option("--large/--no-large", default=False, help="Also the 7B shape: 13 GB of disk for it, 4 for the result.")
@click.pass_context
def everything(
    ctx: click.Context, text: Path | None, onc: Path | None, llmc: Path | None, checkpoint: Path | None,
    seconds: float, large: bool,
) -> None:  # fmt: skip
    """Every row in turn, then the report."""
    data = {"text": text}
    ctx.invoke(machine)
    ctx.invoke(rtn_copy)
    ctx.invoke(rtn_ort)
    ctx.invoke(gptq_floor, **data)
    ctx.invoke(gptq_floor, model="1.1b-float32", samples=4, **data)
    if onc:
        ctx.invoke(gptq_onc, onc=onc, seconds=seconds, **data)
    if llmc and checkpoint:
        ctx.invoke(gptq_llmc, llmc=llmc, checkpoint=checkpoint, **data)
    ctx.invoke(presets, **data)
    if large:
        ctx.invoke(memory)
    ctx.invoke(growth)
    ctx.invoke(decode)
    ctx.invoke(report)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def report(out: Path) -> None:
    """Write docs/benchmarks.md and its charts."""
    from benchmarks.report import write

    click.echo(write(out))


if __name__ == "__main__":
    main()
