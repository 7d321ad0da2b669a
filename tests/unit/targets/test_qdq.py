"""Codes behind DequantizeLinear stand for the same weight, bit for bit, in every number format and layout.

The reference is a loop over single numbers (`tests.zoo.codes.dequantize_linear`). What sessions make of the nodes is
for `tests/acceptance/quantize/test_qdq.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from onnx_woq.targets import qdq
from onnx_woq.targets.base import Storage
from tests.support import measure
from tests.zoo.codes import dequantize_linear, random_codes, rounded
from tests.zoo.nodes import graph, node, random, value, write

FLOAT32, FLOAT16 = Storage(np.float32, 25), Storage(np.float16, 25)
GROUPS = (1, 16, 24, 48, 100, 512, -1)


def decoded(packed: qdq.Packed) -> np.ndarray:
    codes, scales, *zeros = packed.tensors()
    return dequantize_linear(codes, scales, zeros[0] if zeros else None, packed.axis, packed.block)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_packed_is_what_was_quantized(bits, dim):
    for group, symmetric, (k, n) in itertools.product(GROUPS, (False, True), [(48, 8), (101, 3)]):
        q = random_codes(k, n, Spec(bits, group, symmetric, dim), half=True)
        for storage in (FLOAT32, FLOAT16):
            packed = qdq.pack(q, storage)
            np.testing.assert_array_equal(decoded(packed), q.dequantize(), err_msg=str((group, symmetric, k, n)))
            assert packed.scales.dtype == storage.scale_dtype
            assert (packed.zeros is None) == symmetric


@given(
    bits=st.integers(1, 8), group=st.integers(1, 60), symmetric=st.booleans(), dim=st.sampled_from([0, 1]),
    k=st.integers(1, 50), n=st.integers(1, 20),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_group_of_any_weight(bits, group, symmetric, dim, k, n):
    q = random_codes(k, n, Spec(bits, group, symmetric, dim))
    np.testing.assert_array_equal(decoded(qdq.pack(q, FLOAT32)), q.dequantize())


@pytest.mark.parametrize(("bits", "n", "width"), [(1, 8, 2), (2, 8, 2), (1, 6, 4), (2, 9, 4), (3, 9, 4), (5, 9, 8)])
def test_two_bits_that_do_not_fill_their_bytes_get_four(bits, n, width):
    packed = qdq.pack(random_codes(32, n, Spec(bits, 16)), FLOAT32)
    assert (packed.bits, packed.width) == (width, bits)
    assert packed.codes.nbytes == -(-32 * n * width // 8)


@pytest.mark.parametrize(
    ("group", "block"), [(16, 16), (48, 16), (96, 32), (160, 32), (512, 256), (24, 24), (100, 100)]
)
def test_groups_are_cut_to_the_largest_blocks_that_sessions_fuse(group, block):
    packed = qdq.pack(random_codes(1100, 2, Spec(4, group)), FLOAT32)
    assert (packed.axis, packed.block) == (0, block)
    assert len(packed.scales) == -(-1100 // block)
    assert qdq.speed(Spec(4, group)) == ("native" if block in (256, 128, 64, 32, 16) else "slow")
    assert qdq.speed(Spec(4, group, group_dim=0)) == "slow"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("scales", "proto"), [(np.float32, "tensor(float)"), (np.float16, "tensor(float16)")])
@pytest.mark.parametrize("group", [32, -1])
def test_the_oldest_opset_is_the_first_whose_operator_has_the_types_and_blocks(bits, scales, proto, group):
    """Asked of ONNX itself, version by version."""

    def holds(opset):
        schema = onnx.defs.get_schema("DequantizeLinear", opset)
        types = [set(one.allowed_type_strs) for one in schema.type_constraints]
        scaled = types[1] if len(types) > 1 else {"tensor(float)"}
        needed = {f"tensor({sign}int{qdq.container(bits)})" for sign in ("", "u")}
        attribute = "axis" if group == -1 else "block_size"
        return needed <= types[0] and proto in scaled and attribute in schema.attributes

    oldest = qdq.minimum_opset(Spec(bits, group), scales)
    assert [holds(opset) for opset in (oldest - 1, oldest)] == [False, True]


def test_packed_bits_are_read_back_lowest_first():
    for bits in (2, 4, 8):
        codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 7)).astype(np.uint8)
        packed, per = qdq.pack_bits(codes, bits), 8 // bits
        assert packed.nbytes == -(-35 // per)
        places = np.arange(35)
        again = packed[places // per] >> (places % per * bits) & (2**bits - 1)
        np.testing.assert_array_equal(again, codes.reshape(-1))
        assert not int(packed[-1]) >> (bits * (35 - 35 // per * per) or 8), "the rest of the last byte is empty"


@pytest.mark.parametrize("corrected", [False, True])
def test_what_is_lowered_computes_the_product_and_keeps_every_name(corrected, tmp_path):
    """A MatMul, a Gemm with all it may have, and a weight that two of them read."""
    weights = {"A": random(48, 20), "B": random(24, 48, seed=1), "c": random(24, seed=2)}
    nodes = [
        node("MatMul", ["x", "A"], ["a"], name="a"),
        node("MatMul", ["z", "A"], ["a2"], name="a2"),
        node("Gemm", ["x", "B", "c"], ["b"], name="b", transB=1, alpha=0.5, beta=-2.0),
    ]
    outputs = [value("a", (3, 20)), value("a2", (3, 20)), value("b", (3, 24))]
    main = graph(nodes, [value("x", (3, 48)), value("z", (3, 48))], outputs, weights)
    model = load(write(tmp_path / "m.onnx", main))
    [planned] = make_plan(model, Recipe(spec=Spec(4, 16), target="qdq")).groups
    parts = [rounded(np.float32(part.read()), planned.spec) for part in planned.weight_sources()]
    bias = [random(q.codes.shape[1], seed=5 + i) for i, q in enumerate(parts)] if corrected else []
    qdq.lower(model, planned.source, [qdq.pack(q, FLOAT32) for q in parts], accuracy_level=4, bias=bias)
    save(model, tmp_path / "q.onnx", metadata={})
    x, z = random(3, 48, seed=3), random(3, 48, seed=4)
    a, a2, b = ReferenceEvaluator(str(tmp_path / "q.onnx")).run(["a", "a2", "b"], {"x": x, "z": z})
    first, second = (q.dequantize() for q in parts)
    added = bias or [np.float32(0)] * 2
    np.testing.assert_allclose(a, x @ first + added[0], atol=2e-5)
    np.testing.assert_allclose(a2, z @ first + added[0], atol=2e-5)
    np.testing.assert_allclose(b, x @ second - 2 * weights["c"] + added[1], atol=2e-5)
    made = onnx.load(tmp_path / "q.onnx")
    assert {"a", "a2", "b"} <= {one.name for one in made.graph.node}
    assert sum(one.op_type == "DequantizeLinear" for one in made.graph.node) == 3, "each product has its own"
    assert not weights.keys() & measure.tensors(made).keys() - {"c"}
