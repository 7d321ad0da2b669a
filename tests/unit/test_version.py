"""The version is that of the installed package, and a source tree that is not installed says so."""

from __future__ import annotations

import importlib.metadata

from click.testing import CliRunner

from onnx_woq import version as module
from onnx_woq.version import version


def test_it_is_that_of_the_installed_package(monkeypatch):
    monkeypatch.setattr(module, "installed_version", lambda name: f"{name} 7.5")
    assert version() == "onnx-woq 7.5"


def test_a_source_tree_has_an_unknown_one(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module, "installed_version", missing)
    assert version() == "0+unknown"


def test_the_command_line_says_the_same():
    from onnx_woq.cli import main

    assert version() in CliRunner().invoke(main, ["--version"]).output.split()
