"""Work is in proportion to layers: nodes run, and bytes of weights handed to sessions, whatever the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from onnx_woq import Recipe, quantize
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.collect import collect_statistics
from tests.zoo import architectures as arch

pytestmark = pytest.mark.slow

LAYERS = (3, 6, 12)
SAMPLES = 2


@dataclass
class Work:
    """What sessions have been asked to do.

    Attributes:
        nodes: executed, over all runs.
        weights: bytes of initializers, over all sessions made.
        runs: of sessions.
    """

    nodes: int = 0
    weights: int = 0
    runs: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return len(tensor.raw_data) + 4 * len(tensor.float_data) + 8 * len(tensor.int64_data)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Counts the work of every session in this process."""
    work, session = Work(), onnxruntime.InferenceSession
    make, run = session.__init__, session.run

    def init(self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
        make(self, source, *args, **kwargs)
        if isinstance(source, bytes):
            model = onnx.ModelProto.FromString(source)
        else:
            model = onnx.load(source, load_external_data=False)
        self.nodes_in_it = len(model.graph.node)
        work.weights += sum(map(_bytes_of, model.graph.initializer))

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        work.nodes += self.nodes_in_it
        work.runs += 1
        return run(self, *args, **kwargs)

    def forbidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this way of running is not counted")

    with monkeypatch.context() as patch:
        patch.setattr(session, "__init__", init)
        patch.setattr(session, "run", counting)
        for name in ("run_with_iobinding", "run_with_ort_values", "run_async"):
            patch.setattr(session, name, forbidden)
        yield work


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("growth")
    return {n: arch.decoder(folder / f"{n}" / "m.onnx", layers=n, external="w.bin") for n in LAYERS}


def samples(layers: int) -> list[arch.Feed]:
    return [arch.ids_feed(1, 5 + i, layers=layers, seed=i) for i in range(SAMPLES)]


def straight(figures: dict[int, int]) -> bool:
    """Whether each further layer costs the same within 10 %."""
    first = (figures[6] - figures[3]) / 3
    second = (figures[12] - figures[6]) / 6
    return first > 0 and abs(second / first - 1) <= 0.1


def assert_linear(figures: dict[int, Work], models: dict[int, Path], often: float) -> None:
    """Every node at most `often` times a sample, every weight at most `often` times handed over."""
    assert straight({n: work.nodes for n, work in figures.items()}), figures
    assert straight({n: work.weights for n, work in figures.items()}), figures
    assert straight({n: work.runs for n, work in figures.items()}) or len({w.runs for w in figures.values()}) == 1
    for layers, work in figures.items():
        whole = onnx.load(models[layers])
        nodes, weights = len(whole.graph.node), sum(map(_bytes_of, whole.graph.initializer))
        assert 0.5 * nodes * SAMPLES <= work.nodes <= often * nodes * SAMPLES, layers
        assert 0.1 * weights <= work.weights <= often * weights, layers  # quantized ones are a sixth of their size


@pytest.mark.parametrize("budget", [1, 1 << 40])
def test_statistics_of_the_float_model(budget, models, monkeypatch):
    figures = {}
    for layers, path in models.items():
        source = load(path)
        groups, _ = find_linear_groups(source, Recipe())
        with counted(monkeypatch) as figures[layers]:
            assert (
                len(list(collect_statistics(source, groups, samples(layers), memory_budget=budget))) == 4 * layers + 1
            )
    assert_linear(figures, models, 1.25)


@pytest.mark.parametrize(("unit", "often"), [("block", 2.5), ("tap", 4.5)])
def test_sequential_quantization(unit, often, models, monkeypatch, tmp_path):
    """By block each block runs once as it was and once quantized; by tap, at most once for each of its four taps."""
    figures = {}
    recipe = Recipe("gptq", true_sequential=True, sequential_unit=unit, accuracy_level=0)
    for layers, path in models.items():
        with counted(monkeypatch) as figures[layers]:
            report = quantize(path, tmp_path / f"{layers}.onnx", recipe, samples(layers))
        assert len(report.groups) == 4 * layers + 1
    assert_linear(figures, models, often)


def test_rounding_runs_nothing(models, monkeypatch, tmp_path):
    with counted(monkeypatch) as work:
        quantize(models[3], tmp_path / "q.onnx", "RTN_G32ASYM")
    assert (work.runs, work.nodes) == (0, 0)
