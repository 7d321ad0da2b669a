"""What was remembered comes back as it was, in this process or in a later one, or not at all."""

from __future__ import annotations

import gc
import json
import resource
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnx_woq.runtime.calibration.hidden_states import HiddenStateStore, Stored, load_newest

KEYS = {"h": "key of h", "mask": "key of mask"}


def samples(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.tril(np.ones((1, 1, 7, 7), bool))
    return [{"h": rng.standard_normal((1, 7, 16), np.float32), "mask": mask} for _ in range(3)]


def kept(folder, seed=0):
    store = HiddenStateStore(folder)
    for sample in samples(seed):
        store.add(sample)
    store.close(KEYS)
    return store


def equal(saved, expected):
    assert len(saved) == len(expected)
    for sample, other in zip(saved, expected, strict=True):
        assert sample.keys() == other.keys()
        for name, stored in sample.items():
            array = stored.read()
            assert array.dtype == other[name].dtype
            assert np.array_equal(array, other[name], equal_nan=array.dtype.kind == "f")


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(st.sampled_from([np.float32, np.int64, np.bool_]), arrays.array_shapes(min_dims=0, min_side=0)))
def test_round_trip(array):
    store = HiddenStateStore(None)
    first, second = store.add({"a": array}), store.add({"a": array.copy()})
    equal([first, second], [{"a": array}, {"a": array}])


def test_an_array_that_two_samples_share_is_written_once(tmp_path):
    store = kept(tmp_path)
    assert (tmp_path / "hidden-0.bin").stat().st_size == 3 * 7 * 16 * 4 + 49
    del store


def test_what_a_full_disk_did_not_take_is_said_once(tmp_path, monkeypatch):
    store, more = HiddenStateStore(tmp_path), []
    monkeypatch.setattr(sys, "unraisablehook", more.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        store.add({"h": np.ones(500, np.uint8)})
        with pytest.raises(OSError, match="File too large"):
            store.close(KEYS)
        del store
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert more == []


def test_a_later_process_finds_it(tmp_path):
    kept(tmp_path)
    keys, saved = load_newest(tmp_path, 3)
    assert keys == KEYS
    equal(saved, samples())


def test_the_last_two_are_kept_and_the_last_one_wins(tmp_path):
    for seed in range(4):
        kept(tmp_path, seed)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "hidden-2.bin", "hidden-2.json", "hidden-3.bin", "hidden-3.json",
    ]  # fmt: skip
    equal(load_newest(tmp_path, 3)[1], samples(3))


def test_it_is_private(tmp_path):
    kept(tmp_path)
    assert (tmp_path / "hidden-0.bin").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["short", "long", "one bit", "no list", "half a list", "too few samples"])
def test_what_is_damaged_is_not_used(damage, tmp_path):
    kept(tmp_path)
    data, listing = tmp_path / "hidden-0.bin", tmp_path / "hidden-0.json"
    content = bytearray(data.read_bytes())
    if damage == "short":
        data.write_bytes(content[:-1])
    elif damage == "long":
        data.write_bytes(content + b"\0")
    elif damage == "one bit":
        content[100] ^= 1
        data.write_bytes(content)
    elif damage == "no list":
        listing.unlink()
    elif damage == "half a list":
        listing.write_text(listing.read_text()[:50])
    assert load_newest(tmp_path, 4 if damage == "too few samples" else 3)[0] == {}


@pytest.mark.parametrize(
    ("field", "content"),
    [("shape", [1 << 40]), ("offset", 1 << 40), ("offset", -8), ("shape", [-1, -7]), ("dtype", "O")],
)
def test_a_list_that_lies_allocates_nothing(field, content, tmp_path):
    kept(tmp_path)
    listing = json.loads((tmp_path / "hidden-0.json").read_text())
    entry = listing["samples"][0]["h"]
    entry[["dtype", "shape", "offset"].index(field)] = content
    (tmp_path / "hidden-0.json").write_text(json.dumps(listing))
    assert load_newest(tmp_path, 3) == ({}, [{}, {}, {}])


def test_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "hidden-0.bin").symlink_to(outside)
    with pytest.raises(OSError, match="hidden-0"):
        HiddenStateStore(folder)
    assert outside.read_bytes() == b"precious"


def test_reading_beyond_the_end_is_an_error(tmp_path):
    store = kept(tmp_path)
    with pytest.raises(OSError, match="ends before"):
        Stored(store, 8, np.dtype(np.float32), (1000, 1000)).read()
