"""What reaches the terminal: exit codes, progress, JSON."""

from __future__ import annotations

import io
import json
import sys

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.cli.console import (
    BadInput,
    Fault,
    announce,
    named_errors,
    print_json,
    print_result,
    progress_bar,
    replace_non_finite,
)
from onnx_woq.errors import DataError, OnnxWoqError, RecipeError
from tests.unit.cli.conftest import strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("error", [OnnxWoqError, RecipeError, DataError])
def test_a_named_error_becomes_its_message_and_exit_code_2(error):
    with pytest.raises(BadInput, match=r"^write it so$") as raised, named_errors():
        raise error("write it so")
    assert raised.value.exit_code == 2


def test_other_errors_are_faults_of_the_program_with_their_place_and_exit_code_1():
    with (
        pytest.raises(Fault, match=r"TypeError: .* in cli/console.py, line \d+ \(print_json\)") as raised,
        named_errors(),
    ):
        print_json(object())
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    ("error", "says"), [(MemoryError(), "memory has run out"), (PermissionError(13, "denied", "m.onnx"), "m.onnx")]
)
def test_what_the_system_does_not_give_is_no_fault(error, says):
    with pytest.raises(BadInput, match=says), named_errors():
        raise error


@pytest.mark.parametrize("end", [click.UsageError("no"), click.Abort(), click.exceptions.Exit(0), BrokenPipeError()])
def test_ends_of_a_command_stay_as_they_are(end):
    with pytest.raises(type(end)), named_errors():
        raise end


@pytest.mark.parametrize(
    ("interrupt", "says"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was written"),
        (KeyboardInterrupt("2 trials kept"), "interrupted: 2 trials kept"),
    ],
    ids=["silent", "telling"],
)
def test_an_interrupt_is_exit_code_130_and_says_what_is_kept(interrupt, says, capsys):
    with pytest.raises(SystemExit) as raised, named_errors():
        raise interrupt
    assert raised.value.code == 130
    assert capsys.readouterr() == ("", f"{says}\n")


def test_announcements_leave_standard_output_alone(capsys):
    announce("about 3 GB of memory")
    assert capsys.readouterr() == ("", "about 3 GB of memory\n")


def test_without_a_terminal_there_is_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar() as progress:
        assert progress is None
    assert sys.stderr.getvalue() == ""


def test_on_a_terminal_the_bar_shows_the_stage(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, setting in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, setting)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar() as progress:
        progress("solving", 2, 7)
    assert "solving" in sys.stderr.getvalue()
    assert "2/7" in sys.stderr.getvalue()


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_what_is_printed_as_json_has_no_infinity_and_no_nan(value):
    json.dumps(replace_non_finite(value), allow_nan=False)


def test_json_is_printed_on_standard_output(capsys):
    print_json({"loss": float("inf"), "name": "naïve"})
    out, err = capsys.readouterr()
    assert strict_json(out) == {"loss": None, "name": "naïve"}
    assert err == ""


def test_only_numbers_that_are_not_finite_are_replaced():
    value = {"a": [1.5, float("nan"), (float("inf"), -float("inf"))], "b": "nan", "c": 10**400, "d": True}
    assert replace_non_finite(value) == {"a": [1.5, None, [None, None]], "b": "nan", "c": 10**400, "d": True}


def test_a_result_is_printed_as_json_or_as_its_table(capsys):
    class Found:
        def to_dict(self) -> dict[str, float]:
            return {"kl": float("nan")}

    tables = []
    print_result(Found(), True, tables.append)
    assert strict_json(capsys.readouterr().out) == {"kl": None}
    assert tables == []
    found = Found()
    print_result(found, False, tables.append)
    assert tables == [found]
    assert capsys.readouterr().out == ""
