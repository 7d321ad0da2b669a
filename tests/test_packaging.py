"""What the wheel, the Makefile and the project's table say of themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import smoke  # noqa: E402

TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = TABLE["project"]


def wheel(folder: Path, *, without: str = "", more: str = "") -> Path:
    """A zip with the names that a wheel has."""
    names = [path.relative_to(ROOT).as_posix() for path in (ROOT / "onnx_woq").rglob("*.py")]
    names += ["onnx_woq/py.typed", more]
    path = folder / "onnx_woq-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            if name and name != without:
                archive.writestr(name, "")
    return path


def test_a_whole_wheel_is_accepted(tmp_path):
    smoke.check_wheel(wheel(tmp_path), ROOT)


@pytest.mark.parametrize("name", ["onnx_woq/py.typed", "onnx_woq/__init__.py"])
def test_what_a_wheel_lacks_is_named(name, tmp_path):
    with pytest.raises(SystemExit, match=f"lacks.*{re.escape(name)}"):
        smoke.check_wheel(wheel(tmp_path, without=name), ROOT)


@pytest.mark.parametrize("name", ["onnx_woq/long_gone.py", "tests/conftest.py"])
def test_what_does_not_belong_in_a_wheel_is_named(name, tmp_path):
    """Such as a module that an earlier build has left in build/lib."""
    with pytest.raises(SystemExit, match=f"too much.*{re.escape(name)}"):
        smoke.check_wheel(wheel(tmp_path, more=name), ROOT)


def test_types_are_offered():
    assert (ROOT / "onnx_woq" / "py.typed").is_file()
    assert "py.typed" in TABLE["tool"]["setuptools"]["package-data"]["onnx_woq"]


def test_pythons_are_claimed_from_the_oldest_that_is_required():
    classified = [c.removeprefix("Programming Language :: Python :: 3.") for c in PROJECT["classifiers"]]
    minors = [int(minor) for minor in classified if minor.isdigit()]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_changelog_knows_this_version():
    headings = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings


def would_do(target: str) -> subprocess.CompletedProcess[str]:
    """What make says it would do; these tests may run under another make."""
    surroundings = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=surroundings)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    "target", ["demo", "test", "test-all", "test-real", "lint", "types", "check", "wheel", "clean"]
)
def test_make_knows(target):
    done = would_do(target)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_check_is_lint_types_and_tests():
    shown = would_do("check").stdout
    for step in ("ruff check", "ruff format --check", "lint-imports", "mypy", "pytest"):
        assert step in shown
