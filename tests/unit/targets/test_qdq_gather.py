"""Rows that are looked up and then dequantized are those of the table, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from onnx_woq.targets import qdq_gather
from onnx_woq.targets.base import Storage
from onnx_woq.targets.qdq import container
from tests.zoo.codes import random_codes
from tests.zoo.nodes import FLOAT, FLOAT16, INT64, graph, node, random, run, value, write

ROWS = 2100
IDS = np.array([[0, 5, ROWS - 1], [7, 7, -1]], np.int64)


def planned(path, columns, spec, dtype=np.float32, shape=(2, 3)):
    """A loaded model that looks rows up, and its table."""
    proto = {np.float32: FLOAT, np.float16: FLOAT16}[dtype]
    main = graph(
        [node("Gather", ["T", "ids"], ["y"], name="gather")],
        [value("ids", shape, INT64)],
        [value("y", (*shape, columns), proto)],
        {"T": random(ROWS, columns, dtype=dtype)},
    )
    model = load(write(path, main))
    [table] = make_plan(model, Recipe(embedding=spec, target="qdq")).embeddings
    return model, table


def naive(packed: qdq_gather.Packed) -> np.ndarray:
    """The table [V, D]: the bytes of a row hold the codes of its first part in their lowest bits, and so on."""
    per = 8 // container(packed.width)
    parts = [packed.codes >> np.uint8(place * packed.bits) & np.uint8(2**packed.bits - 1) for place in range(per)]
    codes = np.concatenate(parts, axis=1)[:, : packed.columns].astype(np.float32)
    group = np.arange(packed.columns) // packed.block
    zeros = np.float32(2 ** (packed.width - 1)) if packed.zeros is None else packed.zeros.astype(np.float32)[:, group]
    return (codes - zeros) * packed.scales.astype(np.float32)[:, group]


@given(
    bits=st.integers(1, 8), group=st.sampled_from([1, 16, 24, 100, -1]), symmetric=st.booleans(),
    k=st.integers(1, 130), n=st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_what_is_packed_is_what_was_quantized(bits, group, symmetric, k, n):
    q = random_codes(k, n, Spec(bits, group, symmetric), half=True)
    for dtype in (np.float32, np.float16):
        packed = qdq_gather.pack(q, Storage(dtype, 21))
        np.testing.assert_array_equal(naive(packed), q.dequantize().T)
        assert packed.codes.nbytes == n * -(-k * container(bits) // 8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_that_are_looked_up_are_those_of_the_table(bits, symmetric, tmp_path):
    """Of a width that fills its bytes and of one that does not; indices from the end are allowed."""
    for columns in (64, 69):
        model, table = planned(tmp_path / "m.onnx", columns, Spec(bits, 32, symmetric))
        q = random_codes(columns, ROWS, table.spec, seed=bits)
        qdq_gather.lower(model, table.source, qdq_gather.pack(q, table.storage))
        save(model, tmp_path / "q.onnx", metadata={})
        onnx.checker.check_model(tmp_path / "q.onnx", full_check=True)
        [rows] = run(tmp_path / "q.onnx", {"ids": IDS})
        np.testing.assert_array_equal(rows, q.dequantize().T[IDS])


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 1)])
def test_indices_of_any_rank_in_half_precision(shape, tmp_path):
    model, table = planned(tmp_path / "m.onnx", 40, Spec(4, 16), np.float16, shape)
    q = random_codes(40, ROWS, table.spec, half=True)
    qdq_gather.lower(model, table.source, qdq_gather.pack(q, table.storage))
    save(model, tmp_path / "q.onnx", metadata={})
    ids = np.random.default_rng(0).integers(0, ROWS, shape)
    [rows] = run(tmp_path / "q.onnx", {"ids": ids})
    assert (rows.dtype, rows.shape) == (np.float16, (*shape, 40))
    np.testing.assert_allclose(rows, q.dequantize().T[ids], rtol=1e-3)


def test_names_are_kept_and_the_float_table_goes(tmp_path):
    model, table = planned(tmp_path / "m.onnx", 64, Spec(4, 32))
    qdq_gather.lower(model, table.source, qdq_gather.pack(random_codes(64, ROWS, table.spec), table.storage))
    [last] = [one for one in model.ir.graph if one.outputs[0].name == "y"]
    assert (last.name, last.op_type) == ("gather", "DequantizeLinear")
    assert "T" not in model.ir.graph.initializers
    assert qdq_gather.runtime(last, in_body=False) == (1, 19)
    assert not any(qdq_gather.runtime(one, in_body=False) for one in model.ir.graph if one is not last)


def test_what_it_refuses_and_what_it_shares(tmp_path):
    assert "group_dim=0" in qdq_gather.refusal(Spec(4, 32, group_dim=0))
    assert not any(qdq_gather.refusal(Spec(bits, size)) for bits in range(1, 9) for size in (1, 100, -1))
    model, table = planned(tmp_path / "m.onnx", 64, Spec(4, 32))
    with pytest.raises(ValueError, match="'y' cannot share codes"):
        qdq_gather.share(model, table.source, None)
