"""The group: every command is found by its name, and only then imported."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from onnx_woq.cli import main
from onnx_woq.cli.commands import SUMMARIES

IMPORTED = """
import sys
from onnx_woq.cli import main
main(sys.argv[1:], prog_name="onnx-woq", standalone_mode=False)
print("imported", *sorted({name for name in sys.modules if "onnx_woq" in name or "." not in name}))
"""


def imported_by(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_main_is_a_click_group():
    assert isinstance(main, click.Group)
    assert main.list_commands(click.Context(main)) == ["configs", "convert", "evaluate", "inspect", "quantize"]


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_summary_of_a_command_is_how_its_help_begins(name):
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    assert " ".join(command.help.split()).startswith(SUMMARIES[name])
    stub = click.Command(name, help=SUMMARIES[name])
    assert all(stub.get_short_help_str(width) == command.get_short_help_str(width) for width in range(10, 120))


def test_the_help_of_the_group_imports_no_command():
    imported = imported_by("--help")
    assert {name for name in imported if name.startswith("onnx_woq")} == {
        "onnx_woq",
        "onnx_woq.cli",
        "onnx_woq.cli.commands",
        "onnx_woq.cli.console",
        "onnx_woq.errors",
    }
    assert "numpy" not in imported


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_help_of_a_command_imports_that_command_and_no_engine(name):
    imported = imported_by(name, "--help")
    assert f"onnx_woq.cli.{name}" in imported
    assert not {f"onnx_woq.cli.{other}" for other in SUMMARIES if other != name} & imported
    rooms = {module.split(".")[1] for module in imported if module.startswith("onnx_woq.")}
    assert rooms <= {"cli", "core", "errors", "presets", "recipe"}
    assert not {"onnx", "onnx_ir", "onnxruntime", "rich", "scipy"} & imported


def test_an_unknown_command_is_a_usage_error(run):
    assert "No such command 'quantise'" in run("quantise", code=2).stderr


def test_a_command_that_someone_adds_is_listed_and_run():
    group = type(main)(name="more", callback=main.callback)
    group.add_command(click.Command("extra", help="Do more.", callback=lambda: click.echo("done")))
    assert group.list_commands(click.Context(group)) == [
        "configs",
        "convert",
        "evaluate",
        "extra",
        "inspect",
        "quantize",
    ]
    assert "extra     Do more." in group.get_help(click.Context(group))
