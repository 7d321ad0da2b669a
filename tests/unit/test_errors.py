"""Every error is one of a kind that callers can catch, and an unknown name is answered with the nearest known ones."""

from __future__ import annotations

import ast
import errno
import inspect
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from onnx_woq import errors
from onnx_woq.errors import nearest, visible

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_whoever_catches_the_base_class_catches_all(kind):
    assert issubclass(kind, errors.OnnxWoqError)
    assert (kind.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (errors.DiskError, errors.OutputError),
        (errors.EvaluationError, errors.DataError),
        (errors.RotationError, errors.ModelError),
        (errors.NothingToQuantize, errors.ModelError),
        (errors.AlreadyQuantized, errors.ModelError),
    ],
)
def test_a_special_case_is_caught_as_what_it_is_a_case_of(narrow, wide):
    assert issubclass(narrow, wide)


def test_errors_import_nothing_of_the_package():
    tree = ast.parse(Path(errors.__file__).read_text(encoding="utf-8"))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert not [module for module in modules if module.startswith("onnx_woq")]


@pytest.mark.parametrize(
    ("name", "known", "answer"),
    [
        ("gptk", ["awq", "gptq", "rtn"], "did you mean gptq?"),
        ("GPTQ", ["awq", "gptq", "rtn"], "did you mean gptq?"),
        ("rtn_g32sym", ["RTN_G32ASYM", "X"], "did you mean RTN_G32ASYM?"),
        ("zzz", ["awq", "gptq"], "known: awq, gptq"),
        ("", ["awq"], "known: awq"),
        ("x", [], "known: "),
    ],
)
def test_the_nearest_known_names_or_all_of_them(name, known, answer):
    assert nearest(name, known) == answer


def test_at_most_three_are_suggested_the_closest_first():
    answer = nearest("bits", (name for name in ["bitz1", "bits2", "bits1x", "bitsy", "bit"]))
    assert answer.count(" or ") == 2
    assert answer.startswith(("did you mean bits2", "did you mean bitsy", "did you mean bit"))


def test_what_has_run_out_is_found_behind_other_errors():
    scarce = OSError(errno.EMFILE, "Too many open files")
    for error in (scarce, MemoryError("4 GB"), BrokenExecutor("gone"), RuntimeError("std::bad_alloc")):
        outer = errors.ModelError("cannot be opened")
        outer.__cause__ = error
        for one in (error, outer):
            found = errors.system_failure(one)
            assert isinstance(found, errors.ResourceError)
            assert type(error).__name__ in str(found)
    assert errors.system_failure(found) is found
    assert errors.system_failure(OSError(errno.ENOENT, "no such file")) is None
    outer.__cause__ = outer
    assert errors.system_failure(outer) is None


def test_a_fault_is_told_with_its_place_in_the_package():
    with pytest.raises(AttributeError) as raised:
        nearest(None, [])
    told = errors.fault_text(raised.value)
    for part in ("a fault of onnx-woq", "AttributeError", "onnx_woq/errors.py, line", "(nearest)", "report"):
        assert part in told
    assert "ValueError: never raised." in errors.fault_text(ValueError("never raised"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("Größe → 3 µm, 日本語, 🙂", "Größe → 3 µm, 日本語, 🙂"),
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("one\r\ntwo\t", r"one\r\ntwo\t"),
        ("\x9b5m\x7f\x00", r"\x9b5m\x7f\x00"),
        ("\u202etxt\u2066\u200b\u2028", r"\u202etxt\u2066\u200b\u2028"),
        (b"no-\xff-text".decode("utf-8", "surrogateescape"), r"no-\udcff-text"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_a_terminal_gets_only_what_can_be_seen(text, shown):
    assert visible(text) == shown
    visible(text).encode()
