"""The number format: refused where it is wrong, written as the first version wrote it, groups never too long."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.errors import RecipeError

SPECS = st.builds(
    Spec,
    bits=st.integers(1, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    symmetric=st.booleans(),
    group_dim=st.sampled_from([0, 1]),
)


@given(SPECS)
def test_a_spec_survives_json_and_its_own_repr(spec):
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert eval(repr(spec), {"Spec": Spec}) == spec


def test_fields_that_came_later_are_written_only_where_they_say_something():
    assert Spec().to_dict() == {"bits": 4, "group_size": 32, "symmetric": False}
    assert Spec(group_dim=0).to_dict()["group_dim"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits=0 is out of range: choose 1 to 8"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4.0}, "bits must be int, not 4.0"),
        ({"bits": True}, "bits must be int, not True"),
        ({"group_size": 0}, "group_size=0 is out of range"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": "32"}, "group_size must be int"),
        ({"symmetric": 1}, "symmetric must be bool, not 1"),
        ({"group_dim": 2}, "group_dim=2 is out of range"),
        ({"group_dim": False}, "group_dim must be int"),
    ],
)
def test_what_is_out_of_range_is_named(fields, message):
    with pytest.raises(RecipeError, match=message):
        Spec(**fields)


def test_an_unknown_field_is_named_with_its_table():
    with pytest.raises(RecipeError, match=r"unknown embedding field 'groupsize': did you mean group_size"):
        Spec.from_dict({"bits": 4, "groupsize": 32}, "embedding")


@given(SPECS, st.integers(1, 5000))
def test_a_group_has_at_least_one_channel_and_at_most_all(spec, channels):
    group = spec.resolved_group(channels)
    assert 1 <= group <= channels
    assert group == (channels if spec.group_size == -1 or spec.group_size > channels else spec.group_size)
