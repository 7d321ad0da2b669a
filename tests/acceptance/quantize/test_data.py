"""The forms of calibration data: whatever form it comes in, the same data is the same calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnx_woq import Recipe, quantize
from tests.support import measure
from tests.zoo import small as zoo

ROWS = zoo.token_ids(6)
FEEDS = zoo.lm_feeds(ROWS)
XS = zoo.float_feeds(6)


def weights(model: Path, out: Path, data: object, **options: object) -> dict[str, np.ndarray]:
    quantize(model, out, Recipe("gptq"), data, **options)
    return measure.decoded(out)


def saved(folder: Path, name: str, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".npy"):
        np.save(folder / name, *arrays.values())
    else:
        np.savez(folder / name, **arrays)
    return folder / name


def in_folder(folder: Path, kind: str) -> Path:
    for i, ids in enumerate(ROWS):
        saved(folder, f"{i:03}.{kind}", input_ids=ids)
    return folder


LM_FORMS: dict[str, Callable[[Path], object]] = {
    "all inputs": lambda _: FEEDS,
    "ids only, the rest filled in": lambda _: [{"input_ids": ids} for ids in ROWS],
    "ids and mask": lambda _: [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in ROWS],
    "(inputs, labels)": lambda _: [(feed, ids) for feed, ids in zip(FEEDS, ROWS, strict=True)],
    "(ids, label)": lambda _: [({"input_ids": ids}, 1) for ids in ROWS],
    "arrays": lambda _: list(ROWS),
    "arrays without a batch axis": lambda _: [ids[0] for ids in ROWS],
    "generator": lambda _: (feed for feed in FEEDS),
    "generator of arrays": lambda _: (ids for ids in ROWS),
    "npz": lambda folder: saved(folder, "d.npz", input_ids=np.concatenate(ROWS)),
    "npy": lambda folder: saved(folder, "d.npy", input_ids=np.concatenate(ROWS)),
    "path as str": lambda folder: str(saved(folder, "d.npz", input_ids=np.concatenate(ROWS))),
    "folder of npz": lambda folder: in_folder(folder / "z", "npz"),
    "folder of npy": lambda folder: in_folder(folder / "y", "npy"),
}


@pytest.fixture(scope="module")
def from_dicts(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return weights(lm, tmp_path_factory.mktemp("dicts") / "q.onnx", FEEDS)


@pytest.mark.parametrize("form", LM_FORMS)
def test_every_form_is_the_same_calibration(form, lm, from_dicts, tmp_path):
    got = weights(lm, tmp_path / "q.onnx", LM_FORMS[form](tmp_path))
    for name, w in from_dicts.items():
        assert measure.agreement(got[name], w) > 0.98, name


FLOAT_FORMS: dict[str, Callable[[Path], object]] = {
    "arrays": lambda _: [feed["x"] for feed in XS],
    "tuples": lambda _: [(feed["x"], np.zeros(1)) for feed in XS],
    "lists of arrays": lambda _: [[feed["x"]] for feed in XS],
    "npz": lambda folder: saved(folder, "d.npz", x=np.concatenate([feed["x"] for feed in XS])),
    "npy": lambda folder: saved(folder, "d.npy", x=np.concatenate([feed["x"] for feed in XS])),
    "float64": lambda _: [{"x": feed["x"].astype(np.float64)} for feed in XS],
}


@pytest.mark.parametrize("form", FLOAT_FORMS)
def test_every_form_for_a_float_input(form, enc, tmp_path):
    if form == "float64":
        from onnx_woq import OnnxWoqError

        try:
            got = weights(enc, tmp_path / "q.onnx", FLOAT_FORMS[form](tmp_path))
        except OnnxWoqError as error:
            assert "float32" in str(error) or "float" in str(error)  # noqa: PT017 - refusing is as good as casting
            return
    else:
        got = weights(enc, tmp_path / "q.onnx", FLOAT_FORMS[form](tmp_path))
    for name, w in weights(enc, tmp_path / "w.onnx", XS).items():
        assert measure.agreement(got[name], w) > 0.98, name


def test_ragged_lengths_work(lm, tmp_path):
    rows = [zoo.token_ids(1, length, seed=length)[0] for length in (3, 24, 17, 40, 1)]
    for method in ("gptq", "awq"):
        quantize(lm, tmp_path / "q.onnx", Recipe(method), [{"input_ids": ids} for ids in rows])
        assert np.isfinite(measure.run(tmp_path / "q.onnx", FEEDS)["logits"]).all()


def test_nsamples_is_a_limit(lm, from_dicts, tmp_path):
    quantize(lm, tmp_path / "q.onnx", Recipe("gptq", nsamples=6), FEEDS + zoo.lm_feeds(zoo.token_ids(5, seed=8)))
    got = measure.decoded(tmp_path / "q.onnx")
    assert all(measure.agreement(got[name], w) > 0.999 for name, w in from_dicts.items())


def test_use_max_length_takes_full_samples_only(lm, from_dicts, tmp_path):
    short = [{"input_ids": ids[:, :7]} for ids in zoo.token_ids(5, seed=8)]
    mixed = [part for pair in zip(short, FEEDS, strict=False) for part in pair] + FEEDS[5:]
    quantize(lm, tmp_path / "q.onnx", Recipe("gptq", pad_max_length=24, use_max_length=True), mixed)
    got = measure.decoded(tmp_path / "q.onnx")
    assert all(measure.agreement(got[name], w) > 0.999 for name, w in from_dicts.items())


TEXT = "The quick brown fox jumps over the lazy dog; naïve façades cost 42 €.\n" * 30


def by_bytes(count: int, length: int) -> list[dict[str, np.ndarray]]:
    data = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
    return [{"input_ids": data[i * length : (i + 1) * length][None]} for i in range(count)]


def test_text_is_tokenized_by_the_tokenizer_beside_the_model(lm_folder, tmp_path):
    """The tokenizer is of bytes, so the right ids are known."""
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    recipe = Recipe("gptq", nsamples=8, pad_max_length=40)
    quantize(lm_folder / "model.onnx", tmp_path / "q.onnx", recipe, tmp_path / "t.txt")
    quantize(lm_folder / "model.onnx", tmp_path / "w.onnx", recipe, by_bytes(8, 40))
    got, wanted = measure.decoded(tmp_path / "q.onnx"), measure.decoded(tmp_path / "w.onnx")
    assert all(measure.agreement(got[name], w) > 0.99 for name, w in wanted.items())


def test_the_tokenizer_may_be_given(lm, lm_folder, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "tok").mkdir()
    zoo.byte_tokenizer(tmp_path / "tok")
    recipe = Recipe("gptq", nsamples=4, pad_max_length=32)
    quantize(lm, tmp_path / "a" / "q.onnx", recipe, tmp_path / "t.txt", tokenizer=tmp_path / "tok")
    quantize(lm_folder / "model.onnx", tmp_path / "b" / "q.onnx", recipe, tmp_path / "t.txt")
    assert measure.digest(tmp_path / "a" / "q.onnx") == measure.digest(tmp_path / "b" / "q.onnx")


def test_jsonl(lm_folder, tmp_path):
    lines = [TEXT[i * 50 : i * 50 + 48] for i in range(8)]
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines), "utf-8"
    )
    quantize(
        lm_folder / "model.onnx",
        tmp_path / "q.onnx",
        Recipe("gptq", nsamples=8, pad_max_length=64),
        tmp_path / "t.jsonl",
    )
    assert np.isfinite(measure.run(tmp_path / "q.onnx", FEEDS)["logits"]).all()


def test_a_mis_declared_tokenizer_class_gives_no_garbage(lm_folder, tmp_path):
    """onnxruntime-extensions then returns ids of 2**32 − 1 without an error; the tokenizers library reads it right."""
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    recipe = Recipe("gptq", nsamples=4, pad_max_length=32)
    quantize(lm_folder / "model.onnx", tmp_path / "a" / "q.onnx", recipe, tmp_path / "t.txt")
    for wrong in ("BertTokenizer", "NoSuchTokenizer", "LlamaTokenizer"):
        (lm_folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": wrong}))
        quantize(lm_folder / "model.onnx", tmp_path / "b" / "q.onnx", recipe, tmp_path / "t.txt")
        assert measure.digest(tmp_path / "a" / "q.onnx") == measure.digest(tmp_path / "b" / "q.onnx"), wrong


def test_an_empty_cache_that_is_not_called_past(tmp_path):
    """Streaming encoders take caches that are empty for the first chunk."""
    net = zoo.Net()
    c = net.op("Concat", "att_cache", "chunk", out="c", axis=1)
    net.matmul(c, zoo.weight(1, 64, 48), "y")
    net.op("Identity", c, out="r_att_cache")
    shapes = {"chunk": (zoo.F32, ["B", "T", 64]), "att_cache": (zoo.F32, ["B", "C", 64])}
    outputs = {"y": (zoo.F32, ["B", "S", 48]), "r_att_cache": (zoo.F32, ["B", "S", 64])}
    model = net.save(tmp_path / "m.onnx", shapes, outputs)
    data = [{"chunk": feed["x"], "att_cache": np.zeros((1, 0, 64), np.float32)} for feed in XS]
    plain = zoo.Net()
    plain.matmul("chunk", zoo.weight(1, 64, 48), "y")
    bare = plain.save(tmp_path / "p.onnx", {"chunk": (zoo.F32, ["B", "T", 64])}, {"y": (zoo.F32, ["B", "T", 48])})
    got = weights(model, tmp_path / "q.onnx", data)
    for name, w in weights(bare, tmp_path / "w.onnx", [{"chunk": feed["x"]} for feed in XS]).items():
        np.testing.assert_array_equal(got[name], w)


def test_token_type_ids_and_empty_past_are_filled_in(tmp_path):
    """A decoder step with a past and token types: everything but the ids is made up, correctly."""
    net, head = zoo.Net(), 16
    h = net.op("Gather", net.const("table", zoo.mixing(1, 64, 32)), "input_ids", out="h0")
    h = net.op("Add", h, net.op("Gather", net.const("types", zoo.mixing(2, 2, 32)), "token_type_ids", out="t"), out="h")
    k = net.matmul(h, zoo.weight(3, 32, head), "k")
    k4 = net.op("Unsqueeze", k, net.const("axis", np.array([1], np.int64)), out="k4")
    every = net.op("Concat", "past_key_values.0.key", k4, out="present.0.key", axis=2)
    seen = net.op("ReduceMean", every, out="seen", axes=[1, 2], keepdims=0)
    row = net.op("Unsqueeze", seen, net.const("axis1", np.array([1], np.int64)), out="row")
    net.matmul(net.op("Add", k, row, out="mix"), zoo.weight(4, head, 64), "logits")
    ids = (zoo.I64, ["batch_size", "sequence_length"])
    model = net.save(
        tmp_path / "m.onnx",
        {
            "input_ids": ids,
            "token_type_ids": ids,
            "past_key_values.0.key": (zoo.F32, ["batch_size", 1, "past_sequence_length", head]),
        },
        {
            "logits": (zoo.F32, ["batch_size", "sequence_length", 64]),
            "present.0.key": (zoo.F32, ["batch_size", 1, "total", head]),
        },
        opset=17,
    )
    rows = [np.minimum(ids, 63) for ids in zoo.token_ids(4)]
    full = [
        {
            "input_ids": r,
            "token_type_ids": np.zeros_like(r),
            "past_key_values.0.key": np.zeros((1, 1, 0, head), np.float32),
        }
        for r in rows
    ]
    got, wanted = weights(model, tmp_path / "a.onnx", rows), weights(model, tmp_path / "b.onnx", full)
    assert all(measure.agreement(got[name], w) > 0.999 for name, w in wanted.items())
