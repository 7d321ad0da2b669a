"""Mutate small models and look for whatever is raised on them that is no named error.

    python tools/fuzz.py [--seed 0] [--count 200] [--keep FOLDER]

Each number from --seed on stands for one mutated model of `tests/zoo`: a few fields of its messages are removed,
repeated or exchanged for absurd values, or bytes of the file are flipped. The model is inspected, rounded, and by every
third number calibrated on random data. An error is right if it is an `OnnxWoqError`; anything else is a fault, and so
is a file that is left behind, a case that takes more than --seconds, or a crash. Faults are printed with the last lines
of the package that were on the way; --keep has their models.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onnx_woq import OnnxWoqError, inspect, quantize  # noqa: E402
from tests.zoo import architectures, small  # noqa: E402

NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**31, 10**9, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    "",
    "x",
    "W1",
    "MatMul",
    "Gemm",
    "Cast",
    "Identity",
    "Loop",
    "If",
    "Constant",
    "ai.onnx",
    "com.microsoft",
    "../x",
)
FLOATS = (0.0, -1.0, 1e38, float("inf"), float("nan"))
MEMORY = 6 << 30

Model = Callable[[Path], Any]
MODELS: dict[str, Model] = {
    "encoder": small.encoder,
    "encoder, external": lambda path: small.encoder(path, external="weights.bin"),
    "language model": small.language_model,
    "tied": lambda path: small.language_model(path, tied=True, external="weights.bin"),
    "chain": small.chain,
    "gemms": small.gemms,
    "constants": small.constants,
    "branches": small.branches,
    "loop": small.loop,
    "functions": small.functions,
    "leftovers": small.leftovers,
    "decoder": lambda path: architectures.decoder(path, layers=1),
    "merged": lambda path: architectures.merged_decoder(path, layers=1),
    "bert": lambda path: architectures.bert(path, layers=1),
}


def messages(message: Message) -> Iterator[Message]:
    """Yields a message and every message in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def other_value(field: Any, rng: random.Random, texts: list[str]) -> Any:
    """Returns a value that a scalar field can hold and most likely should not."""
    if field.cpp_type == field.CPPTYPE_STRING:
        text = rng.choice(texts if rng.random() < 0.7 else TEXTS)
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.enum_type is not None:
        return rng.choice([one.number for one in field.enum_type.values])
    small_ones = [one for one in NUMBERS if abs(one) < 2**31]
    number = rng.choice(NUMBERS if field.type == field.TYPE_INT64 and rng.random() < 0.5 else small_ones)
    return abs(number) if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else number


def mutate(message: Message, rng: random.Random, texts: list[str]) -> str:
    """Changes one field of a message; returns what was done, "" if nothing was possible."""
    fields = message.DESCRIPTOR.fields
    field = (
        rng.choice([one for one, _ in message.ListFields()] or list(fields))
        if rng.random() < 0.8
        else rng.choice(fields)
    )
    place = f"{message.DESCRIPTOR.name}.{field.name}"
    scalar = field.type != field.TYPE_MESSAGE
    if not field.is_repeated:
        if scalar and rng.random() < 0.75:
            value = other_value(field, rng, texts)
            setattr(message, field.name, value)
            return f"{place} = {value!r}"
        message.ClearField(field.name)
        return f"{place} cleared"
    values = getattr(message, field.name)
    if scalar and (not values or rng.random() < 0.5):
        value = other_value(field, rng, texts)
        if values and rng.random() < 0.7:
            values[rng.randrange(len(values))] = value
            return f"{place}[] = {value!r}"
        values.append(value)
        return f"{place}[] + {value!r}"
    if not values:
        return ""
    at = rng.randrange(len(values))
    if rng.random() < 0.5:
        del values[at]
        return f"{place}[{at}] removed"
    values.append(values[at]) if scalar else values.add().CopyFrom(values[at])
    return f"{place}[{at}] repeated"


def mutated(proto: onnx.ModelProto, rng: random.Random) -> tuple[bytes, str]:
    """Returns a mutated model and what was done to it."""
    done: list[str] = []
    texts = [name for node in proto.graph.node for name in (*node.input, *node.output)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        by_kind: dict[str, list[Message]] = {}
        for message in messages(proto):
            by_kind.setdefault(message.DESCRIPTOR.name, []).append(message)
        kind = rng.choice(sorted(by_kind))  # or else nearly all of them were dimensions
        done.append(mutate(rng.choice(by_kind[kind]), rng, texts))
    content = bytearray(proto.SerializeToString())
    if rng.random() < 0.15:  # names that are not UTF-8, wrong lengths, other field numbers
        for _ in range(rng.choice((1, 3))):
            at = rng.randrange(len(content))
            content[at] = rng.randrange(256)
            done.append(f"byte {at}")
    return bytes(content), "; ".join(filter(None, done))


def make_case(number: int, folder: Path) -> tuple[Path, str]:
    """Writes the mutated model of a number into a folder; returns its path and what was done."""
    rng = random.Random(number)
    name = rng.choice(sorted(MODELS))
    folder.mkdir(parents=True)
    path = folder / "m.onnx"
    MODELS[name](path)
    content, done = mutated(onnx.load(path, load_external_data=False), rng)
    path.write_bytes(content)
    return path, f"{name}: {done}"


def fault(path: Path, number: int) -> str:
    """Inspects and quantizes a model; returns the faults met, "" for none."""
    out = path.parent / "out"
    found = []

    def attempt(what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except OnnxWoqError:
            if out.exists():
                found.append(f"{what}: left {[one.name for one in out.rglob('*')]}")
        except Exception as error:
            ours = [one for one in traceback.extract_tb(error.__traceback__) if "/onnx_woq/" in one.filename]
            place = ", ".join(f"{one.filename.rpartition('/onnx_woq/')[2]}:{one.lineno}" for one in ours[-3:])
            found.append(f"{what}: {type(error).__name__}: {str(error)[:100]!r} at {place}")
        shutil.rmtree(out, ignore_errors=True)

    attempt("inspect", lambda: inspect(path))
    attempt("RTN", lambda: quantize(path, out / "q.onnx"))
    if number % 3 == 0:
        config = ("GPTQ_G32ASYM", "AWQ_G32ASYM", "BEST_4BIT")[number // 3 % 3]
        attempt(config, lambda: quantize(path, out / "q.onnx", config, "random", samples=2, seqlen=8))
    return "; ".join(found)


def main() -> None:
    """Runs the cases, and ends with exit code 1 if any of them is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    faulthandler.enable()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_long(*_: object) -> None:
        raise TimeoutError("it takes too long")

    signal.signal(signal.SIGALRM, too_long)
    faults = 0
    for number in range(arguments.seed, arguments.seed + arguments.count):
        with tempfile.TemporaryDirectory() as folder:
            path, done = make_case(number, Path(folder) / "case")
            (Path(tempfile.gettempdir()) / "fuzz.now").write_text(f"{number}: {done}\n")  # whatever crashes is named
            signal.alarm(arguments.seconds)
            found = fault(path, number)
            signal.alarm(0)
            if found:
                faults += 1
                print(f"{number}: {done}\n    {found}", flush=True)
                if arguments.keep:
                    shutil.copytree(path.parent, arguments.keep / str(number), dirs_exist_ok=True)
    print(f"{faults} faults in {arguments.count} cases")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
