"""Arrays in files are cut into samples, and no more of them is read than is used."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.arrays import read_arrays, stacked
from onnx_woq.runtime.data.inputs import InputInfo
from tests.zoo.nodes import random


def floats(name, *shape):
    return InputInfo(name, np.dtype(np.float32), shape)


def shapes(arrays, inputs):
    return [
        {name: array.shape for name, array in content.items()} if isinstance(content, dict) else content.shape
        for _, content in stacked([("d", arrays)], inputs)
    ]


def test_a_stack_is_cut_along_its_first_axis():
    pair = {"a": random(3, 4), "b": random(3, 6)}
    assert shapes(pair, [floats("a", "b", 4), floats("b", "b", 6)]) == [{"a": (1, 4), "b": (1, 6)}] * 3
    rows = list(stacked([("d", pair)], [floats("a", "b", 4), floats("b", "b", 6)]))
    assert [label for label, _ in rows] == [f"d, row {i}" for i in (1, 2, 3)]
    np.testing.assert_array_equal(np.concatenate([row["b"] for _, row in rows]), pair["b"])


@pytest.mark.parametrize(
    ("count", "batch", "found"),
    [(5, 1, [1] * 5), (6, 2, [2] * 3), (1, 1, [1]), (2, 2, [2]), (5, 2, [5]), (3, "b", [1] * 3), (1, "b", [1])],
)
def test_a_stack_for_a_model_of_fixed_batch(count, batch, found):
    """What does not divide is handed on as it is, to be refused with the shapes."""
    cut = shapes({"a": random(count, 3, 4)}, [floats("a", batch, 3, 4)])
    assert cut == [{"a": (size, 3, 4)} for size in found]
    assert shapes({"a": random(count, 3, 4)}, [floats("a", batch, "t", 4)]) == cut


def test_samples_stacked_with_their_batch():
    assert shapes({"a": random(5, 1, 4)}, [floats("a", 1, 4)]) == [{"a": (1, 4)}] * 5
    assert shapes({"a": random(5, 2, 4)}, [floats("a", "b", 4)]) == [{"a": (2, 4)}] * 5


@pytest.mark.parametrize(
    ("arrays", "inputs"),
    [
        ({"a": random(3, 4), "b": random(2, 4)}, [floats("a", "b", 4), floats("b", "b", 4)]),
        ({"a": random(6, 4), "b": random(6, 4)}, [floats("a", 2, 4), floats("b", 3, 4)]),
        ({"past_a": random(3, 4), "b": random(3, 4)}, [floats("past_a", "b", 4), floats("b", "b", 4)]),
        ({"a": random(3, 4)}, [InputInfo("a", np.dtype(np.float32), None)]),
        ({"other": random(3, 4)}, [floats("a", "b", 4)]),
    ],
)
def test_what_is_no_stack_stays_whole(arrays, inputs):
    assert shapes(arrays, inputs) == [{name: array.shape for name, array in arrays.items()}]


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_of_a_large_file_only_what_is_used_is_read(kind, tmp_path):
    """32 MB, of which two rows of 4 kB are used; another array beside it is not read at all."""
    large = np.zeros((8192, 1024), np.float32)
    large[:2] = random(2, 1024)
    small = np.arange(6, dtype=np.float32).reshape(3, 2)
    if kind == "npy":
        np.save(tmp_path / "d.npy", large)
    else:
        np.savez(tmp_path / "d.npz", labels=large, x=small)
    inputs = [floats("x", "b", 1024 if kind == "npy" else 2)]
    tracemalloc.start()
    rows = read_arrays(tmp_path / f"d.{kind}", inputs)
    found = [next(rows)[1] for _ in range(2)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in found]), (large if kind == "npy" else small)[:2])


def test_samples_do_not_depend_on_the_file_any_more(tmp_path):
    np.save(tmp_path / "d.npy", random(3, 4))
    ((_, row), *_), ((_, whole),) = (
        list(read_arrays(tmp_path / "d.npy", inputs)) for inputs in ([floats("x", "b", 4)], [floats("x", 3, 4)])
    )
    np.save(tmp_path / "d.npy", np.zeros((3, 4), np.float32))
    np.testing.assert_array_equal(row["x"], random(3, 4)[:1])
    np.testing.assert_array_equal(whole, random(3, 4))


def test_an_empty_array_and_a_scalar(tmp_path):
    for array in (np.zeros((0, 4), np.float32), np.float32(3)):
        np.save(tmp_path / "d.npy", array)
        ((_, found),) = read_arrays(tmp_path / "d.npy", [floats("x", "b", 4), floats("y", "b", 4)])
        assert found.shape == np.shape(array)
    np.save(tmp_path / "d.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"d\.npy is not a file of plain arrays"):
        next(read_arrays(tmp_path / "d.npy", []))
