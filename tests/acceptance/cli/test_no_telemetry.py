"""ONNX Runtime's telemetry stays off: no device id, no event database, nobody called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.commands import ROOT, command_line, python

SWITCH = "ORT_DISABLE_TELEMETRY"
QUIET = ("TF_BUILD", "GITHUB_ACTIONS", "CI")
"""Where one of these is set, ONNX Runtime is quiet of its own accord."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a user who has said nothing about telemetry and has nothing in `home` yet."""
    said = {name: text for name, text in os.environ.items() if name not in (SWITCH, *QUIET)}
    said = {name: text for name, text in said.items() if not name.startswith("XDG_")}
    folders = {"HOME": str(home), "USERPROFILE": str(home), "LOCALAPPDATA": str(home), "APPDATA": str(home)}
    return said | folders | {"PYTHONPATH": str(ROOT)} | more


def inside(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


@pytest.mark.slow
def test_commands_leave_nothing_in_the_home_folder(enc, xs, home, tmp_path):
    out, surroundings = tmp_path / "q.onnx", environment(home)
    quantize = ("quantize", enc, "-o", out, "--calib", xs, "--executor", "processes", "--config")
    evaluate = ("evaluate", out, "--reference", enc, "--data", xs)
    for command in ((*quantize, "RTN_G32ASYM"), (*quantize, "GPTQ_G32ASYM"), evaluate):
        done = command_line(*command, env=surroundings)
        assert done.returncode == 0, done.stderr
        assert inside(home) == []


def test_it_would_be_on_without_us(home):
    """Or else the test above shows nothing, as before onnxruntime 1.32, which has no telemetry but on Windows."""
    nowhere = environment(home, https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    done = python("import onnxruntime; print(onnxruntime.__version__)", env=nowhere)
    if not inside(home):
        pytest.skip(f"onnxruntime {done.stdout.strip()} writes nothing of its own accord")
    assert any("onnxruntime" in name for name in inside(home))


@pytest.mark.parametrize("said", ["0", "", "1", "anything"])
def test_what_the_user_says_stands(said, home):
    done = python(f"import os, onnx_woq; print(repr(os.environ[{SWITCH!r}]))", env=environment(home, **{SWITCH: said}))
    assert done.stdout.strip() == repr(said), done.stderr


WATCH = f"""
import importlib, os, pkgutil, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("onnxruntime"):
            print(name, os.environ.get({SWITCH!r}), flush=True)

sys.meta_path.insert(0, Watch())
"""


def test_it_is_off_before_onnxruntime_is_imported(home):
    """Whichever module of the package comes first."""
    everything = (
        "import onnx_woq\n"
        "for module in pkgutil.walk_packages(onnx_woq.__path__, 'onnx_woq.'):\n"
        "    try:\n"
        "        module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as missing:  # an extra that is not installed\n"
        "        assert not missing.name.startswith('onnx_woq')"
    )
    done = python(WATCH + everything, env=environment(home))
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert "onnxruntime" in {name for name, _ in seen}
    assert {value for _, value in seen} == {"1"}
    assert inside(home) == []


def test_any_module_of_the_package_switches_it_off(home):
    """Workers of a cluster, which have no environment of ours, unpickle functions of some module."""
    code = "import onnx_woq.errors, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, env=environment(home)).stdout.strip() == "1"
