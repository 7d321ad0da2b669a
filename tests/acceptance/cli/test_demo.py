"""The shipped language model, a really trained one, through the command line as README's demo does it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe
from tests.support import measure
from tests.support.commands import CONFIGS, ROOT

DEMO = ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """calib.txt and dev.txt by models/text.py, from the held-out modules of the standard library alone (fast)."""
    spec = importlib.util.spec_from_file_location("demo_text", ROOT / "models" / "text.py")
    text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(text)
    text.MIN_BYTES = 0  # part of the library will do here
    folder = tmp_path_factory.mktemp("text")
    (folder / "stdlib").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if text.split(f"module/{path.stem}") != "train":
            (folder / "stdlib" / path.name).symlink_to(path)
    documents = text.documents(folder / "stdlib")
    for part in ("calib", "dev"):
        found = [content[:5000] for name, content in documents.items() if text.split(name) == part]
        (folder / f"{part}.txt").write_text("\n\n".join(found), encoding="utf-8")
    return folder / "calib.txt", folder / "dev.txt"


@pytest.fixture(scope="module")
def files(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model at 3 bits by three methods."""
    from onnx_woq import Spec, quantize

    folder, made = tmp_path_factory.mktemp("demo"), {}
    for method in ("rtn", "gptq", "awq"):
        made[method] = folder / method / "model.onnx"
        recipe = Recipe(method, Spec(3, 32), lm_head=False, accuracy_level=0, nsamples=24, pad_max_length=128)
        quantize(DEMO / "model.onnx", folder / method, recipe, texts[0])
    return made


@pytest.mark.slow
def test_gptq_on_a_trained_model(files, texts, cli):
    """KL by the package's judge: RTN at 3 bits visibly hurts, GPTQ takes back a good part on text it has not seen."""
    data = ("--reference", DEMO / "model.onnx", "--data", texts[1], "--samples", 16, "--seqlen", 128)
    found = {name: cli.json("evaluate", path, *data) for name, path in files.items()}
    assert found["rtn"]["kl"] > 0.02
    assert found["rtn"]["ppl"] > found["rtn"]["ppl_ref"]
    assert found["gptq"]["kl"] < 0.8 * found["rtn"]["kl"]
    assert found["awq"]["kl"] < found["rtn"]["kl"]
    assert found["gptq"]["top1"] > found["rtn"]["top1"]
    assert len({metrics["ppl_ref"] for metrics in found.values()}) == 1


def test_the_judge_agrees_with_one_of_our_own(files, texts, cli):
    """Tokens by the tokenizers library, logits by plain ONNX Runtime, KL by definition."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = np.array(tokenizer.encode(texts[1].read_text(encoding="utf-8")).ids[: 16 * 128 + 16], np.int64)
    sessions = [measure.session(path) for path in (DEMO / "model.onnx", files["rtn"])]

    def log_probabilities(s: onnxruntime.InferenceSession, row: np.ndarray) -> np.ndarray:
        feed = {}
        for value in s.get_inputs():
            if value.name == "input_ids":
                feed[value.name] = row[None]
            elif value.name == "attention_mask":
                feed[value.name] = np.ones((1, row.size), np.int64)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(row.size)[None]
            else:
                sizes = [d if isinstance(d, int) else 0 for d in value.shape]
                feed[value.name] = np.zeros([1, *sizes[1:]], np.float32)
        return measure.log_softmax(s.run(["logits"], feed)[0][0].astype(np.float64))

    kl = []
    for row in np.split(ids[: 16 * 128], 16):
        p, q = (log_probabilities(s, row) for s in sessions)
        kl.append((np.exp(p) * (p - q)).sum(-1).mean())
    flags = ("--reference", DEMO / "model.onnx", "--data", texts[1], "--samples", 16, "--seqlen", 128)
    found = cli.json("evaluate", files["rtn"], *flags)
    assert found["kl"] == pytest.approx(np.mean(kl), rel=0.1)


@pytest.mark.slow
def test_both_streams_do_not_follow_chance_by_default(files, texts, tmp_path):
    """On 3072 tokens, judged on other text, the default share is better than none of the way and than all of it."""
    from onnx_woq import Spec, evaluate, quantize

    what = {"lm_head": False, "accuracy_level": 0, "nsamples": 24, "pad_max_length": 128, "sequential_unit": "block"}
    loss = {}
    for name, share in (("default", {}), ("all", {"stream_share": 1.0})):
        recipe = Recipe("gptq", Spec(3, 32), both_streams=True, **what, **share)
        quantize(DEMO / "model.onnx", tmp_path / name, recipe, texts[0])
    for name, path in (("none", files["gptq"].parent), ("default", tmp_path / "default"), ("all", tmp_path / "all")):
        loss[name] = evaluate(path, DEMO / "model.onnx", texts[1], samples=16, seqlen=128).kl
    assert loss["default"] < min(loss["none"], loss["all"]), loss


@pytest.mark.slow
def test_its_embedding_in_low_bits(files, texts, cli, tmp_path):
    """The head is the embedding transposed: in 8 bits it costs next to nothing, with the head's 4 bits no bytes."""
    judge = ("--reference", DEMO / "model.onnx", "--data", texts[1], "--samples", 16, "--seqlen", 128)
    calibrated = ("--config", "GPTQ_G32ASYM", "--calib", texts[0], "--samples", 24, "--seqlen", 128)
    size, kl = {}, {}
    for bits in (0, 8, 4):
        out, flags = tmp_path / f"{bits}" / "model.onnx", ("--embedding-bits", bits) if bits else ()
        out.parent.mkdir()
        report = cli.json("quantize", DEMO / "model.onnx", "-o", out, *calibrated, *flags)
        assert [row["shared_with"] for row in report["embeddings"]] == {0: [], 8: [""], 4: ["logits"]}[bits]
        size[bits], kl[bits] = report["bytes_after"], cli.json("evaluate", out, *judge)["kl"]
    assert size[0] > 1.4 * size[8] > 1.6 * size[4]
    assert kl[8] < 1.03 * kl[0]
    assert kl[0] < kl[4] < cli.json("evaluate", files["rtn"], *judge)["kl"]


def test_the_demo_command(texts, cli, tmp_path):
    out = tmp_path / "quantized"
    flags = ("--auto", "--calib", texts[0], "--samples", 12, "--seqlen", 96)
    before = measure.listing(DEMO)
    result = cli("quantize", DEMO / "model.onnx", "-o", out, *flags)
    assert result.exit_code in (0, 3)
    assert CONFIGS[0] in result.stdout
    assert measure.listing(DEMO) == before
    assert {p.name for p in DEMO.iterdir() if p.suffix == ".json"} <= {p.name for p in out.iterdir()}
    sizes = [sum(p.stat().st_size for p in folder.iterdir() if ".onnx" in p.name) for folder in (DEMO, out)]
    assert sizes[1] < 0.6 * sizes[0]
    assert measure.low_bit(out / "model.onnx")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_progress_is_shown_on_a_terminal(texts, tmp_path):
    """stderr is a terminal, stdout a pipe: the bar moves on the one and never touches the other."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "onnx_woq.cli", "quantize", DEMO / "model.onnx", "-o", tmp_path / "out", "--json"]
    command += ["--algorithm", "AWQ", "--calib", texts[0], "--samples", 16, "--seqlen", 128]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=theirs, env=environment, cwd=ROOT
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        json.loads(process.stdout.read())
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"\d+\s*(%|/\s*\d+)", shown), shown[-300:]
