"""Values that JSON can hold: what it has no words for becomes None or text, everything else stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.report.plain_json import to_plain

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=9)


@given(VALUES)
def test_whatever_it_is_given_other_programs_can_read(value):
    plain = to_plain(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_word_become_none_wherever_they_are(bad):
    assert to_plain({"a": [bad, (1.5, {"b": bad})]}) == {"a": [None, [1.5, {"b": None}]]}


def test_paths_keys_and_tuples():
    assert to_plain({Path("a"): (Path("x") / "y.onnx", True, 3)}) == {"a": [str(Path("x") / "y.onnx"), True, 3]}


def test_what_it_is_given_is_left_as_it_was():
    value = {"a": [math.nan]}
    to_plain(value)
    assert math.isnan(value["a"][0])
