"""Every operator keeps the protocol: it makes of a weight what it has foretold, and takes its own arrays back."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.targets.base import EmbeddingOperator, LinearOperator, Storage, stored_bytes
from onnx_woq.targets.registry import TARGETS, operator_of
from tests.zoo.codes import random_codes

KINDS = {"linear": LinearOperator, "embedding": EmbeddingOperator}
OPERATORS = [(target, kind) for target in TARGETS for kind in KINDS]
EVERY = pytest.mark.parametrize(("target", "kind"), OPERATORS)


def members(protocol):
    """What a protocol asks for: functions, and constants."""
    asked = {name: one for base in protocol.__mro__ for name, one in vars(base).items() if name[0] != "_"}
    constants = {name for base in protocol.__mro__ for name in vars(base).get("__annotations__", {})}
    return {name: one for name, one in asked.items() if callable(one)}, constants


@EVERY
def test_an_operator_takes_what_the_protocol_says_by_the_same_names(target, kind):
    functions, constants = members(KINDS[kind])
    assert {"pack", "shapes", "lower", "runtime"} <= functions.keys()
    assert "BY_CHANNEL" in constants
    operator = operator_of(target, kind)
    for name, asked in functions.items():
        wanted = [(p.name, p.kind) for p in inspect.signature(asked).parameters.values() if p.name != "self"]
        assert [(p.name, p.kind) for p in inspect.signature(getattr(operator, name)).parameters.values()] == wanted
    assert all(isinstance(getattr(operator, name), bool) for name in constants)


SPECS = st.builds(
    Spec,
    st.integers(1, 8),
    st.sampled_from([1, 16, 24, 32, 48, 100, 128, 512, -1]),
    st.booleans(),
    st.sampled_from([0, 1]),
)
HALVES = {False: np.float32, True: np.float16}


@EVERY
@given(spec=SPECS, k=st.integers(1, 150), n=st.integers(1, 40), half=st.booleans(), opset=st.sampled_from([17, 21, 25]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bytes_are_known_before_and_arrays_can_be_sent_and_kept(target, kind, spec, k, n, half, opset):
    operator, storage = operator_of(target, kind), Storage(HALVES[half], opset)
    if operator.refusal(spec):
        return
    packed = operator.pack(random_codes(k, n, spec, half=half), storage)
    foretold = operator.shapes(k, n, spec, storage)
    assert foretold == tuple((array.shape, array.dtype) for array in packed.arrays)
    assert stored_bytes(foretold) == sum(array.nbytes for array in packed.arrays)
    again = operator.packed_from(packed.arrays, k, n, spec, storage)
    other = packed.with_arrays([array.copy() for array in packed.arrays])
    for one in (again, other):
        assert type(one) is type(packed)
        assert vars_but_arrays(one) == vars_but_arrays(packed)
        for a, b in zip(one.arrays, packed.arrays, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def vars_but_arrays(packed):
    arrays = (np.ndarray, tuple)  # codes that are stored in several planes
    return {name: one for name, one in vars(packed).items() if not isinstance(one, arrays)}


@pytest.mark.parametrize(("target", "kind"), [one for one in OPERATORS if operator_of(*one).BY_CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_an_operator_by_channel_packs_a_few_channels_at_a_time(target, kind, bits):
    operator, storage = operator_of(target, kind), Storage(np.float32, 21)
    q = random_codes(70, 33, Spec(bits, 32))
    whole = operator.pack(q, storage).arrays
    parts = [operator.pack(q.columns(slice(start, start + 10)), storage).arrays for start in range(0, 33, 10)]
    for array, *pieces in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces))


def test_bytes_of_shapes():
    assert stored_bytes(()) == 0
    shapes = (((3, 5), np.dtype(np.uint8)), ((7,), np.dtype(np.float16)), ((), np.dtype(np.float32)))
    assert stored_bytes(shapes) == 15 + 14 + 4
    assert stored_bytes((((0, 9), np.dtype(np.float32)),)) == 0
