"""Every form of data gives the same feeds; everything wrong is named."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest

from onnx_woq.errors import DataError
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.data.feeds import data_hash, feeds, model_inputs, random_feeds
from onnx_woq.runtime.data.inputs import InputInfo
from tests.zoo.chains import VOCABULARY, K, byte_tokenizer, language_model, letter_ids
from tests.zoo.nodes import FLOAT16, graph, node, random, value, write

ROWS = [np.random.default_rng(i).integers(1, VOCABULARY, (1, t)) for i, t in enumerate((5, 9, 1, 12))]
XS = [random(2, t, K, seed=t) for t in (3, 4)]


def ints(name, *shape, dtype=np.int64, limit=None):
    return InputInfo(name, np.dtype(dtype), shape, limit)


def read(source, inputs, samples=4, seqlen=64, **options):
    return feeds(source, inputs, samples=samples, seqlen=seqlen, **options)


FORMS = {
    "dictionaries": lambda _: [{"input_ids": ids} for ids in ROWS],
    "with labels": lambda _: [{"input_ids": ids, "labels": ids} for ids in ROWS],
    "(inputs, labels)": lambda _: [({"input_ids": ids}, ids) for ids in ROWS],
    "(array, labels)": lambda _: [(ids, 3) for ids in ROWS],
    "([arrays], labels)": lambda _: [([ids, np.ones_like(ids)], 3) for ids in ROWS],
    "arrays": lambda _: list(ROWS),
    "rows": lambda _: [ids[0] for ids in ROWS],
    "lists of ids": lambda _: [ids[0].tolist() for ids in ROWS],
    "nested lists": lambda _: [ids.tolist() for ids in ROWS],
    "lists of arrays": lambda _: [[ids, np.ones_like(ids)] for ids in ROWS],
    "int32": lambda _: [ids.astype(np.int32) for ids in ROWS],
    "boolean masks": lambda _: [{"input_ids": ids, "attention_mask": ids > -1} for ids in ROWS],
    "generator": lambda _: (ids for ids in ROWS),
    "tensors": lambda _: [Tensor(ids) for ids in ROWS],
    "tensors of a device": lambda _: [DeviceTensor(ids) for ids in ROWS],
    "dictionaries of tensors": lambda _: [{"input_ids": DeviceTensor(ids)} for ids in ROWS],
    "lists of tensors": lambda _: [[DeviceTensor(ids), DeviceTensor(np.ones_like(ids))] for ids in ROWS],
    "[inputs, labels]": lambda _: [[{"input_ids": ids}, DeviceTensor(ids)] for ids in ROWS],
    "map-style dataset": lambda _: MapStyle([{"input_ids": ids} for ids in ROWS]),
    "sequence without a length": lambda _: Endless([{"input_ids": ids} for ids in ROWS]),
    "folder of npy": lambda folder: [np.save(folder / f"{i}.npy", ids) for i, ids in enumerate(ROWS)] and folder,
    "folder of npz": lambda folder: [np.savez(folder / f"{i}.npz", input_ids=a) for i, a in enumerate(ROWS)] and folder,
}


class Tensor:
    """Something like a torch tensor."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


class DeviceTensor:
    """Something like a torch tensor on a device, with a gradient: no array before `detach().cpu().numpy()`."""

    def __init__(self, array, detached=False, near=False):
        self.array, self.detached, self.near = array, detached, near
        self.shape, self.ndim = array.shape, array.ndim

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("detach it first")

    def detach(self):
        return DeviceTensor(self.array, True, self.near)

    def cpu(self):
        return DeviceTensor(self.array, self.detached, True)

    def numpy(self):
        assert self.detached
        assert self.near
        return self.array


class MapStyle:
    """A dataset as torch has them: no end but its length, and no `__iter__`."""

    def __init__(self, elements):
        self.elements = elements

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index % len(self.elements)]


class Endless:
    """The old protocol of sequences: indices from 0 up to an IndexError."""

    def __init__(self, elements):
        self.elements = elements

    def __getitem__(self, index):
        return self.elements[index]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_data(form, lm, tmp_path):
    assert data_hash(read(FORMS[form](tmp_path), lm)) == data_hash(read([{"input_ids": ids} for ids in ROWS], lm))


def test_single_files(lm, floats, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=ROWS[0], attention_mask=np.ones_like(ROWS[0]))
    np.save(tmp_path / "d.npy", XS[0])
    assert data_hash(read(tmp_path / "d.npz", lm, samples=1)) == data_hash(read([ROWS[0]], lm, samples=1))
    rows = read(str(tmp_path / "d.npy"), floats, samples=len(XS[0]))
    assert all(np.array_equal(row["x"], x[None]) for row, x in zip(rows, XS[0], strict=True)), "a stack of samples"
    assert np.array_equal(read(XS[0], floats, samples=1)[0]["x"], XS[0]), "one array is one sample"
    assert np.array_equal(read({"x": XS[0]}, floats, samples=1)[0]["x"], XS[0])


def test_two_arrays_for_a_model_with_two_inputs():
    inputs = [InputInfo("a", np.dtype(np.float32), ("b", 4)), InputInfo("b", np.dtype(np.float32), ("b", 6))]
    a, b = random(3, 4), random(3, 6)
    for sample in ((a, b), [a, b], ([a, b], 1), ((a, b), 1), ({"a": a, "b": b}, 1)):
        (feed,) = read([sample], inputs, samples=1)
        assert np.array_equal(feed["a"], a)
        assert np.array_equal(feed["b"], b)


def test_a_generator_is_read_once_and_no_further_than_needed(lm):
    asked = []

    def source():
        for i in range(100):
            asked.append(i)
            yield ROWS[0]

    assert len(read(source(), lm, samples=3, skip=2)) == 3
    assert asked == [0, 1, 2, 3, 4]


def test_safe_casts_only(lm, floats):
    assert read([XS[0].astype(np.float64)], floats, samples=1)[0]["x"].dtype == np.float32
    narrow = [ints("input_ids", "b", "s", dtype=np.int32)]
    assert read([ROWS[0]], narrow, samples=1)[0]["input_ids"].dtype == np.int32
    for bad, inputs, word in (
        (ROWS[0].astype(np.float32), lm, "float32"),
        (np.ones((1, 3, K), np.int64), floats, "int64"),
        (np.array([["a"]]), lm, "str"),
        (np.array([[2**40]]), narrow, "too large"),
        (np.full((1, 3, K), 1e39), floats, "infinite"),
    ):
        with pytest.raises(DataError, match=word), np.errstate(over="ignore"):
            read([bad], inputs, samples=1)


def test_labels_are_reported_once(lm, caplog):
    with caplog.at_level(logging.WARNING):
        read([{"input_ids": ids, "labels": ids, "idx": ids} for ids in ROWS], lm)
    assert [record.getMessage() for record in caplog.records] == [
        "ignored what the model has no input for: idx, labels"
    ]


def test_longer_samples_are_cut_and_short_ones_kept(lm):
    lengths = lambda found: [feed["input_ids"].shape[1] for feed in found]  # noqa: E731
    masks = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in ROWS]
    for source in (ROWS, masks):
        assert lengths(read(source, lm, seqlen=6)) == [5, 6, 1, 6]
        assert all(f["attention_mask"].shape == f["input_ids"].shape for f in read(source, lm, seqlen=6))
        assert lengths(read(source, lm, samples=2, seqlen=6, exact_length=True)) == [6, 6]
    with pytest.raises(DataError, match=r"only 2 samples of exactly 6 tokens.*--samples 2"):
        read(ROWS, lm, samples=3, seqlen=6, exact_length=True)


def test_floats_are_not_cut(floats):
    assert [f["x"].shape for f in read(XS, floats, samples=2, seqlen=1)] == [x.shape for x in XS]


def test_fewer_samples_than_wanted(lm):
    with pytest.raises(DataError, match=r"only 4 samples.*50 are wanted.*--samples 4"):
        read(ROWS, lm, samples=50)
    assert len(read(ROWS, lm, samples=50, at_most=True)) == 4
    assert len(read(ROWS, lm, samples=50, at_most=True, skip=3)) == 1
    for options in ({"skip": 4}, {"seqlen": 13, "exact_length": True}):
        with pytest.raises(DataError, match="no sample"):
            read(ROWS, lm, samples=50, at_most=True, **options)
    with pytest.raises(DataError, match="no sample"):
        read([], lm)


def test_a_list_of_inputs_and_labels_for_a_model_with_one_input(floats):
    """As data loaders give them; two arrays for two inputs are no labels."""
    (feed,) = read([[DeviceTensor(XS[0]), DeviceTensor(np.ones(2))]], floats, samples=1)
    assert np.array_equal(feed["x"], XS[0])


def test_empty_arrays_where_the_model_takes_them():
    """Caches before the first chunk, whatever they are called."""
    inputs = [
        InputInfo("chunk", np.dtype(np.float32), ("b", "t", 4)),
        InputInfo("cache", np.dtype(np.float32), ("b", "c", 4)),
    ]
    chunk, cache = random(1, 3, 4), np.zeros((1, 0, 4), np.float32)
    (feed,) = read([{"chunk": chunk, "cache": cache}], inputs, samples=1)
    assert feed["cache"].shape == (1, 0, 4)
    with pytest.raises(DataError, match=r"sample 1 is empty \(chunk \[1, 0, 4\], cache \[1, 0, 4\]\): leave"):
        read([{"chunk": chunk[:, :0], "cache": cache}], inputs, samples=1)
    fixed = [inputs[0], InputInfo("cache", np.dtype(np.float32), ("b", 2, 4))]
    with pytest.raises(DataError, match=r"cache has shape \[1, 0, 4\]"):
        read([{"chunk": chunk, "cache": cache}], fixed, samples=1)


def test_no_tokens_but_a_mask(lm):
    with pytest.raises(DataError, match=r"is empty \(input_ids \[1, 0\]\)"):
        read([{"input_ids": np.ones((1, 0), np.int64), "attention_mask": np.ones((1, 3), np.int64)}], lm, samples=1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.npz", "d.npy", "d"])
def test_a_pipe_is_not_waited_for(name, lm, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is neither a regular file nor a folder"):
        read(tmp_path / name, lm)
    with pytest.raises(DataError, match=r"/dev/zero is neither"):
        read("/dev/zero", lm)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy is not a regular file"):
        read(tmp_path / "folder", lm)


WRONG = {
    "unknown names": ([{"ids": ROWS[0]}], r"ids.*input_ids int64 \[batch_size, sequence_length\]"),
    "only the mask": ([{"attention_mask": ROWS[0]}], "sample 1 has no input_ids"),
    "past only": ([{"past_key_values.0.key": random(1, 1, 2, K)}], "has no input_ids"),
    "fixed dimension": ([{"input_ids": ROWS[0], "past_key_values.0.key": random(1, 1, 0, 7)}], r"\[1, 1, 0, 7\]"),
    "rank": ([{"input_ids": ROWS[0][None, None]}], r"\[1, 1, 1, 5\]"),
    "id outside": ([np.array([[1, VOCABULARY]])], rf"holds {VOCABULARY}.*{VOCABULARY} rows.*tokenizer"),
    "negative id": ([np.array([[1, -1]])], "holds -1"),
    "bad tokenizer": ([np.array([[2**32 - 1]])], "4294967295"),
    "empty": ([np.ones((1, 0), np.int64)], "empty"),
    "no rows": ([np.ones((0, 4), np.int64)], "empty"),
    "too many arrays": ([[ROWS[0]] * 5], "5 arrays.*4 inputs"),
    "strings": (["hello"], "sample 1 is a str"),
    "none": ([None], "NoneType"),
    "a number": (3, "int is not data"),
    "no data": (None, "NoneType is not data"),
    "objects": ([np.array([[object()]])], "object"),
    "ragged list": ([[[1, 2], [3]]], "not an array"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_for_a_language_model(case, lm):
    source, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        read(source, lm, samples=1)


def test_a_sample_with_more_tokens_than_positions(lm):
    with pytest.raises(DataError, match=r"position_ids holds 299.*256 rows: give a shorter --seqlen"):
        read([np.ones((1, 300), np.int64)], lm, samples=1, seqlen=300)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(bad, floats):
    x = XS[0].copy()
    x[1, 2, 3] = bad
    with pytest.raises(DataError, match="sample 2: x holds NaN"):
        read([XS[0], x], floats, samples=2)
    half = [InputInfo("x", np.dtype(np.float16), ("b", "t", K))]
    with pytest.raises(DataError, match="NaN"), np.errstate(over="ignore"):
        read([x], half, samples=1)


def test_an_array_does_not_say_which_input_it_is():
    inputs = [InputInfo(name, np.dtype(np.float32), ("b", 4)) for name in "ab"]
    with pytest.raises(DataError, match=r"one array, but the model needs a float32 \[b, 4\], b float32"):
        read([random(2, 4)], inputs, samples=1)


def test_files_that_are_no_data(lm, tmp_path):
    cases = {
        "missing.npz": None,
        "junk.npz": b"junk",
        "zip.npz": b"PK\x03\x04" + bytes(40),
        "empty.npy": b"",
        "d.xml": b"<a/>",
        "d.parquet": b"PAR1",
        "none.txt": b"  \n",
        "latin.txt": "naïve".encode("latin-1"),
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read(tmp_path / name, lm)
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"pickle\.npy"):
        read(tmp_path / "pickle.npy", lm)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder.*holds no"):
        read(tmp_path / "folder", lm)
    with pytest.raises(DataError, match="at least 1"):
        read(ROWS, lm, samples=0)


def test_a_truncated_archive(lm, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.ones((1, 500), np.int64))
    content = (tmp_path / "d.npz").read_bytes()
    flipped = bytearray(content)
    flipped[300] ^= 255
    for damaged in (content[: len(content) // 2], bytes(flipped)):
        (tmp_path / "d.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"d\.npz"):
            read(tmp_path / "d.npz", lm, samples=1)


TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def ids_of(found):
    return [feed["input_ids"][0].tolist() for feed in found]


def test_text_is_one_stream_for_a_decoder(lm, tmp_path):
    byte_tokenizer(tmp_path, closing=True)
    (tmp_path / "t.txt").write_text(TEXT)
    wanted = letter_ids(TEXT)
    found = read(tmp_path / "t.txt", lm, samples=5, seqlen=40, model_dir=tmp_path)
    assert ids_of(found) == [[1, *wanted[i * 39 : i * 39 + 39]] for i in range(5)], "each begins as a document"
    held_out = read(tmp_path / "t.txt", lm, samples=3, seqlen=40, skip=5, model_dir=tmp_path)
    assert ids_of(held_out) == [[1, *wanted[i * 39 : i * 39 + 39]] for i in range(5, 8)]
    with pytest.raises(DataError, match=r"only 23 samples.*--samples 23"):
        read(tmp_path / "t.txt", lm, samples=1000, seqlen=40, model_dir=tmp_path)
    (long,) = read(tmp_path / "t.txt", lm, samples=1, seqlen=2000, model_dir=tmp_path)
    assert long["input_ids"].tolist() == [[1, *wanted[:255]]], "as many as the model has positions"
    (tmp_path / "t.txt").write_text(TEXT[:100])
    (short,) = read(tmp_path / "t.txt", lm, samples=1, seqlen=200, model_dir=tmp_path)
    assert short["input_ids"].tolist() == [[1, *wanted[:100]]], "better one short sample than none"
    with pytest.raises(DataError, match="no sample"):
        read(tmp_path / "t.txt", lm, samples=1, seqlen=200, exact_length=True, model_dir=tmp_path)


def test_lines_are_samples_for_an_encoder(tmp_path):
    inputs = model_inputs(load(language_model(tmp_path / "m.onnx", past=False, positions=False, types=True)))
    byte_tokenizer(tmp_path, closing=True)
    (tmp_path / "t.txt").write_text("one\n\n  \ntwo words\nthree, much longer\n")
    found = read(tmp_path / "t.txt", inputs, samples=3, seqlen=10, model_dir=tmp_path)
    lines = [letter_ids(line) for line in ("one", "two words", "three, much longer")]
    assert ids_of(found) == [[1, *lines[0], 2], [1, *lines[1][:8], 2], [1, *lines[2][:8], 2]], "cut inside the ends"
    assert all(not feed["token_type_ids"].any() and feed["attention_mask"].all() for feed in found)
    assert (
        ids_of(read(tmp_path / "t.txt", inputs, samples=2, seqlen=10, skip=1, model_dir=tmp_path)) == ids_of(found)[1:]
    )


def test_records_are_samples(lm, tmp_path):
    byte_tokenizer(tmp_path, closing=True)
    lines = [{"text": "one", "other": "no"}, {"body": "two words", "n": 3}, "three, much longer"]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read(tmp_path / "t.jsonl", lm, samples=3, seqlen=10, model_dir=tmp_path)
    assert [len(ids) for ids in ids_of(found)] == [5, 10, 10]
    assert ids_of(found)[0] == [1, *letter_ids("one"), 2]
    assert len(read(tmp_path / "t.jsonl", lm, samples=2, seqlen=10, exact_length=True, model_dir=tmp_path)) == 2
    for line, message in (("{", "line 4 is not JSON"), ('{"a": "x", "b": "y"}', "line 4 has no"), ("[1]", "line 4")):
        (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + line)
        with pytest.raises(DataError, match=message):
            read(tmp_path / "bad.jsonl", lm, model_dir=tmp_path)


def test_a_model_of_fixed_length_gets_padding(tmp_path):
    inputs = [ints("input_ids", "b", 12), ints("attention_mask", "b", 12), ints("token_type_ids", "b", 12)]
    byte_tokenizer(tmp_path, closing=True)
    (tmp_path / "t.txt").write_text("one\na line that is too long\n")
    first, second = read(tmp_path / "t.txt", inputs, samples=2, model_dir=tmp_path)
    assert ids_of([first])[0] == [1, *letter_ids("one"), 2] + [0] * 7
    assert first["attention_mask"].tolist() == [[1] * 5 + [0] * 7]
    assert second["attention_mask"].all()


def test_the_longest_sequence_a_model_takes(lm, tmp_path, caplog):
    byte_tokenizer(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert ids_of(read(tmp_path / "t.txt", lm, samples=1, model_dir=tmp_path))[0] == letter_ids(TEXT)[:64]
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 16}))
    assert ids_of(read(tmp_path / "t.txt", lm, samples=1, model_dir=tmp_path))[0] == letter_ids(TEXT)[:16]
    assert "cut to 16 tokens" in caplog.text
    with pytest.raises(DataError, match="--seqlen 16"):
        read(tmp_path / "t.txt", lm, samples=1, exact_length=True, model_dir=tmp_path)


def test_text_for_a_model_without_tokens(floats, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(DataError, match=rf"no input_ids.*x float32 \[b, t, {K}\]"):
        read(tmp_path / "t.txt", floats)


def test_random_data_only_by_name(lm, floats):
    for inputs in (lm, floats):
        found = read("random", inputs, samples=3, seqlen=7)
        assert len(found) == 3
        assert data_hash(found) == data_hash(random_feeds(inputs, 3, 7, seed=0))
        assert data_hash(found) != data_hash(random_feeds(inputs, 3, 7, seed=1))
        assert all({n: a.dtype for n, a in feed.items()} == {i.name: i.dtype for i in inputs} for feed in found)
    assert read("random", lm, samples=1, seqlen=7)[0]["input_ids"].shape == (1, 7)
    half = [InputInfo("x", np.dtype(np.float16), None)]
    with pytest.raises(DataError, match="rank"):
        random_feeds(half, 1, 7)


def test_the_hash_sees_everything():
    a = np.arange(6, dtype=np.int64).reshape(2, 3)
    base = data_hash([{"a": a, "b": a}])
    others = [
        [{"a": a, "b": a + 1}],
        [{"a": a, "c": a}],
        [{"a": a.reshape(3, 2), "b": a}],
        [{"a": a.astype(np.uint64), "b": a}],
        [{"a": a}, {"b": a}],
        [{"a": a, "b": a}] * 2,
    ]
    assert len({base, *map(data_hash, others)}) == 1 + len(others)
    assert data_hash([{"b": a.copy("F"), "a": a}]) == base
    assert data_hash([{"a": np.zeros((1, 0, 3), np.float16)}]) != data_hash([{"a": np.zeros((0, 3), np.float16)}])


def test_half_precision_inputs(tmp_path):
    main = graph([node("Identity", ["x"], ["y"])], [value("x", ("b", 4), FLOAT16)], [value("y", ("b", 4), FLOAT16)])
    inputs = model_inputs(load(write(tmp_path / "m.onnx", main)))
    assert read([random(3, 4)], inputs, samples=1)[0]["x"].dtype == np.float16
