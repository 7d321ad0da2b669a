"""The shipped language model runs, agrees with itself, and has learned its language; its text is honestly held out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[2] / "models"
DEMO = MODELS / "demo"


def load(name: str) -> ModuleType:
    """Import a script from models/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"models_{name}", MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


text = load("text")
judge = load("perplexity")


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(DEMO / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return text.documents()


@pytest.fixture(scope="module")
def dev_rows(documents) -> np.ndarray:
    return judge.token_rows(DEMO, "\n\n".join(text.parts(documents)["dev"]), tokens=4096, context=256)


def paragraphs(documents: dict[str, str], part: str) -> set[str]:
    return {" ".join(p.split()) for name, t in documents.items() if text.split(name) == part for p in t.split("\n\n")}


def test_small_enough_to_ship():
    assert (DEMO / "model.onnx").stat().st_size < 8_000_000


def test_inputs_and_outputs(session):
    caches = [f"{layer}.{kind}" for layer in range(4) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in caches)]
    assert [i.name for i in session.get_inputs()] == names
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{c}" for c in caches)]


def test_whole_sequence_from_an_empty_past(session):
    ids = np.arange(24, dtype=np.int64).reshape(2, 12) * 7
    logits, key, *_ = session.run(None, judge.feeds(session, ids))
    assert logits.shape == (2, 12, 1280)
    assert key.shape == (2, 2, 12, 16)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("steps", [(1,) * 12, (5, 1, 6), (11, 1)])
def test_decoding_with_a_past_equals_one_run(session, dev_rows, steps):
    ids = dev_rows[:1, :12]
    whole = session.run(["logits"], judge.feeds(session, ids))[0]
    feeds, pieces, done = judge.feeds(session, ids[:, :0]), [], 0
    for step in steps:
        feeds["input_ids"] = ids[:, done : done + step]
        feeds["position_ids"] = np.arange(done, done + step)[None]
        done += step
        feeds["attention_mask"] = np.ones((1, done), np.int64)
        logits, *present = session.run(None, feeds)
        pieces.append(logits)
        feeds |= dict(zip([n for n in feeds if n.startswith("past")], present, strict=True))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-4)


def test_has_learned_its_language_and_rounding_hurts(dev_rows):
    model = onnx.load(DEMO / "model.onnx")
    plain = judge.perplexity(model, dev_rows)
    unigram = np.bincount(dev_rows.ravel(), minlength=1280) / dev_rows.size
    entropy = -np.sum(unigram[unigram > 0] * np.log(unigram[unigram > 0]))
    assert plain < 35 < np.exp(entropy)  # no model blind to the tokens before, even one fitted to dev, comes near
    assert judge.round_matmuls(model, bits=3, group=32) == 4 * 7 + 1
    assert judge.perplexity(model, dev_rows) > 1.05 * plain


def test_groups_of_128_end_short():
    model = onnx.load(DEMO / "model.onnx")
    matmuls = {n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    depths = {t.dims[0] for t in model.graph.initializer if t.name in matmuls}
    assert depths == {160, 416}


def test_parts_share_no_paragraph(documents):
    train, calib, dev = (paragraphs(documents, part) for part in text.PARTS)
    assert not train & calib
    assert not train & dev
    assert not calib & dev


def test_parts_are_large_enough_and_made_of_their_documents(documents):
    parts = text.parts(documents)
    for part in ("calib", "dev"):
        assert 100_000 < len("\n\n".join(parts[part]).encode()) < 400_000
        whole = [t for name, t in documents.items() if text.split(name) == part]
        assert all(any(w.startswith(t) for w in whole) for t in parts[part])


def test_split_depends_on_the_name_alone():
    assert text.split("module/asyncio") == "dev"
    assert text.split("module/test") == "train"
    assert {text.split(f"topic/{n}") for n in range(100)} == set(text.PARTS)


def test_a_stripped_library_is_an_error_that_says_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "os.py").write_text('"""Only this."""')
    with pytest.raises(text.MissingTextError, match=r"lacks pydoc_data/topics\.py and most module sources"):
        text.documents(tmp_path)
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["text.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="lacks pydoc_data"):
        text.main()
    assert not (tmp_path / "out").exists()
