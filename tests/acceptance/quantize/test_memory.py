"""The memory that was promised is kept: measured by the kernel, in a process of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_woq import Recipe, quantize
from onnx_woq.errors import MemoryLimit
from tests.support import hooks, measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

HIDDEN, WIDE = 1024, 1536
MB = 10**6
PARAMETERS = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDE  # per layer


@dataclass(frozen=True)
class Large:
    """A model of random weights; `bytes` as stored, `wide` in float32."""

    path: Path
    layers: int
    bytes: int
    wide: int


def random_model(folder: Path, layers: int, dtype: type[np.floating]) -> Large:
    """Residual layers of q, k, v, o, up, down, written weight by weight: nothing here holds more than one."""
    folder.mkdir()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    pool = (np.random.default_rng(0).standard_normal(HIDDEN * WIDE, np.float32) / 32).astype(dtype)
    nodes, tensors, offset = [], [], 0
    with (folder / "w.bin").open("wb") as file:

        def linear(x: str, name: str, k: int, n: int) -> str:
            nonlocal offset
            size = k * n * pool.itemsize
            tensor = TensorProto(name=f"{name}.weight", data_type=kind, dims=[k, n])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "w.bin", "offset": offset, "length": size}.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.roll(pool, 4097 * len(tensors))[: k * n].tobytes())
            offset += size
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [x, tensor.name], [name], name=f"node/{name}"))
            return name

        def op(what: str, *inputs: str, out: str) -> str:
            nodes.append(helper.make_node(what, list(inputs), [out], name=f"node/{out}"))
            return out

        h = "x"
        for layer in range(layers):
            p = f"layer{layer}."
            x = op("Tanh", h, out=f"{p}norm1")
            q, k, v = (linear(x, p + n, HIDDEN, HIDDEN) for n in "qkv")
            mixed = op("Mul", op("Sigmoid", op("Add", q, k, out=f"{p}qk"), out=f"{p}gate"), v, out=f"{p}mixed")
            h = op("Add", h, linear(mixed, f"{p}o", HIDDEN, HIDDEN), out=f"{p}h1")
            up = linear(op("Tanh", h, out=f"{p}norm2"), f"{p}up", HIDDEN, WIDE)
            h = op("Add", h, linear(op("Relu", up, out=f"{p}wide"), f"{p}down", WIDE, HIDDEN), out=f"{p}h2")
        op("Identity", h, out="y")
    values = [helper.make_tensor_value_info(name, kind, ["b", "t", HIDDEN]) for name in "xy"]
    graph = helper.make_graph(nodes, "large", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "m.onnx")
    assert offset == (folder / "w.bin").stat().st_size == layers * PARAMETERS * pool.itemsize
    return Large(folder / "m.onnx", layers, offset, layers * PARAMETERS * 4)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[dict[str, Large]]:
    folder = tmp_path_factory.mktemp("large")
    yield {
        "float32": random_model(folder / "float32", 12, np.float32),
        "float16": random_model(folder / "float16", 16, np.float16),
    }
    shutil.rmtree(folder)


CHILD = """
import json, sys, threading, time
def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon")}
model, out, recipe, data, limit = json.loads(sys.argv[1])
import numpy as np
from onnx_woq import Recipe, quantize
import onnx_woq.engine.quantize, onnx_woq.runtime.calibration.collect, onnx_woq.core.methods.registry
samples = [{"x": array} for array in np.load(data).values()] if data else None
before, peak, done = status()["RssAnon"], [0], threading.Event()
def watch():
    while not done.wait(0.004):
        peak[0] = max(peak[0], status()["RssAnon"])
thread = threading.Thread(target=watch, daemon=True)
thread.start()
report = quantize(model, out, Recipe.from_dict(recipe), samples, max_memory=limit)
done.set()
thread.join()
print(json.dumps({"all": status()["VmHWM"], "private": peak[0] - before, "taps": len(report.taps)}))
"""


def measured(model: Large, out: Path, recipe: Recipe, data: Path | None, limit: int) -> dict[str, int]:
    """Runs `quantize` in a child; bytes: "all" is the most it had at once, "private" without mapped files, and grown.

    `VmHWM` is what `ru_maxrss` should be: that counts the parent's memory at the time of the fork, too.
    """
    arguments = json.dumps([str(model.path), str(out), recipe.to_dict(), data and str(data), limit])
    command = [sys.executable, "-c", CHILD, arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.slow
def test_rounding_keeps_below_the_limit(dtype, large, tmp_path):
    model, limit = large[dtype], 300 * MB
    assert model.bytes + 100 * MB > limit  # whole it would not fit
    found = measured(model, tmp_path / "q.onnx", Recipe("rtn"), None, limit)
    assert found["taps"] == 4 * model.layers
    assert found["all"] <= limit
    assert found["private"] <= model.wide / 4  # never widened whole, and never copied whole
    assert len(measure.low_bit(tmp_path / "q.onnx")) == 6 * model.layers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.slow
def test_gptq_keeps_below_the_limit(dtype, large, tmp_path):
    """Some layers are quantized, all are run."""
    model, limit = large[dtype], 450 * MB
    assert model.wide + 100 * MB > limit
    rng = np.random.default_rng(1)
    kind = np.float32 if dtype == "float32" else np.float16
    np.savez(tmp_path / "data.npz", *(rng.normal(size=(1, 48, HIDDEN)).astype(kind) for _ in range(2)))
    last = model.layers - 1
    recipe = Recipe("gptq", include=(rf"^layer(0|{last // 2}|{last})\.",))
    found = measured(model, tmp_path / "q.onnx", recipe, tmp_path / "data.npz", limit)
    assert found["taps"] == 4 * 3
    assert found["all"] <= limit
    assert found["private"] <= limit - 100 * MB
    assert len(measure.low_bit(tmp_path / "q.onnx")) == 6 * 3


# What is said, and when


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("small") / "m.onnx", layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return zoo.array_folder(folder / "ids", "input_ids", [ids % arch.VOCAB for ids in zoo.token_ids(4, 20)])


UNITS = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([kKMG]i?B)\b")


def amounts(text: str) -> list[int]:
    """The bytes that a text speaks of."""
    return [int(float(number) * UNITS[unit]) for number, unit in AMOUNT.findall(text)]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_too_little_is_refused_before_any_work_and_says_what_is_needed(method, small, data, cli, forwards, tmp_path):
    log = tmp_path / "log"
    common = ["quantize", small, "--algorithm", method, "--calib", data]
    (tmp_path / "out").mkdir()
    with hooks.solver(method, hooks.logged(log)):
        for out in (tmp_path / "out" / "q.onnx", tmp_path / "new" / "q.onnx"):
            refused = cli(*common, "-o", out, "--max-memory", "20MB")
            assert refused.exit_code == 2, refused.output
            assert max(amounts(refused.stderr)) > 20 * MB
    assert not log.exists()
    assert forwards == []
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "new").exists()
    needed = max(amounts(refused.stderr))
    cli.ok(*common, "-o", tmp_path / "out" / "q.onnx", "--max-memory", f"{int(needed * 1.1) // MB + 1}MB")


@pytest.mark.parametrize("limit", [0, 1, 10 << 20])
def test_too_little_in_python(limit, small, tmp_path):
    with pytest.raises(MemoryLimit, match=r"\d") as raised:
        quantize(small, tmp_path / "q.onnx", max_memory=limit)
    assert amounts(str(raised.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["abc", "", "-3GB", "0", "3XB", "GB", "1e400GB", "nan"])
def test_what_is_no_size(text, small, cli, tmp_path):
    done = cli("quantize", small, "-o", tmp_path / "q.onnx", "--max-memory", text)
    assert done.exit_code == 2, done.output
    assert "memory" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["3GB", "3gb", "3000MB", "2.5GB", "3 GB", "4GiB"])
def test_sizes(text, small, cli, tmp_path):
    cli.ok("quantize", small, "-o", tmp_path / "q.onnx", "--max-memory", text)
    assert (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("flags", [[], ["--max-memory", "3GB"]], ids=str)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_plan_is_printed_before_the_work(method, flags, small, data, cli, monkeypatch, tmp_path):
    """The very first step of the work stops it; what is on standard error by then came before."""

    def stopped(*args: object, **kwargs: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxruntime.InferenceSession.run", stopped)
    with hooks.solver(method, lambda real: stopped):
        done = cli("quantize", small, "-o", tmp_path / "q.onnx", "--algorithm", method, "--calib", data, *flags)
    assert done.exit_code == 130, done.output
    line = next((line for line in done.stderr.splitlines() if "memory" in line and amounts(line)), "")
    assert line, done.stderr
    assert not flags or 3 * 10**9 in amounts(line)
    assert done.stdout == ""


def test_the_plan_does_not_spoil_json(small, data, cli, tmp_path):
    found = cli.json("quantize", small, "-o", tmp_path / "q.onnx", "--config", "GPTQ_G32ASYM", "--calib", data)
    assert len(found["taps"]) == 9


def test_random_model_is_what_it_says(tmp_path):
    """The builder above, on a small scale: weights differ from layer to layer and the model runs."""
    model = random_model(tmp_path / "m", 1, np.float32)
    proto = onnx.load(model.path)
    arrays = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    assert sum(array.nbytes for array in arrays) == model.bytes
    assert not np.array_equal(arrays[0], arrays[1])
    assert np.isfinite(measure.run(model.path, [{"x": np.ones((1, 2, HIDDEN), np.float32)}])["y"]).all()
