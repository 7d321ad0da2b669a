"""What starting costs, counted in modules: seconds depend on the machine, what is imported does not."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import python

COMMANDS = ("quantize", "evaluate", "inspect", "configs")
HEAVY = {
    "numpy", "scipy", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_extensions", "tokenizers", "ml_dtypes",
    "google", "rich", "plotly", "matplotlib", "distributed", "dask", "concurrent", "multiprocessing", "asyncio",
    "filelock", "threadpoolctl", "torch", "xxhash",
}  # fmt: skip
"""Packages that the work needs; their names on the command line do not."""

ROOMS = {"graph", "targets", "runtime", "engine", "tuning", "report"}
"""Parts of the package that help does without."""

OTHERS = {"click", "onnx_woq"}
"""All that help imports besides, apart from the standard library."""

PROBE = """
import json, sys
before = set(sys.modules)
{statement}
new = set(sys.modules) - before
print(json.dumps({{
    "packages": sorted({{name.split(".")[0] for name in new if not name.startswith("_")}} - sys.stdlib_module_names),
    "all": sorted({{name.split(".")[0] for name in new}}),
    "ours": sorted(name for name in new if name.split(".")[0] == "onnx_woq"),
}}), file=sys.stderr)
"""


def imported(statement: str) -> dict[str, list[str]]:
    """What a statement imports in a Python of its own, on top of what Python has imported when it starts."""
    done = python(PROBE.format(statement=statement))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def helped(*command: str) -> dict[str, list[str]]:
    arguments = [*command, "--help"]
    return imported(f"from onnx_woq.cli import main; main({arguments!r}, prog_name='onnx-woq', standalone_mode=False)")


def test_the_package_alone_imports_nothing():
    found = imported("import onnx_woq")
    assert found["packages"] == ["onnx_woq"]
    assert found["ours"] == ["onnx_woq"], "what it offers is imported when it is asked for"


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=lambda c: " ".join(c) or "group")
def test_help_imports_little(command):
    found = helped(*command)
    assert set(found["all"]) & HEAVY == set()
    assert set(found["packages"]) <= OTHERS
    assert {name.split(".")[1] for name in found["ours"] if "." in name}.isdisjoint(ROOMS)
