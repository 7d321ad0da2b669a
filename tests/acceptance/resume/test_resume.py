"""A run that was killed anywhere goes on with --resume, and what it writes is what an uninterrupted run writes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.core.cpu import cores
from onnx_woq.graph.find.blocks import blocks_of
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from tests.acceptance.quantize import test_growth as growth
from tests.acceptance.quantize.test_executors import Serial
from tests.support import hooks, measure
from tests.support.commands import Cli
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

LAYERS = 4
TAPS = 4 * LAYERS + 1
KINDS = {
    "gptq": ["--algorithm", "gptq"],
    "rtn": ["--algorithm", "rtn"],
    "gptq by tap": ["--algorithm", "gptq", "--option", "true_sequential=true"],
    "gptq by block": ["--algorithm", "gptq", "--option", "true_sequential=true", "--option", "sequential_unit=block"],
    "gptq in small": [
        *("--algorithm", "gptq", "--bits", "3", "--option", "half_scales=true", "--option", "true_sequential=true"),
    ],
    "awq": ["--algorithm", "awq"],
    "awq folding": ["--algorithm", "awq", "--option", "folding=true", "--option", "true_sequential=true"],
}


@dataclass(frozen=True)
class Job:
    """A model, data for it, and what an uninterrupted run writes."""

    folder: Path
    cli: Cli

    @property
    def model(self) -> Path:
        return self.folder / "model" / "m.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def arguments(self, out: Path, kind: str, *more: object) -> list[object]:
        return ["quantize", self.model, "-o", out, *KINDS[kind], "--calib", self.data, *more]

    def reference(self, kind: str) -> dict[str, str]:
        """The listing of a folder with the result of an uninterrupted run."""
        place = self.folder / f"reference {kind}"
        if not place.exists():
            place.mkdir()
            self.cli.ok(*self.arguments(place / "q.onnx", kind))
        found = measure.listing(place)
        assert set(found) == {"q.onnx", "q.onnx.data"}
        return found

    def killed(self, out: Path, kind: str, at: int, number: int = signal.SIGKILL, *more: object) -> Any:
        """A run in a process of its own that gets a signal in the solver's call number `at`."""
        out.parent.mkdir(exist_ok=True)
        log = out.parent.parent / f"{out.parent.name}.log"
        plan = {"log": log, "at": at, "signal": number, "method": kind.split()[0], "pause": 0.3}
        return hooks.run_cli(self.arguments(out, kind, *more), **plan)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    arch.decoder(folder / "model" / "m.onnx", opset=18, layers=LAYERS, external="w.bin")
    zoo.array_folder(folder / "data", "input_ids", [ids % arch.VOCAB for ids in zoo.token_ids(6, 20)])
    return Job(folder, Cli())


def finished_before(job: Job, calls: int) -> int:
    """The taps in blocks that are wholly done when `calls` of them are, solved in graph order."""
    source = load(job.model)
    groups = blocks_of(source, find_linear_groups(source, Recipe())[0])
    assert sum(map(len, groups)) == TAPS
    done = 0
    for group in groups:
        if done + len(group) > calls:
            break
        done += len(group)
    return done


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in ("q.onnx", "q.onnx.data")]


@pytest.mark.parametrize(
    ("kind", "at"),
    [("gptq", 10), ("gptq", TAPS), ("rtn", 15), ("gptq by tap", 10), ("gptq by block", 11),
     ("gptq in small", 9), ("awq folding", 11)],
)  # fmt: skip
@pytest.mark.slow
def test_killed_and_resumed(kind, at, job, cli, tmp_path):
    out = tmp_path / "out" / "q.onnx"
    dead = job.killed(out, kind, at)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-400:]
    assert not out.exists()
    assert hooks.solved(tmp_path / "out.log") >= at  # it did die at work
    left = leftovers(out.parent)
    assert left == [".q.onnx.onnx-woq-partial"]
    assert (out.parent / left[0]).stat().st_mode & 0o077 == 0
    log = tmp_path / "resumed.log"
    with hooks.solver(kind.split()[0], hooks.logged(log)):
        cli.ok(*job.arguments(out, kind, "--resume"))
    assert measure.listing(out.parent) == job.reference(kind)
    assert hooks.solved(log) >= 1  # what it died in; the other cores may have been further
    if kind == "rtn":  # a solve for each weight, at most four to a tap, and no tap needs another one
        assert hooks.solved(log) < 7 * LAYERS + 1 - (at - 1) + 4
        return
    done = finished_before(job, at - cores())  # of the calls before the last, those beside it may not have ended
    assert done >= 4
    assert hooks.solved(log) <= TAPS - done


def test_the_forward_pass_goes_on_from_the_last_block_too(job, monkeypatch, tmp_path):
    """Hidden states are kept beside the weights: what is finished is not run again."""
    recipe, out = Recipe("gptq", true_sequential=True), tmp_path / "q.onnx"
    with growth.counted(monkeypatch) as fresh:
        quantize(job.model, tmp_path / "fresh.onnx", recipe, job.data)
    solves = [0]

    def stopping(real: hooks.Solve) -> hooks.Solve:
        def solve(*args: Any, **kwargs: Any) -> Any:
            solves[0] += 1
            if solves[0] == 14:  # three of the four layers are done
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return solve

    with hooks.solver("gptq", stopping), pytest.raises(KeyboardInterrupt):
        quantize(job.model, out, recipe, job.data, executor=Serial())
    with growth.counted(monkeypatch) as rest:
        quantize(job.model, out, recipe, job.data, resume=True)
    assert out.read_bytes() != b""
    assert 0 < rest.nodes <= 0.5 * fresh.nodes


@pytest.fixture(scope="module")
def file_events(job, tmp_path_factory) -> list[str]:
    """What an uninterrupted run does to files in the folder of its output."""
    folder = tmp_path_factory.mktemp("events")
    (folder / "out").mkdir()
    log = folder / "events.log"
    done = hooks.run_cli(job.arguments(folder / "out" / "q.onnx", "gptq"), folder=folder / "out", events=log)
    assert done.returncode == 0, done.stderr[-400:]
    events = log.read_text().splitlines()
    assert sum(line.startswith("os.rename") for line in events) >= 2  # the data file and the model arrive by renaming
    return events


@pytest.mark.parametrize("share", [0.0, "first rename", "last rename", "after"])
@pytest.mark.slow
def test_killed_while_files_are_changed(share, file_events, job, cli, tmp_path):
    """Among them: before anything is there, during the final write, between its two files, before the tidying up."""
    renames = [
        i for i, line in enumerate(file_events, 1) if line.startswith("os.rename") and line.split()[-1][0] == "q"
    ]
    assert len(renames) >= 2
    at = {"first rename": renames[0], "last rename": renames[-1], "after": renames[-1] + 1}.get(share)
    if at is None:
        at = 1 + int(share * (len(file_events) - 1))
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    dead = hooks.run_cli(job.arguments(out, "gptq"), folder=out.parent, event=at)
    assert dead.returncode == -signal.SIGKILL, (at, len(file_events), dead.stderr[-400:])
    if out.exists():  # then it is whole
        assert {name: h for name, h in measure.listing(out.parent).items() if name[0] == "q"} == job.reference("gptq")
    cli.ok(*job.arguments(out, "gptq", "--resume"))
    assert measure.listing(out.parent) == job.reference("gptq")


@pytest.fixture(scope="module")
def half(job, tmp_path_factory) -> Path:
    """A folder in which a run was killed half way; for copying."""
    folder = tmp_path_factory.mktemp("half") / "out"
    dead = job.killed(folder / "q.onnx", "gptq", 10)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-400:]
    return folder


def copy_of(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "out")) / "q.onnx"


def other_model(job: Job, tmp_path: Path) -> Path:
    shutil.copytree(job.model.parent, tmp_path / "model")
    weights = tmp_path / "model" / "w.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 + 2] ^= 1
    weights.write_bytes(content)
    return tmp_path / "model" / "m.onnx"


@pytest.mark.parametrize("changed", ["recipe", "grid", "model", "data", "samples"])
def test_resuming_something_else_is_refused_and_harms_nothing(changed, half, job, cli, tmp_path):
    out = copy_of(half, tmp_path)
    data, model, flags = job.data, job.model, list(KINDS["gptq"])
    if changed == "model":
        model = other_model(job, tmp_path)
    elif changed == "data":
        data = zoo.array_folder(tmp_path / "data", "input_ids", [i % arch.VOCAB for i in zoo.token_ids(6, 20, seed=9)])
    else:
        flags += {"recipe": ["--option", "percdamp=0.1"], "grid": ["--bits", "8"], "samples": ["--samples", "5"]}[
            changed
        ]
    before = measure.listing(out.parent)
    refused = cli("quantize", model, "-o", out, *flags, "--calib", data, "--resume")
    assert refused.exit_code == 2, refused.output
    assert "--resume" in refused.stderr
    named = {"grid": "recipe", "samples": ""}.get(changed, changed)
    assert named in refused.stderr
    assert measure.listing(out.parent) == before
    log = tmp_path / "log"
    with hooks.solver("gptq", hooks.logged(log)):
        cli.ok(*job.arguments(out, "gptq", "--resume"))  # the right one still goes on
    assert measure.listing(out.parent) == job.reference("gptq")
    assert hooks.solved(log) < TAPS


def test_without_resume_what_is_there_is_replaced(half, job, cli, tmp_path):
    out, log = copy_of(half, tmp_path), tmp_path / "log"
    with hooks.solver("gptq", hooks.logged(log)):
        cli.ok(*job.arguments(out, "gptq"))
    assert hooks.solved(log) == TAPS
    assert measure.listing(out.parent) == job.reference("gptq")
    again = copy_of(half, tmp_path / "again")
    cli.ok(*job.arguments(again, "awq"))
    assert measure.listing(again.parent) == job.reference("awq")


@pytest.mark.parametrize("flags", [["--executor", "serial"], ["--max-memory", "8GB"]])
def test_means_may_change_in_between(flags, half, job, cli, tmp_path):
    out = copy_of(half, tmp_path)
    cli.ok(*job.arguments(out, "gptq", "--resume", *flags))
    assert measure.listing(out.parent) == job.reference("gptq")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), which=st.integers(0, 10), cut=st.booleans())
@pytest.mark.slow
def test_a_damaged_leftover_gives_the_same_result_or_a_named_error(where, which, cut, half, job, cli, tmp_path_factory):
    """A disk that lost power: bytes missing at an end, or wrong."""
    out = copy_of(half, tmp_path_factory.mktemp("damaged"))
    files = sorted(p for p in out.parent.rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) >= 2
    victim = files[which % len(files)]
    content = bytearray(victim.read_bytes())
    place = int(where * (len(content) - 1))
    if cut:
        del content[place:]
    else:
        content[place] ^= 0x41
    victim.write_bytes(content)
    done = cli(*job.arguments(out, "gptq", "--resume"))
    if done.exit_code == 2:
        assert "--resume" in done.stderr
        cli.ok(*job.arguments(out, "gptq"))
    assert done.exit_code in (0, 2)
    assert measure.listing(out.parent) == job.reference("gptq")


def test_control_c_says_how_to_go_on(job, cli, tmp_path):
    kind, out = "gptq", tmp_path / "out" / "q.onnx"
    ended = job.killed(out, kind, 12, signal.SIGINT)
    assert ended.returncode == 130, ended.stderr[-400:]
    assert "--resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    log = tmp_path / "log"
    with hooks.solver(kind, hooks.logged(log)):
        cli.ok(*job.arguments(out, kind, "--resume"))
    assert measure.listing(out.parent) == job.reference(kind)
    assert 0 < hooks.solved(log) < TAPS


def stopped(at: int) -> Callable[[str, int, int], None]:
    """A progress callback that interrupts the `at`-th time it is called."""
    calls = [0]

    def progress(stage: str, done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("unit", ["off", "block", "tap"])
@pytest.mark.slow
def test_interrupted_again_and_again(unit, job, tmp_path):
    """Each time a few steps further, until it is done."""
    how = {} if unit == "off" else {"true_sequential": True, "sequential_unit": unit}
    recipe = Recipe("gptq", Spec(4, 32), **how)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    quantize(job.model, tmp_path / "a" / "q.onnx", recipe, job.data)
    interrupts = 0
    for at in range(6, 400, 6):
        try:
            quantize(job.model, tmp_path / "b" / "q.onnx", recipe, job.data, resume=True, progress=stopped(at))
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 2
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "a")


def test_a_folder_as_output_and_its_companions(job, cli, tmp_path):
    companions = {"config.json": "{}", "tokenizer_config.json": '{"a": 1}'}
    for name, text in companions.items():
        (job.model.parent / name).write_text(text)
    cli.ok(*job.arguments(tmp_path / "whole", "gptq"))
    folder = tmp_path / "resumed"
    log = tmp_path / "log"
    plan = {"log": log, "at": 10, "method": "gptq", "pause": 0.3}
    dead = hooks.run_cli(job.arguments(folder, "gptq"), **plan)
    assert dead.returncode == -signal.SIGKILL
    assert not (folder / "m.onnx").exists()
    cli.ok(*job.arguments(folder, "gptq", "--resume"))
    assert measure.listing(folder) == measure.listing(tmp_path / "whole")
    assert set(companions) < set(measure.listing(folder))


@pytest.mark.parametrize("kind", ["rtn", "gptq", "gptq by tap"])
@pytest.mark.parametrize("bad", ["weight", "data"])
def test_after_bad_input_nothing_is_left(bad, kind, job, cli, tmp_path):
    """The last weight is NaN: most of the work is done by then."""
    model, data = tmp_path / "m.onnx", job.data
    proto = onnx.load(job.model)
    name = "logits.weight" if bad == "weight" else "layer3.norm2.gamma"
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[-1] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, model)
    before = measure.listing(tmp_path)
    for out in (tmp_path / "q.onnx", tmp_path / "new" / "deep" / "q.onnx"):
        done = cli("quantize", model, "-o", out, *KINDS[kind], "--calib", data)
        if (kind, bad) == ("rtn", "data"):
            assert done.exit_code == 0  # nothing is run, and the norm is none of its business
            return
        assert done.exit_code == 2, done.output
        assert measure.listing(tmp_path) == before
