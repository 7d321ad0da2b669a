"""Wherever the taps are solved, the files are the same bit for bit, and a worker that dies loses nothing."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_woq import Recipe, quantize
from onnx_woq.core.methods.registry import METHODS
from tests.support import hooks, measure
from tests.support.commands import spawning
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

LAYERS = 2
RECIPES = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "gptq by tap": Recipe("gptq", true_sequential=True),
    "gptq by block": Recipe("gptq", true_sequential=True, sequential_unit="block"),
    "awq": Recipe("awq"),
    "rtn, all added": Recipe("rtn", lowrank=16, bias_correction=True),
    "awq folding": Recipe("awq", options={"folding": True}),
}


class Serial(Executor):
    """The simplest executor there is, and one that counts."""

    def __init__(self) -> None:
        self.done = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        self.done += 1
        return future


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("model") / "m.onnx", layers=LAYERS, external="w.bin")


@pytest.fixture(scope="module")
def half_model(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("half") / "m.onnx", layers=LAYERS, dtype=zoo.F16, external="w.bin")


def samples(dtype: int = zoo.F32) -> list[arch.Feed]:
    return [arch.ids_feed(2, 10 + i, layers=LAYERS, dtype=dtype, seed=i) for i in range(6)]


def files(folder: Path) -> dict[str, str]:
    found = measure.listing(folder)
    assert set(found) == {"q.onnx", "q.onnx.data"}
    return found


@pytest.fixture(scope="module")
def serial(model, tmp_path_factory) -> Callable[[str], dict[str, str]]:
    """What the simplest executor gives, by recipe."""

    @functools.cache
    def get(name: str) -> dict[str, str]:
        folder, executor = tmp_path_factory.mktemp("serial"), Serial()
        quantize(model, folder / "q.onnx", RECIPES[name], samples(), executor=executor)
        assert executor.done >= 4 * LAYERS + 1
        return files(folder)

    return get


@pytest.mark.parametrize("name", RECIPES)
def test_threads(name, model, serial, tmp_path):
    quantize(model, tmp_path / "default" / "q.onnx", RECIPES[name], samples())
    assert files(tmp_path / "default") == serial(name)
    with ThreadPoolExecutor(3) as pool:
        quantize(model, tmp_path / "three" / "q.onnx", RECIPES[name], samples(), executor=pool)
        assert files(tmp_path / "three") == serial(name)
        assert pool.submit(int, "7").result() == 7  # it is the caller's, who may want it still


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptq by block", "awq folding"])
def test_processes(name, model, serial, processes, tmp_path):
    quantize(model, tmp_path / "q.onnx", RECIPES[name], samples(), executor=processes)
    assert files(tmp_path) == serial(name)
    assert processes.submit(int, "7").result() == 7


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptq by tap"])
def test_dask(name, model, serial, cluster, tmp_path):
    quantize(model, tmp_path / "q.onnx", RECIPES[name], samples(), executor=cluster.get_executor())
    assert files(tmp_path) == serial(name)
    assert cluster.submit(int, "7").result() == 7


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_float16(name, half_model, processes, tmp_path):
    for folder, executor in (("a", Serial()), ("b", processes)):
        quantize(half_model, tmp_path / folder / "q.onnx", RECIPES[name], samples(zoo.F16), executor=executor)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_work_is_really_done_elsewhere(model, processes, cluster, tmp_path):
    """Not here: a solver that fails in this process is never called."""

    def never(real: hooks.Solve) -> hooks.Solve:
        def solve(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("solved in the wrong process")

        return solve

    with hooks.solver("gptq", never):
        for folder, executor in (("a", processes), ("b", cluster.get_executor())):
            quantize(model, tmp_path / folder / "q.onnx", RECIPES["gptq"], samples(), executor=executor)
        with pytest.raises(AssertionError, match="wrong process"):
            quantize(model, tmp_path / "c" / "q.onnx", RECIPES["gptq"], samples(), executor=Serial())


# On the command line


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return zoo.array_folder(folder / "ids", "input_ids", [ids % arch.VOCAB for ids in zoo.token_ids(6, 20)])


@pytest.mark.parametrize("where", ["serial", "threads", "processes", "dask"])
def test_on_the_command_line(where, model, data, cluster, cli, tmp_path):
    flags = ["--dask", cluster.scheduler.address] if where == "dask" else ["--executor", where]
    common = ["quantize", model, "--config", "GPTQ_G32ASYM", "--calib", data]
    cli.ok(*common, "-o", tmp_path / "a" / "q.onnx", *flags)
    cli.ok(*common, "-o", tmp_path / "b" / "q.onnx")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--executor", "thread"], "threads"),
        (["--dask", "127.0.0.1:seven"], "127.0.0.1:seven"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_a_named_error(flags, says, model, cli, tmp_path):
    done = cli("quantize", model, "-o", tmp_path / "q.onnx", *flags)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# Workers that die


def fatal(flag: str) -> Any:
    """Makes the GPTQ solver of this process wait to be killed: once, in the first process that gets there."""

    def around(real: hooks.Solve) -> hooks.Solve:
        @functools.wraps(real)
        def solve(*args: Any, **kwargs: Any) -> Any:
            try:
                descriptor = os.open(flag, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return real(*args, **kwargs)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            os.close(descriptor)
            time.sleep(60)
            raise AssertionError("nobody killed this process")

        return solve

    entry = METHODS["gptq"]
    object.__setattr__(entry, "solve", around(entry.solve))
    return os.getpid()


@contextmanager
def killer(flag: Path, allowed: Callable[[], set[int]]) -> Iterator[list[int]]:
    """Kills the process that has written its number into `flag`; gives the list of those killed."""
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            text = flag.read_text() if flag.exists() else ""
            if text.endswith("\n"):
                number = int(text)
                assert number in allowed()
                os.kill(number, signal.SIGKILL)
                killed.append(number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def test_a_process_pool_whose_worker_dies(model, serial, tmp_path):
    flag = tmp_path / "flag"
    with spawning(initializer=fatal, initargs=(str(flag),)) as pool:
        with killer(flag, lambda: set(pool._processes)) as killed:
            quantize(model, tmp_path / "out" / "q.onnx", RECIPES["gptq"], samples(), executor=pool)
        assert len(killed) == 1
    assert files(tmp_path / "out") == serial("gptq")


def test_a_dask_worker_killed_while_it_solves(model, serial, cluster, tmp_path):
    flag = tmp_path / "flag"

    def spoil(path: str) -> int:  # by value: the workers do not know this module
        import functools
        import os
        import time

        from onnx_woq.core.methods.registry import METHODS

        entry = METHODS["gptq"]
        real = entry.solve

        @functools.wraps(real)
        def solve(*args: Any, **kwargs: Any) -> Any:
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return real(*args, **kwargs)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            os.close(descriptor)
            time.sleep(60)
            raise AssertionError("nobody killed this process")

        object.__setattr__(entry, "solve", solve)
        return os.getpid()

    workers = set(cluster.run(spoil, str(flag)).values())
    assert len(workers) == 2
    assert os.getpid() not in workers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with killer(flag, lambda: workers) as killed:
            quantize(model, tmp_path / "out" / "q.onnx", RECIPES["gptq"], samples(), executor=cluster.get_executor())
    assert len(killed) == 1
    assert files(tmp_path / "out") == serial("gptq")


def test_a_pool_that_is_broken_or_shut_down_already(model, serial, tmp_path):
    pool = spawning(1)
    pool.shutdown()
    quantize(model, tmp_path / "shut" / "q.onnx", RECIPES["gptq"], samples(), executor=pool)
    assert files(tmp_path / "shut") == serial("gptq")
    with spawning(1) as broken:
        with pytest.raises(Exception, match="terminated"):
            broken.submit(os._exit, 1).result()
        quantize(model, tmp_path / "broken" / "q.onnx", RECIPES["gptq"], samples(), executor=broken)
    assert files(tmp_path / "broken") == serial("gptq")


def test_an_error_of_the_solver_is_no_lost_worker(model, processes, tmp_path):
    """NaN in the weights: the same named error wherever it is found, and nothing is left."""
    import onnx

    from onnx_woq.errors import ModelError

    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name == "layer1.up.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 5] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    (tmp_path / "out").mkdir()
    messages = set()
    for executor in (Serial(), processes):
        with pytest.raises(ModelError, match=r"layer1\.up\.weight") as raised:
            quantize(tmp_path / "bad.onnx", tmp_path / "out" / "q.onnx", "RTN_G32ASYM", executor=executor)
        messages.add(str(raised.value))
        assert list((tmp_path / "out").iterdir()) == []
    assert len(messages) == 1
