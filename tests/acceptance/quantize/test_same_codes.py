"""The result does not depend on memory, threads, blocking or the order of the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.core.methods.registry import METHODS
from onnx_woq.core.stats import Stats
from onnx_woq.engine.memory import plan_memory
from onnx_woq.engine.plan import make_plan
from onnx_woq.errors import MemoryLimit
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.collect import collect_statistics
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

LAYERS = 3
RECIPES = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "gptq, sequential by block": Recipe("gptq", true_sequential=True, sequential_unit="block"),
    "gptq, sequential by tap": Recipe("gptq", true_sequential=True, sequential_unit="tap"),
    "awq": Recipe("awq"),
    "rtn, all added": Recipe("rtn", lowrank=16, bias_correction=True),
    "awq, folding, sequential by tap": Recipe("awq", options={"folding": True}, true_sequential=True),
}
DTYPES = {"float32": zoo.F32, "float16": zoo.F16}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Decoders with their weights beside them, so that nothing is in memory that need not be."""
    folder = tmp_path_factory.mktemp("models")
    make = lambda name, dtype: arch.decoder(folder / name / "m.onnx", layers=LAYERS, dtype=dtype, external="w")  # noqa: E731
    return {name: make(name, dtype) for name, dtype in DTYPES.items()}


def samples(name: str, count: int = 12) -> list[arch.Feed]:
    """Ragged samples, some with padding."""
    shapes = [(2, 20, 5), (1, 31, 0), (1, 7, 2)]
    return [
        arch.ids_feed(b, t, layers=LAYERS, padded=p, left=True, dtype=DTYPES[name], seed=i)
        for i in range(count)
        for b, t, p in [shapes[i % 3]]
    ]


def weights(names: Iterable[str]) -> int:
    """How many of the nodes are no low-rank factors."""
    return sum(not name.endswith(("_down", "_up")) for name in names)


def written(model: Path, out: Path, recipe: Recipe, data: Any = None, **options: Any) -> dict[str, bytes]:
    """The files of a quantized model by their names."""
    quantize(model, out / "q.onnx", recipe, data if recipe.needs_data else None, **options)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == {"q.onnx", "q.onnx.data"}
    return files


def tightest(model: Path, recipe: Recipe, data: list[arch.Feed]) -> int:
    """The smallest `max_memory` that is accepted, to a megabyte."""
    plan = make_plan(load(model), recipe)
    refused, accepted = 1 << 20, 16 << 30
    with pytest.raises(MemoryLimit):
        plan_memory(plan, data, refused, 2)
    plan_memory(plan, data, accepted, 2)
    while accepted - refused > 1 << 20:
        middle = (accepted + refused) // 2
        try:
            plan_memory(plan, data, middle, 2)
            accepted = middle
        except MemoryLimit:
            refused = middle
    return accepted + (4 << 20)  # this process may grow between the plan and the work


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in RECIPES), *((n, "float16") for n in ("rtn", "gptq", "awq"))]
)
def test_the_least_memory_gives_the_same_files_as_plenty(name, dtype, models, tmp_path):
    model, recipe, data = models[dtype], RECIPES[name], samples(dtype)
    plenty = written(model, tmp_path / "plenty", recipe, data)
    tight = written(model, tmp_path / "tight", recipe, data, max_memory=tightest(model, recipe, data))
    assert tight == plenty
    assert weights(measure.low_bit(tmp_path / "tight" / "q.onnx")) == 7 * LAYERS + 1


def test_the_plan_for_the_least_memory_is_another_one(models):
    """Or the test above compares a thing with itself."""
    model, recipe, data = models["float32"], RECIPES["gptq"], samples("float32", 200)
    plan = make_plan(load(model), recipe)
    tight, plenty = (plan_memory(plan, data, limit, 2) for limit in (tightest(model, recipe, data), 16 << 30))
    assert 0 < tight.window < plenty.window
    assert 0 < tight.peak <= plenty.peak
    assert tight.text != plenty.text


@pytest.mark.parametrize("sequential", ["off", "block", "tap"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_the_same_bit_for_bit_whatever_the_budget(dtype, sequential, models):
    data = samples(dtype)
    collected = []
    for budget in (1, 300_000, 1 << 40):
        source = load(models[dtype])
        groups, _ = find_linear_groups(source, Recipe())
        collected.append(list(collect_statistics(source, groups, data, memory_budget=budget, sequential=sequential)))
    assert [group.name for group, _ in collected[0]] == [group.name for group in groups]
    assert len(groups) == 4 * LAYERS + 1
    for other in collected[1:]:
        for (group, first), (twin, second) in zip(collected[0], other, strict=True):
            assert group.name == twin.name
            assert first.tokens == second.tokens > 0
            for a, b in ((first.gram, second.gram), (first.abs_mean, second.abs_mean), (first.abs_max, second.abs_max)):
                assert np.array_equal(a, b), group.name


def codes(path: Path) -> dict[str, np.ndarray]:
    """The codes [K, N] of every low-bit node."""
    model = onnx.load(path)
    values = measure.tensors(model)
    return {n.output[0]: measure.grid(n, values)[0] for n in measure.nodes(model) if n.op_type == "MatMulNBits"}


def assert_same_codes(first: Path, second: Path, share: float = 0.999) -> None:
    """Not all of them: sums in another order differ in the last bit, and a weight half way between two codes turns.

    So does a zero point, with all the codes of its group, and what GPTQ moves on to later rows.
    """
    a, b = codes(first), codes(second)
    assert a.keys() == b.keys()
    assert weights(a) == 7 * LAYERS + 1
    equal = np.concatenate([(a[name] == b[name]).ravel() for name in a])
    assert equal.mean() >= share


@pytest.mark.parametrize("name", RECIPES)
def test_threads_change_nothing_beyond_rounding(name, models, tmp_path, monkeypatch):
    for threads in ("1", "2"):
        monkeypatch.setenv("ONNX_WOQ_THREADS", threads)
        written(models["float32"], tmp_path / threads, RECIPES[name], samples("float32"))
    assert_same_codes(tmp_path / "1" / "q.onnx", tmp_path / "2" / "q.onnx", share=1.0 if name == "rtn" else 0.999)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_order_of_the_samples_changes_nothing_beyond_rounding(name, models, tmp_path):
    """Not under `true_sequential`: a code that turns there moves the inputs of all later taps by more than rounding."""
    data = samples("float32")
    shuffled = [data[i] for i in np.random.default_rng(1).permutation(len(data))]
    for folder, these in (("a", data), ("b", shuffled)):
        written(models["float32"], tmp_path / folder, RECIPES[name], these)
    assert_same_codes(tmp_path / "a" / "q.onnx", tmp_path / "b" / "q.onnx")


def activations_of(model: Path, feeds: Sequence[arch.Feed]) -> dict[str, np.ndarray]:
    """As `measure.activations`, for samples without padding."""
    assert all(feed["attention_mask"].all() for feed in feeds)
    return measure.activations(model, feeds)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_codes_are_those_of_the_whole_model_run_at_once(method, models, tmp_path):
    """Activations fetched from the whole float model, each weight solved on its own."""
    model, spec = models["float32"], Spec(4, 32)
    data = [arch.ids_feed(2, 9 + i, layers=LAYERS, seed=i) for i in range(10)]
    written(model, tmp_path / "q", Recipe(method, spec), data)
    got, weights, inputs = codes(tmp_path / "q" / "q.onnx"), measure.float_weights(model), activations_of(model, data)
    assert got.keys() == weights.keys()
    alone = {"logits"} | {f"layer{i}.{name}" for i in range(LAYERS) for name in ("o", "down")}
    same, count = 0, 0
    for name in alone if method == "awq" else weights:  # siblings share one scale of their input in AWQ
        w = weights[name].astype(np.float32)
        stats = Stats.empty(len(w))
        stats.update(inputs[name].astype(np.float32))
        wanted = METHODS[method].solve(w, stats, spec).codes
        same, count = same + int((wanted == got[name]).sum()), count + wanted.size
    assert count >= 30_000
    assert same / count >= 0.999
