"""A record that is read back is what was written, and what of it is not on the disk as it was does not count."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.refine.low_rank import GRID
from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import PlannedWeight, make_plan
from onnx_woq.engine.resume import records
from onnx_woq.engine.solve import Solved
from onnx_woq.graph.edit import LARGE
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import next_place
from onnx_woq.recipe import Recipe
from tests.zoo.codes import random_codes
from tests.zoo.nodes import graph, node, random, value, write

ADDED = {"lowrank": 16, "bias_correction": True}
RECIPES = {
    "4 bits": Recipe(),
    "3 bits": Recipe(spec=Spec(3, 16, symmetric=True)),
    "all that can be added": Recipe(**ADDED),
}


@dataclass
class Written:
    """A journal and its data file, in memory."""

    weights: tuple[PlannedWeight, ...]
    solved: list[Solved]
    journal: bytes
    data: bytearray

    def read(self, shape: tuple[int, ...], dtype: np.dtype, place: int) -> np.ndarray:
        end = place + math.prod(shape) * dtype.itemsize
        if end > len(self.data):
            raise ValueError("the file ends before")
        return np.frombuffer(bytes(self.data[place:end]), dtype).reshape(shape)

    def finished(self, journal=None, blocks=None):
        blocks = [[weight] for weight in self.weights] if blocks is None else blocks
        return records.finished(self.journal if journal is None else journal, self.weights, blocks, self.read)


def solved(weight: PlannedWeight, seed: int) -> Solved:
    pack = lambda k, n, spec: weight.operator.pack(random_codes(k, n, spec, seed=seed), weight.storage)  # noqa: E731
    return Solved(
        packed=tuple(pack(part.k, part.n, weight.spec) for part in weight.weight_sources()),
        input_scale=random(weight.k, seed=seed) if seed % 2 else None,
        error=0.1 / (1 + seed),
        factors=tuple(pack(k, n, GRID) for k, n in weight.factor_dims),
        bias=tuple(random(part.n, seed=seed) for part in weight.weight_sources()) if weight.corrected else (),
    )


def written(folder: Path, recipe: Recipe) -> Written:
    """Four weights, small ones and large ones, two of which are one group."""
    weights = {"A": random(64, 300), "B": random(64, 5, seed=1), "C": random(300, 64, seed=2), "D": random(64, 8)}
    nodes = [
        node("MatMul", ["x", "A"], ["a"]),
        node("MatMul", ["x", "B"], ["b"]),
        node("MatMul", ["a", "C"], ["c"]),
        node("MatMul", ["c", "D"], ["d"]),
    ]
    main = graph(nodes, [value("x", ("t", 64))], [value("b", ("t", 5)), value("d", ("t", 8))], weights)
    planned = make_plan(load(write(folder / "m.onnx", main)), recipe).groups
    out = Written(planned, [], records.head({"model": "abc"}), bytearray())
    for seed, weight in enumerate(planned):
        out.solved.append(solved(weight, seed))
        arrays = records.arrays_of(out.solved[-1])
        places, end = records.assign_offsets((array.nbytes for array in arrays), len(out.data))
        out.data.extend(bytes(end - len(out.data)))
        for array, place in zip(arrays, places, strict=True):
            if place is not None:
                out.data[place : place + array.nbytes] = records.raw(array)
        out.journal += records.record_line(weight, out.solved[-1], end)
    return out


def everything(one: Solved):
    scale = [] if one.input_scale is None else [one.input_scale]
    return [*records.arrays_of(one), *scale, *one.bias]


def assert_same(one: Solved, other: Solved):
    assert one.error == other.error
    for a, b in zip(everything(one), everything(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: written(tmp_path_factory.mktemp("run"), recipe) for name, recipe in RECIPES.items()}


@pytest.fixture(params=RECIPES)
def run(request, runs):
    return copied(runs[request.param])


def copied(run: Written) -> Written:
    return replace(run, data=bytearray(run.data))


def test_what_is_read_back_is_what_was_written(run):
    entries, position = run.finished()
    assert [entry.name for entry in entries] == [weight.name for weight in run.weights]
    assert position == len(run.journal) == entries[-1].line_end
    assert entries[-1].end == len(run.data)
    for entry, one in zip(entries, run.solved, strict=True):
        assert_same(entry.solved, one)
        assert [type(part) for part in entry.solved.packed] == [type(part) for part in one.packed]


def test_small_arrays_are_in_the_journal_and_large_ones_are_not(run):
    lines = [json.loads(line) for line in run.journal.splitlines()[1:]]
    for line, one in zip(lines, run.solved, strict=True):
        assert set(line) == {"tap", "end", "check", "small", "input_scale", "bias", "error", "sum"}
        assert len(line["small"]) == sum(array.nbytes <= LARGE for array in records.arrays_of(one))
    assert len(run.data) < records.most_bytes(run.weights)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_of_the_data_ends_what_counts(runs, share, flip):
    run = copied(runs["4 bits"])
    place = int(share * len(run.data))
    run.data[place] ^= flip
    ends = [entry["end"] for entry in map(json.loads, run.journal.splitlines()[1:])]
    entries, _ = run.finished()
    hit = next(number for number, end in enumerate(ends) if place < end)
    padding = all(
        not start <= place < start + array.nbytes
        for start, array in placed(run.solved[hit], ends[hit - 1] if hit else 0)
    )
    assert len(entries) == (len(run.weights) if padding else hit)
    for entry, one in zip(entries, run.solved, strict=False):
        assert_same(entry.solved, one)


def placed(one, start):
    arrays = records.arrays_of(one)
    places, _ = records.assign_offsets((array.nbytes for array in arrays), start)
    return [(place, array) for place, array in zip(places, arrays, strict=True) if place is not None]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_of_the_journal_never_changes_a_solution(runs, share, flip):
    """The first line is the caller's to judge."""
    run = runs["4 bits"]
    start = len(records.first_line(run.journal))
    journal = bytearray(run.journal)
    journal[start + int(share * (len(journal) - start))] ^= flip
    entries, _ = run.finished(bytes(journal))
    assert [entry.name for entry in entries] == [weight.name for weight in run.weights[: len(entries)]]
    for entry, one in zip(entries, run.solved, strict=False):
        assert_same(entry.solved, one)


def test_a_journal_counts_up_to_where_it_was_cut(run):
    lines = run.journal.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    for cut in range(0, len(run.journal) + 1, 29):
        entries, position = run.finished(run.journal[:cut])
        whole = max(0, int((ends <= cut).sum()) - 1)
        assert len(entries) == whole
        assert position == (ends[whole] if cut >= ends[0] else 0)
    run.data[:] = run.data[: len(run.data) // 2]
    assert len(run.finished()[0]) < len(run.weights), "the data it speaks of have to be there"


def test_only_whole_blocks_count(run):
    first, second, third = run.weights
    count = lambda blocks, lines: len(run.finished(b"".join(run.journal.splitlines(keepends=True)[:lines]), blocks)[0])  # noqa: E731
    assert [count([[first], [second, third]], lines) for lines in (1, 2, 3, 4)] == [0, 1, 1, 3]
    assert [count([[first, second], [third]], lines) for lines in (1, 2, 3, 4)] == [0, 0, 2, 3]
    assert count([[first, third], [second]], 3) == 0, "what stands before a block that counts has to count as well"
    assert len(run.finished(run.journal + run.journal.splitlines(keepends=True)[1])[0]) == 3, "no weight counts twice"


@given(sizes=st.lists(st.integers(0, 300_000), max_size=12), end=st.integers(0, 100_000))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_large_arrays_get_places_that_do_not_overlap(sizes, end):
    places, last = records.assign_offsets(sizes, end)
    assert [place is None for place in places] == [size <= LARGE for size in sizes]
    at = end
    for place, size in zip(places, sizes, strict=True):
        if place is not None:
            assert place >= at
            assert place == next_place(at, size)
            at = place + size
    assert last == at


@given(order=st.permutations(range(3)), start=st.integers(0, 2))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_no_order_makes_a_longer_file(runs, order, start):
    weights = runs["all that can be added"].weights
    end = 0
    for index in order[start:]:
        for shapes in weights[index].shapes():
            _, end = records.assign_offsets((math.prod(shape) * dtype.itemsize for shape, dtype in shapes), end)
    assert end <= records.most_bytes(weights)


def test_arrays_can_be_replaced_by_equal_ones(run):
    for one in run.solved:
        copies = [array.copy() for array in records.arrays_of(one)]
        other = records.with_arrays(one, copies)
        assert_same(one, other)
        for a, b in zip(records.arrays_of(other), copies, strict=True):
            assert np.shares_memory(a, b)


def test_another_run_is_told_by_what_differs():
    key = {"model": "abc", "recipe": "r", "package version": "1"}
    first = records.first_line(records.head(key) + b"more")
    assert first == records.head(key)
    assert records.first_line(first[:-1]) == b""
    said = records.difference(Path("folder"), key | {"recipe": "s", "model": "x"}, first)
    assert "is of another model and another recipe:" in said
    assert "is of another package version:" in records.difference(Path("folder"), key | {"package version": "2"}, first)
    assert "is of another format:" in records.difference(Path("folder"), key, records.head(key).replace(b"1", b"9", 1))


FIELDS = ("tap", "end", "check", "small", "input_scale", "bias", "error")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_record_is_under_its_checksum(field, runs):
    run = copied(runs["4 bits"])
    head, first, *rest = run.journal.splitlines(keepends=True)
    entry = json.loads(first)
    entry[field] = 0.25 if field == "error" else entry[field] + [""] if isinstance(entry[field], list) else "AAAA"
    run.journal = b"".join([head, json.dumps(entry, sort_keys=True).encode() + b"\n", *rest])
    assert run.finished()[0] == []


def test_records_of_version_01_had_no_such_checksum_and_count(run):
    head, *lines = run.journal.splitlines(keepends=True)
    entries = [{name: value for name, value in json.loads(line).items() if name in FIELDS} for line in lines]
    run.journal = b"".join([head, *(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in entries)])
    assert [entry.name for entry in run.finished()[0]] == [weight.name for weight in run.weights]
