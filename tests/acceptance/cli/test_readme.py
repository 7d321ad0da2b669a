"""The README runs as it is written: each block of it, in a folder that holds the files it names."""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.zoo import small as zoo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its commands are those of a POSIX shell")

README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTEXT = 2048
"""Tokens that the model must take: as many as a command line without --seqlen gives it."""


@dataclass(frozen=True)
class Block:
    """Code between fences: its language, its lines, and where it is."""

    language: str
    code: str
    name: str

    def commands(self) -> list[str]:
        """Lines that are more than a comment; a line that ends in a backslash goes on."""
        joined = self.code.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def blocks_of(text: str) -> list[Block]:
    found, heading = [], "top"
    for match in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", text, re.M | re.S):
        if match["heading"]:
            heading = re.sub(r"\W+", "-", match["heading"].lower()).strip("-")
        else:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(match["language"], match["code"], f"{heading}, line {line}"))
    return found


BLOCKS = blocks_of(README.read_text(encoding="utf-8"))
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash", "shell", "console")]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for granted: a model with its tokenizer, twice, two texts and the command."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "LONGEST", CONTEXT)
        for place in (folder, folder / "7b"):
            zoo.language_model(place / "model.onnx", layers=1)
            zoo.byte_tokenizer(place)
            (place / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": zoo.VOCAB}))
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    (folder / "text.txt").write_text(text[:20_000], encoding="utf-8")
    (folder / "other.txt").write_text(text[-5_000:], encoding="utf-8")
    module, function = PROJECT["scripts"]["onnx-woq"].split(":")
    script = folder / "bin" / "onnx-woq"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    script.chmod(0o755)
    return folder


@pytest.fixture
def desk(prepared: Path, tmp_path: Path) -> Path:
    """A folder to run one block in."""
    return Path(shutil.copytree(prepared, tmp_path / "desk"))


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a Dask scheduler with a worker, in this process."""
    import distributed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with distributed.LocalCluster(
            n_workers=1, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None, silence_logs=50
        ) as local:
            yield local.scheduler_address


def run(command: list[str], desk: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(desk / "bin"), os.environ["PATH"]))
    surroundings = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    surroundings = {name: text for name, text in surroundings.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=desk, env=surroundings, capture_output=True, text=True, check=False, timeout=120)


def fitted(command: str, desk: Path, request: pytest.FixtureRequest) -> str:
    """The command with what can only be true of the reader's machine: how large the model is, where a scheduler is."""
    size = (desk / "model.onnx").stat().st_size
    command = re.sub(r"(--target-size[ =])\S+", rf"\g<1>{size - 400_000}", command)
    if "--dask" in command:
        command = re.sub(r"(--dask[ =])\S+", rf"\g<1>{request.getfixturevalue('scheduler')}", command)
    return command


def not_run(command: str) -> str:
    """Why a command is not run but only looked at, which is then done; empty where it is to be run."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        done = run([*words[:1], "-n", *words[1:]], ROOT)
        assert done.returncode == 0, f"the README says `{command}`: {done.stderr}"
        return "takes long; make knows it"
    if words[0] == "pip" or words[:3] == ["python", "-m", "pip"]:
        extras = re.findall(r"\[([\w,-]+)\]", command)
        assert {name for extra in extras for name in extra.split(",")} <= set(PROJECT["optional-dependencies"])
        return "installs packages; the extras it names exist"
    if words[0] == "dask":
        return "runs until it is stopped"
    assert words[0] == "onnx-woq", f"the README runs {words[0]}, of which this test knows nothing"
    return ""


def test_every_block_is_looked_at():
    assert len(SHELL) >= 2
    assert len(PYTHON) >= 1
    known = {block.language for block in (*SHELL, *PYTHON)} | {"text", "json", "toml"}
    assert {block.language for block in BLOCKS} <= known, "a block without a language is neither run nor left alone"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
@pytest.mark.slow
def test_shell(block, desk, request):
    reasons = []
    for command in block.commands():
        if reason := not_run(command):
            reasons.append(f"{command}: {reason}")
            continue
        done = run(["sh", "-c", fitted(command, desk, request)], desk)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
        assert "Traceback" not in done.stderr
    if len(reasons) == len(block.commands()):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
@pytest.mark.slow
def test_python(block, desk):
    if "optimum" in block.code:
        if importlib.util.find_spec("optimum") is None:
            pytest.skip("optimum is not installed (pip install 'onnx-woq[export]')")
        # It wants an architecture that it knows; the zoo's models are of none.
        model = ROOT / "models" / "demo" / "model.onnx"
        assert run(["onnx-woq", "quantize", str(model), "-o", "out/", "--config", "RTN_G32ASYM"], desk).returncode == 0
    (desk / "block.py").write_text(block.code, encoding="utf-8")
    done = run([sys.executable, "block.py"], desk)
    assert done.returncode == 0, f"{block.code}\n{done.stderr[-2000:]}"
