"""Parts go on from what is remembered, and give what the whole model gives; what an edit spoils is computed again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnx_woq.graph.edit import add_initializer
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.calibration import hidden_states as shelf_module
from onnx_woq.runtime.calibration import replay as replay_module
from onnx_woq.runtime.calibration.replay import Replay, squares, stitched
from tests.zoo.chains import WEIGHTS, K, chain, chain_inputs
from tests.zoo.nodes import random, run

RAGGED = [{"x": random(1, t, K, seed=t)} for t in (5, 9, 1, 12)]
INPUTS = {"A": "n1", "B": "ta", "C": "n2", "D": "tc", "E": "s"}
PLENTY = 1 << 30


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def model(tmp_path):
    return load(chain(tmp_path / "m.onnx"))


@pytest.fixture
def products(monkeypatch):
    """The names of the MatMuls of every part that is run."""
    names, make = [], replay_module.make_session

    def spy(part, **options):
        names.extend(n.name for n in part.ir.graph if n.op_type == "MatMul")
        return make(part, **options)

    monkeypatch.setattr(replay_module, "make_session", spy)
    return names


def swap(model, constant, factor):
    """Replaces a constant by a multiple of it under a new name."""
    graph = model.ir.graph
    old = graph.initializers[constant]
    old.replace_all_uses_with(add_initializer(graph, f"{constant}~", old.const_value.numpy() * np.float32(factor)))
    graph.initializers.pop(constant)


def check(arrays, weight, weights=WEIGHTS):
    for feed, found in zip(RAGGED, arrays, strict=True):
        want = chain_inputs(feed["x"], weights)[weight]
        np.testing.assert_allclose(found[INPUTS[weight]], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 2, 9])
@pytest.mark.parametrize("budget", [0, PLENTY])
def test_every_part_starts_where_the_last_one_ended(budget, workers, model, pool, products):
    replay = Replay(RAGGED, budget, pool, workers)
    for index, weight in enumerate("BCDE"):
        check(list(replay.run(model, [INPUTS[weight]], [INPUTS[w] for w in "BCDE"[index + 1 :]])), weight)
    assert products == ["a", "b", "c", "d"]


def test_what_an_edit_spoils_is_computed_again_and_nothing_else(model, pool, products):
    replay = Replay(RAGGED, PLENTY, pool, 1)
    list(replay.run(model, ["n2"], ["tc", "s"]))
    swap(model, "C", 0.5)
    check(list(replay.run(model, ["tc"], ["s"])), "D", WEIGHTS | {"C": WEIGHTS["C"] / 2})
    assert products == ["a", "b", "c"]
    swap(model, "A", 2.0)
    check(list(replay.run(model, ["s"])), "E", WEIGHTS | {"C": WEIGHTS["C"] / 2, "A": WEIGHTS["A"] * 2})
    assert products == ["a", "b", "c", "a", "b", "c", "d"]


def test_a_look_in_passing_changes_nothing(model, pool, products):
    replay = Replay(RAGGED, PLENTY, pool, 1)
    list(replay.run(model, ["n2"], ["tc", "s"]))
    check(list(replay.run(model, ["s"], peek=True)), "E")
    check(list(replay.run(model, ["tc"])), "D")
    assert products == ["a", "b", "c", "d", "c"]


def test_a_later_process_goes_on_from_the_folder(model, pool, products, tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    list(Replay(RAGGED, PLENTY, pool, 1, folder=folder).run(model, ["n2"], ["tc"]))
    later = Replay(RAGGED, PLENTY, pool, 1, folder=folder)
    assert later.weights(model, ["tc"]) == WEIGHTS["C"].nbytes
    check(list(later.run(model, ["tc"])), "D")
    assert products == ["a", "b", "c"]


def test_the_weights_that_a_part_would_take(model, pool):
    replay = Replay(RAGGED, PLENTY, pool, 1)
    sizes = {name: w.nbytes for name, w in WEIGHTS.items()}
    assert replay.weights(model, ["n1"]) == 0
    assert replay.weights(model, ["s"]) == sum(sizes.values()) - sizes["E"]


def test_large_hidden_states_go_to_disk_or_are_computed_again(monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        replay = replay_module.Replay(RAGGED, 5400, pool, workers=1)
    assert replay._mode(5400) == "memory"
    assert replay._mode(5401) == "disk"
    usage = type("Usage", (), {"free": 2 * 5401})
    monkeypatch.setattr(shelf_module.shutil, "disk_usage", lambda _: usage)
    assert replay._mode(5401) == "nothing"


def test_squares_are_those_that_the_session_is_asked_for():
    probabilities = random(2, 3, 4, 5)
    np.testing.assert_allclose(
        squares(probabilities), np.einsum("bhts,bhts->bts", probabilities, probabilities), rtol=1e-5
    )


def test_block_by_block_is_the_model_at_once(model):
    feed = RAGGED[1]
    np.testing.assert_allclose(stitched(model, feed)["y"], run(model, feed)[0], rtol=1e-5, atol=1e-5)
    assert len(find_linear_groups(model, Recipe())[0]) == 5, "the model is left as it was"
