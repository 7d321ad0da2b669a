"""The models and calibration data that the benchmarks work on, made when first asked for; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.measure import child
from benchmarks.records import RESULTS

REAL = Path("build/models")
_SHAPED = re.compile(
    r"(?P<shape>7b|1\.1b|tiny)-(?P<dtype>float16|float32)(?:-(?P<layers>\d+)layers)?(?:-(?P<style>genai))?"
)


def model(name: str) -> Path:
    """The .onnx file of a model.

    Args:
        name: of a folder in build/models, such as smollm2-permuted; or a Llama shape with random weights such as
            1.1b-float16, 7b-float16, 1.1b-float32-8layers, 1.1b-float16-genai; or a path.

    Raises:
        FileNotFoundError: there is no such model and it cannot be made here.
    """
    if name.endswith(".onnx"):
        return Path(name)
    if match := _SHAPED.fullmatch(name):
        path = RESULTS / "models" / name / "model.onnx"
        if not path.exists():
            given = {key: value for key, value in match.groupdict().items() if value}
            layers = {"layers": int(given["layers"])} if "layers" in given else {}
            child({"do": "llama", "output": path.parent, **given, **layers})
        return path
    path = REAL / name / "model.onnx"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: `make real-models` builds it")
    return path


def tokens(path: Path, samples: int, length: int, text: Path | None) -> Path:
    """A .npz of token ids `[samples, length]` for a model; random ones when there is no text or no tokenizer.

    What the ids are makes no difference to time or memory.
    """
    tokenizer = (path.parent / "tokenizer.json").exists()
    kind = text.stem if text and tokenizer else "random"
    out = RESULTS / "data" / f"{path.parent.name}-{kind}-{samples}x{length}.npz"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        job: dict[str, Any] = {"do": "ids", "model": path, "samples": samples, "length": length, "output": out}
        child(job | ({"text": str(text)} if text and tokenizer else {}))
    return out


def files(path: Path) -> list[str]:
    """The .onnx file and the data files beside it."""
    beside = path.parent.glob(f"{path.name}?data*")
    return [str(path), *sorted(map(str, beside))]


def scratch(name: str) -> Path:
    """A fresh place for a result, on the same disk as the models."""
    place = RESULTS / "scratch"
    place.mkdir(parents=True, exist_ok=True)
    return place / name
