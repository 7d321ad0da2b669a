"""The fuzzer makes the models it says, finds what is no named error, and finds none in a fixed small share of them."""

from __future__ import annotations

import logging
import runpy
import warnings
from contextlib import suppress
from pathlib import Path

import onnx
import pytest

from onnx_woq.engine import inspection
from onnx_woq.errors import ModelError

FUZZ = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "fuzz.py"))
make_case, fault = FUZZ["make_case"], FUZZ["fault"]


def test_a_number_always_stands_for_the_same_model(tmp_path):
    first, again, other = (make_case(number, tmp_path / folder) for number, folder in [(5, "a"), (5, "b"), (6, "c")])
    assert first[1] == again[1] != other[1]
    assert first[0].read_bytes() == again[0].read_bytes() != other[0].read_bytes()


def test_most_models_get_past_the_parser(tmp_path):
    parsed = 0
    for number in range(40):
        path, done = make_case(number, tmp_path / str(number))
        assert ": " in done
        with suppress(Exception):  # protobuf's own
            onnx.load(path, load_external_data=False)
            parsed += 1
    assert parsed >= 25


@pytest.mark.parametrize(("error", "is_fault"), [(KeyError("k"), True), (ModelError("m"), False)], ids=repr)
def test_what_is_a_fault(error, is_fault, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    FUZZ["MODELS"]["encoder"](tmp_path / "m.onnx")
    monkeypatch.setattr(inspection, "make_plan", fails)
    found = fault(tmp_path / "m.onnx", 1)
    assert bool(found) == is_fault
    assert not is_fault or "inspect: KeyError" in found


@pytest.mark.parametrize("start", [0, 60, 120, 180])
@pytest.mark.slow
def test_mutated_models_are_refused_by_name_or_quantized(start, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx_ir's, on unknown keys
        cases = [make_case(number, tmp_path / str(number)) for number in range(start, start + 60)]
        faults = [f"{done}: {found}" for (path, done) in cases if (found := fault(path, int(path.parent.name)))]
    assert faults == []
