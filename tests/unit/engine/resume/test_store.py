"""An unfinished result: whatever ends a run, the next one gives the same bytes or says why it cannot go on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.cli import main
from onnx_woq.engine import metadata
from onnx_woq.engine.resume import store as partial
from onnx_woq.engine.resume.store import partial_folder
from onnx_woq.errors import DataError, MemoryLimit, ModelError, OutputError
from onnx_woq.graph.io import save as saving
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.hidden_states import HiddenStateStore
from tests.zoo import small as zoo
from tests.zoo.nodes import FLOAT16, graph, node, random, value, write

AWQ = Recipe("awq", Spec(group_size=32))
RECIPES = {
    "rtn": Recipe("rtn"),
    "gptq": Recipe("gptq"),
    "awq": AWQ,
    "gptq, tap by tap": Recipe("gptq", true_sequential=True),
    "awq, tap by tap": Recipe("awq", true_sequential=True),
    "awq, block by block": Recipe("awq", true_sequential=True, sequential_unit="block"),
    "awq, folded": Recipe("awq", options={"folding": True}),
    "awq, all that can be added": Recipe("awq", lowrank=16, bias_correction=True),
    "folded, all that can be added": Recipe("awq", options={"folding": True}, lowrank=16, bias_correction=True),
    "3 bits": Recipe("rtn", Spec(3, -1, symmetric=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return zoo.language_model(tmp_path_factory.mktemp("model") / "lm.onnx", layers=2)


@pytest.fixture(scope="module")
def data():
    return zoo.lm_feeds(zoo.token_ids(3))


def contents(out: Path) -> dict[str, bytes]:
    """The result, and anything else beside it."""
    return {
        str(p.relative_to(out.parent)): p.read_bytes() if p.is_file() else b"" for p in sorted(out.parent.rglob("*"))
    }


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The result of an uninterrupted run, by recipe."""
    made = {}

    def result(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "q.onnx"
            quantize(model, out, RECIPES[name], data)
            made[name] = contents(out)
            assert set(made[name]) == {"q.onnx", "q.onnx.data"}
        return made[name]

    return result


@contextmanager
def changed(*changes):
    """Attributes set for a while; their old values are back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for change in changes:
            patch.setattr(*change)
        yield


class Stop:
    """A progress callback that raises when so many taps are done, and remembers what it saw."""

    def __init__(self, after: int = 10**9, error: type[BaseException] = KeyboardInterrupt):
        self.after, self.error, self.seen = after, error, []

    def __call__(self, stage, done, total):
        if stage == "solve":
            self.seen.append((done, total))
            if done == self.after:
                raise self.error


def interrupted(model, out, recipe, data, after, **options):
    """Runs until so many taps are done; returns the message."""
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, out, recipe, data, progress=Stop(after), **options)
    return str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("after", [1, 5, 9])
def test_an_interrupted_run_continues_to_the_same_bytes(name, after, model, data, whole, tmp_path):
    out = tmp_path / "q.onnx"
    message = interrupted(model, out, RECIPES[name], data, after)
    assert f"{after} of 9" in message
    assert "--resume" in message
    assert not out.exists()
    again = Stop()
    report = quantize(model, out, RECIPES[name], data, resume=True, progress=again)
    assert contents(out) == whole(name)
    assert len(report.groups) == 9
    assert len(again.seen) <= 9 - after + 4  # at most the rest of a block is done again
    assert after < 5 or len(again.seen) < 9


def test_reports_of_taps_taken_over_are_the_same(model, data, tmp_path):
    want = quantize(model, tmp_path / "whole.onnx", AWQ, data).groups
    interrupted(model, tmp_path / "q.onnx", AWQ, data, 6)
    assert quantize(model, tmp_path / "q.onnx", AWQ, data, resume=True).groups == want


def test_it_may_be_interrupted_again_and_again(model, data, whole, tmp_path):
    out = tmp_path / "q.onnx"
    for after in (2, 3, 5, 8):
        interrupted(model, out, RECIPES["rtn"], data, after, resume=after > 2)
    quantize(model, out, RECIPES["rtn"], data, resume=True)
    assert contents(out) == whole("rtn")


def test_an_impatient_interrupt_loses_nothing(model, data, whole, tmp_path):
    """While it waits for the disk."""
    out = tmp_path / "q.onnx"

    def impatient(_):
        raise KeyboardInterrupt

    with changed((os, "fsync", impatient)), pytest.raises(KeyboardInterrupt):
        quantize(model, out, RECIPES["rtn"], data, progress=Stop(6))
    again = Stop()
    quantize(model, out, RECIPES["rtn"], data, resume=True, progress=again)
    assert contents(out) == whole("rtn")
    assert len(again.seen) == 3


@pytest.mark.parametrize("proto", [FLOAT16], ids=["float16"])
@pytest.mark.parametrize("sequential", [False, True])
def test_half_precision_continues_to_the_same_bytes(proto, sequential, tmp_path):
    weights = {f"W{i}": random(64, 64, seed=i, dtype=np.float16) / 8 for i in range(6)}
    nodes = [node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(6)]
    main = graph(nodes, [value("x0", ("t", 64), proto)], [value("x6", ("t", 64), proto)], weights)
    path = write(tmp_path / "m.onnx", main)
    data = [{"x0": random(40, 64, seed=i, dtype=np.float16)} for i in range(2)]
    recipe = Recipe("gptq", true_sequential=sequential)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    quantize(path, tmp_path / "a" / "q.onnx", recipe, data)
    interrupted(path, tmp_path / "b" / "q.onnx", recipe, data, 3)
    quantize(path, tmp_path / "b" / "q.onnx", recipe, data, resume=True)
    assert contents(tmp_path / "a" / "q.onnx") == contents(tmp_path / "b" / "q.onnx")


KILLED = """
import os, signal, sys
from onnx_woq import Recipe, quantize
from onnx_woq.engine.resume import store as partial
import numpy as np
calls = 0
def dying(original):
    def wrapped(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return wrapped
partial._write = dying(partial._write)
data = [{k: v for k, v in np.load(sys.argv[3]).items()}]
quantize(sys.argv[1], sys.argv[2], Recipe("gptq"), data, resume=True)
"""


@pytest.mark.parametrize("calls", [[2], [5, 4], [25, 3, 12], [32]])
@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(calls, model, data, tmp_path):
    np.savez(tmp_path / "data.npz", **data[0])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    out = tmp_path / "b" / "q.onnx"
    for count in calls:
        command = [sys.executable, "-c", KILLED, model, out, tmp_path / "data.npz", str(count)]
        done = subprocess.run([str(part) for part in command], capture_output=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert partial_folder(out).is_dir()
    quantize(model, tmp_path / "a" / "q.onnx", Recipe("gptq"), data[:1])
    quantize(model, out, Recipe("gptq"), data[:1], resume=True)
    assert contents(out) == contents(tmp_path / "a" / "q.onnx")


def test_a_partial_cut_at_any_byte_continues_to_the_same_bytes(model, data, whole, tmp_path):
    """As a kill or a lost page of the disk leaves it."""
    kept = tmp_path / "kept"
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    interrupted(model, out, RECIPES["rtn"], data, 6)
    folder = partial_folder(out)
    shutil.copytree(folder, kept)
    journal, stored = (kept / "journal").read_bytes(), (kept / "q.onnx.data").read_bytes()
    lines = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    cuts = [(at + shift, len(stored)) for at in lines for shift in (-1, 0, 7) if at + shift <= len(journal)]
    cuts += [(len(journal), at) for at in (0, 1, len(stored) // 2, len(stored) - 1)]
    for journal_end, data_end in [(0, 0), (3, 9), *cuts]:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        shutil.copytree(kept, folder)
        folder.chmod(0o700)
        (folder / "journal").write_bytes(journal[:journal_end])
        (folder / "q.onnx.data").write_bytes(stored[:data_end])
        quantize(model, out, RECIPES["rtn"], resume=True)
        assert contents(out) == whole("rtn"), (journal_end, data_end)


def test_a_page_that_never_reached_the_disk_is_noticed(model, data, whole, tmp_path):
    out = tmp_path / "q.onnx"
    interrupted(model, out, RECIPES["rtn"], data, 6)
    with (partial_folder(out) / "q.onnx.data").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(512))
    again = Stop()
    quantize(model, out, RECIPES["rtn"], resume=True, progress=again)
    assert contents(out) == whole("rtn")
    assert len(again.seen) > 3


@pytest.mark.parametrize("error", [RuntimeError, OSError, MemoryError])
@pytest.mark.parametrize("folder", [False, True])
def test_any_other_failure_leaves_nothing(error, folder, model, data, tmp_path):
    out = tmp_path / "new" / "deep" if folder else tmp_path / "q.onnx"
    with pytest.raises(MemoryLimit if error is MemoryError else error):
        quantize(model, out, RECIPES["gptq"], data, progress=Stop(3, error))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_weight_leaves_nothing(tmp_path):
    weights = {"A": random(64, 64), "B": np.full((64, 64), np.nan, np.float32)}
    nodes = [node("MatMul", ["x", "A"], ["h"]), node("MatMul", ["h", "B"], ["y"])]
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x", (3, 64))], [value("y", (3, 64))], weights))
    with pytest.raises(ModelError, match="'B'"):
        quantize(path, tmp_path / "q.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("folder", [False, True])
def test_both_forms_of_output_continue(folder, model, tmp_path):
    out = tmp_path / "out" if folder else tmp_path / "out" / "lm.onnx"
    interrupted(model, out, "RTN_G32ASYM", None, 4)
    quantize(model, out, resume=True)
    quantize(model, tmp_path / "whole" / "lm.onnx")
    assert contents(tmp_path / "out" / "lm.onnx") == contents(tmp_path / "whole" / "lm.onnx")


def test_without_resume_it_begins_anew(model, data, whole, tmp_path):
    interrupted(model, tmp_path / "q.onnx", AWQ, data, 4)
    again = Stop()
    quantize(model, tmp_path / "q.onnx", RECIPES["rtn"], progress=again)
    assert len(again.seen) == 9
    assert contents(tmp_path / "q.onnx") == whole("rtn")


def test_resume_with_nothing_to_resume_begins(model, whole, tmp_path):
    quantize(model, tmp_path / "q.onnx", RECIPES["rtn"], resume=True)
    assert contents(tmp_path / "q.onnx") == whole("rtn")


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("recipe", {"recipe": Recipe("gptq", Spec(8))}),
        ("calibration data", {"data": zoo.lm_feeds(zoo.token_ids(4))}),
        ("model", {"model": None}),
        ("package version", {}),
    ],
)
def test_the_partial_of_something_else_is_a_named_error(what, changed, model, data, tmp_path, monkeypatch):
    out = tmp_path / "q.onnx"
    interrupted(model, out, RECIPES["gptq"], data, 4)
    before = contents(out)
    given = {"model": model, "recipe": RECIPES["gptq"], "data": data} | changed
    if what == "model":
        given["model"] = zoo.language_model(tmp_path.parent / f"{tmp_path.name}-other" / "lm.onnx", seed=3, layers=2)
    if what == "package version":
        monkeypatch.setattr(metadata, "version", lambda: "9.9")
    with pytest.raises(OutputError, match=f"another {what}.*leave out --resume"):
        quantize(given["model"], out, given["recipe"], given["data"], resume=True)
    assert contents(out) == before, "nothing is lost by the mistake"


def test_bad_data_does_not_cost_what_is_there(model, data, tmp_path):
    out = tmp_path / "q.onnx"
    interrupted(model, out, RECIPES["gptq"], data, 4)
    before = contents(out)
    with pytest.raises(DataError):
        quantize(model, out, RECIPES["gptq"], tmp_path / "no such file.txt", resume=True)
    assert contents(out) == before


HOLDING = """
import sys, time
from onnx_woq import quantize
def wait(stage, done, total):
    if (stage, done) == ("solve", 4):
        print("at work", flush=True)
        time.sleep(600)
quantize(sys.argv[1], sys.argv[2], "RTN_G32ASYM", progress=wait)
"""


def test_the_partial_of_a_running_process_is_a_named_error_until_it_is_killed(model, tmp_path):
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    command = [sys.executable, "-c", HOLDING, str(model), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at work\n"
        before = contents(out)
        for resume in (False, True):
            with pytest.raises(OutputError, match="another process is writing"):
                quantize(model, out, resume=resume)
            assert contents(out) == before
        process.kill()
    again = Stop()
    quantize(model, out, resume=True, progress=again)
    assert len(again.seen) == 5
    quantize(model, tmp_path / "whole" / "q.onnx")
    assert contents(out) == contents(tmp_path / "whole" / "q.onnx")


@pytest.mark.parametrize("resume", [False, True])
def test_links_in_a_partial_are_not_followed(resume, model, data, whole, tmp_path):
    out, precious = tmp_path / "out" / "q.onnx", tmp_path / "precious"
    precious.mkdir()
    for name in ("a", "b", "c"):
        (precious / name).write_bytes(b"mine" * 999)
    out.parent.mkdir()
    interrupted(model, out, RECIPES["rtn"], data, 4)
    folder = partial_folder(out)
    for name, target in (("q.onnx.data", "a"), ("journal", "b"), ("q.onnx", "c"), ("compact.data", "c")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious / target)
    shutil.rmtree(folder / "states")
    (folder / "states").symlink_to(precious)
    quantize(model, out, RECIPES["rtn"], resume=resume)
    assert contents(out) == whole("rtn")
    assert contents(precious / "a") == {"a": b"mine" * 999, "b": b"mine" * 999, "c": b"mine" * 999}


def test_hard_links_in_a_partial_are_not_written_through(model, data, whole, tmp_path):
    out, precious = tmp_path / "out" / "q.onnx", tmp_path / "precious"
    out.parent.mkdir()
    precious.write_bytes(b"mine")
    interrupted(model, out, RECIPES["rtn"], data, 4)
    for name in ("q.onnx.data", "journal"):
        (partial_folder(out) / name).unlink()
        os.link(precious, partial_folder(out) / name)
    quantize(model, out, RECIPES["rtn"], resume=True)
    assert contents(out) == whole("rtn")
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("form", ["link", "file", "open to others", "somebody else's", "link as the lock"])
def test_something_else_in_the_place_of_the_partial(form, model, tmp_path):
    out = tmp_path / "out" / "q.onnx"
    out.parent.mkdir()
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "file").write_text("mine")
    if form == "link":
        partial_folder(out).symlink_to(victim)
    elif form == "file":
        partial_folder(out).write_text("mine")
    else:
        partial_folder(out).mkdir(mode=0o700)
    if form == "open to others":
        partial_folder(out).chmod(0o777)
    elif form == "somebody else's":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(partial_folder(out), 12345, -1)
    elif form == "link as the lock":
        (partial_folder(out) / "lock").symlink_to(victim / "file")
    for resume in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            quantize(model, out, RECIPES["rtn"], resume=resume)
    assert contents(victim / "file") == {"file": b"mine"}


EDITS = {
    "another name": {"tap": "no such tap"},
    "a path": {"tap": "../../etc/passwd"},
    "far away": {"end": 1 << 60},
    "negative": {"end": -1},
    "no number": {"end": "x"},
    "no checksum": {"check": None},
    "a scale of another size": {"input_scale": "AAAA"},
    "not base64": {"input_scale": "\u00e9"},
    "a list": {"tap": ["x"]},
    "small arrays nobody asked for": {"small": 3},
    "an error that is no number": {"error": {}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_journal_that_makes_no_sense_counts_as_far_as_it_does(edit, model, data, whole, tmp_path):
    out = tmp_path / "q.onnx"
    interrupted(model, out, RECIPES["rtn"], data, 5)
    journal = partial_folder(out) / "journal"
    lines = journal.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | EDITS[edit])
    journal.write_text("\n".join([*lines, "[1, 2", "null", "{}"]) + "\n")
    quantize(model, out, RECIPES["rtn"], resume=True)
    assert contents(out) == whole("rtn")


def test_the_partial_is_private_and_the_result_is_as_public_as_any_file(model, tmp_path):
    out = tmp_path / "q.onnx"
    interrupted(model, out, "RTN_G32ASYM", None, 4)
    assert partial_folder(out).stat().st_mode & 0o777 == 0o700
    quantize(model, out, resume=True)
    (tmp_path / "plain").write_text("")
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_too_little_room_is_noticed_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    steps = Stop()
    with pytest.raises(OutputError, match="make room"):
        quantize(model, tmp_path / "new" / "q.onnx", progress=steps)
    assert steps.seen == []
    assert list(tmp_path.iterdir()) == []


def full_from(at, number=errno.ENOSPC):
    """From the `at`-th write on, the disk takes half of what it is given."""
    count, write = itertools.count(1), partial._write

    def full(file, content, place):
        if next(count) < at:
            write(file, content, place)
        else:
            write(file, content[: len(content) // 2], place)
            raise OSError(number, os.strerror(number))

    return changed((partial, "_write", full))


def kept(message, out):
    """How many groups an error says are kept."""
    found = re.search(rf"(\d) of 9 groups of MatMuls are done and kept in {partial_folder(out)}; .*--resume", message)
    return int(found[1])


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq, tap by tap"])
@pytest.mark.parametrize("at", [8, 13, 21, 29, 32])
def test_a_disk_that_fills_up_keeps_what_is_done(name, at, model, data, whole, tmp_path):
    out, steps = tmp_path / "new" / "q.onnx", Stop()
    with full_from(at), pytest.raises(OutputError, match=r"disk is full.*make room") as caught:
        quantize(model, out, RECIPES[name], data, progress=steps)
    done = kept(str(caught.value), out)
    assert done == len(steps.seen) > 0
    assert os.listdir(out.parent) == [partial_folder(out).name]
    again = Stop()
    quantize(model, out, RECIPES[name], data, resume=True, progress=again)
    assert contents(out) == whole(name)
    assert len(again.seen) <= 9 - done + 4


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(at, resume, model, data, tmp_path):
    with full_from(at), pytest.raises(OutputError, match="make room") as caught:
        quantize(model, tmp_path / "new" / "q.onnx", RECIPES["gptq"], data, resume=resume)
    assert "--resume" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_it_may_fill_up_again_and_again(model, data, whole, tmp_path):
    out = tmp_path / "q.onnx"
    for at in (9, 6, 1, 12):
        with full_from(at), pytest.raises(OutputError, match="make room"):
            quantize(model, out, RECIPES["rtn"], resume=True)
    quantize(model, out, RECIPES["rtn"], resume=True)
    assert contents(out) == whole("rtn")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.ENOMEM])
def test_other_errors_of_the_disk(number, model, whole, tmp_path):
    """A disk that recovers is as good as one that is full; what has another cause is no better for being kept."""
    out = tmp_path / "q.onnx"
    with full_from(16, number), pytest.raises(OutputError, match="cannot be written") as caught:
        quantize(model, out, RECIPES["rtn"])
    if number in (errno.EACCES, errno.ENOMEM):
        assert contents(out) == {}
        return
    assert kept(str(caught.value), out) == 4
    quantize(model, out, RECIPES["rtn"], resume=True)
    assert contents(out) == whole("rtn")


def test_a_disk_that_says_only_later_what_it_did_not_take(model, whole, tmp_path):
    out = tmp_path / "q.onnx"

    def failing(_):
        raise OSError(errno.EIO, "Input/output error")

    often = SimpleNamespace(monotonic=itertools.count(10**9, 10).__next__)
    with (
        changed((partial, "time", often), (os, "fsync", failing)),
        pytest.raises(OutputError, match="disk fails") as caught,
    ):
        quantize(model, out, RECIPES["rtn"])
    assert kept(str(caught.value), out) == 1
    quantize(model, out, RECIPES["rtn"], resume=True)
    assert contents(out) == whole("rtn")


@pytest.mark.parametrize("what", ["tensor", "numpy's tensor", "room", "structure"])
def test_a_disk_that_is_full_in_the_end_keeps_all(what, model, data, whole, tmp_path):
    """While what stays float is written."""
    out = tmp_path / "q.onnx"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def numpys(*_):
        raise OSError("400 requested and 20 written")  # all that numpy says

    def progress(stage, done, total):
        if (stage, done) == ("solve", 9):
            patch.setattr(*changes[what])

    changes = {
        "tensor": (saving, "_write", full),
        "numpy's tensor": (ir.ExternalTensor, "tofile", numpys),
        "room": (shutil, "disk_usage", lambda _: SimpleNamespace(free=1000)),
        "structure": (Path, "write_bytes", full),
    }
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="make room") as caught:
        quantize(model, out, RECIPES["gptq"], data, progress=progress)
    assert kept(str(caught.value), out) == 9
    again = Stop()
    quantize(model, out, RECIPES["gptq"], data, resume=True, progress=again)
    assert again.seen == []
    assert contents(out) == whole("gptq")


def test_a_disk_that_is_full_of_hidden_states_keeps_what_is_done(model, data, whole, tmp_path):
    out, recipe = tmp_path / "q.onnx", RECIPES["gptq, tap by tap"]
    append, count = HiddenStateStore._append, itertools.count(1)

    def full(self, array):
        if next(count) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, array)

    with changed((HiddenStateStore, "_append", full)), pytest.raises(OutputError, match="make room") as caught:
        quantize(model, out, recipe, data)
    assert 0 < kept(str(caught.value), out) < 9
    quantize(model, out, recipe, data, resume=True)
    assert contents(out) == whole("gptq, tap by tap")


def test_a_full_disk_on_the_command_line(model, tmp_path):
    with full_from(16):
        done = CliRunner().invoke(main, ["quantize", str(model), "-o", str(tmp_path / "q.onnx")])
    assert done.exit_code == 2
    assert kept(done.stderr.replace("\n", " "), tmp_path / "q.onnx") == 4


def test_an_end_after_the_result_has_its_name_keeps_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    source, out = shutil.copy(model, tmp_path / "lm.onnx"), tmp_path / "out"
    replace = os.replace

    def full(old, new):
        if Path(new).name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="make room") as caught:
        quantize(source, out)
    assert "--resume" not in str(caught.value)
    assert sorted(os.listdir(out)) == ["lm.onnx", "lm.onnx.data"]


MANY = """
import resource, sys
import numpy as np
from onnx_woq import quantize
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
def stop(stage, done, total):
    if (stage, done) == ("solve", 120):
        raise KeyboardInterrupt
try:
    quantize(sys.argv[1], sys.argv[2], progress=stop)
except KeyboardInterrupt:
    quantize(sys.argv[1], sys.argv[2], resume=True)
"""


def test_a_model_of_many_weights_needs_few_open_files(tmp_path):
    """A map keeps its file open, and macOS allows a process 256 of them, Linux 1,024."""
    weights = {f"W{i}": random(128, 128, seed=i) / 12 for i in range(150)}
    nodes = [node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(150)]
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x0", ("t", 128))], [value("x150", ("t", 128))], weights))
    for name in ("few", "whole"):
        (tmp_path / name).mkdir()
    quantize(path, tmp_path / "whole" / "q.onnx")
    command = [sys.executable, "-c", MANY, str(path), str(tmp_path / "few" / "q.onnx")]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:].decode()
    assert contents(tmp_path / "few" / "q.onnx") == contents(tmp_path / "whole" / "q.onnx")


def test_weights_lie_in_the_data_file_where_runtimes_can_map_them(model, tmp_path):
    quantize(model, tmp_path / "q.onnx", Recipe("rtn", Spec(8, 32)))
    tensors = [v.const_value for v in load(tmp_path / "q.onnx").ir.graph.initializers.values()]
    placed = sorted((t.offset, t.nbytes) for t in tensors if hasattr(t, "offset"))
    assert all(offset % 64 == 0 for offset, _ in placed)
    assert all(end <= start for (at, size), (start, _) in itertools.pairwise(placed) for end in [at + size])


def test_large_weights_start_on_a_page(tmp_path):
    weights = {f"W{i}": random(1024, 1024 + i, seed=i) for i in range(2)}
    nodes = [node("MatMul", ["x", name], [f"y{name}"]) for name in weights]
    outputs = [value(f"y{name}") for name in weights]
    path = write(tmp_path / "m.onnx", graph(nodes, [value("x", (3, 1024))], outputs, weights))
    quantize(path, tmp_path / "q.onnx")
    tensors = load(tmp_path / "q.onnx").ir.graph.initializers.values()
    offsets = [v.const_value.offset for v in tensors if v.const_value.nbytes >= 64 * 4096]
    assert len(offsets) == 2
    assert all(offset % 4096 == 0 for offset in offsets)
