"""Block by block a model computes what ONNX Runtime computes at once, to 1e-5 of its largest output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, numpy_helper

from onnx_woq.graph.find.blocks import cuts
from onnx_woq.graph.io.model import load
from onnx_woq.runtime.calibration.replay import stitched
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo" / "model.onnx"
FLOAT32 = 1e-5
HALF = {zoo.F16: 2.0**-10, zoo.BF16: 2.0**-7}
"""One rounding of the result to half precision, doubled: parts are computed in float32 and rounded where they end."""


def whole(model: Path | bytes, feed: arch.Feed) -> dict[str, np.ndarray]:
    session = measure.session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def assert_close(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Same outputs, same shapes, no error above `tolerance` times the largest magnitude of each output."""
    assert got.keys() == wanted.keys()
    assert got
    for name, right in wanted.items():
        value = np.asarray(got[name])
        assert value.shape == right.shape, name
        if right.dtype.kind in "biu":
            assert np.array_equal(value, right), name
        elif right.size:
            error = np.abs(value.astype(np.float64) - right.astype(np.float64)).max()
            share = float(error / np.abs(right.astype(np.float64)).max())
            assert share <= tolerance, name


def equal_on(model: Path, feeds: Sequence[arch.Feed], tolerance: float = FLOAT32, *, blocks: int = 2) -> None:
    source = load(model)
    assert sum(len(cut.blocks) for cut in cuts(source)) >= blocks  # or nothing has been stitched
    for feed in feeds:
        wanted = whole(model, feed)
        assert any(value.size and np.abs(value).max() > 0 for value in wanted.values())
        got = stitched(source, feed)
        assert all(got[name].dtype == value.dtype for name, value in wanted.items())
        assert_close(got, wanted, tolerance)


LAYERED: dict[str, tuple[Callable[[Path], Path], list[arch.Feed], int]] = {
    **{
        f"decoder opset {opset}": (lambda p, o=opset: arch.decoder(p, opset=o), arch.ragged(), 4)
        for opset in (13, 14, 17, 20)
    },
    "tied decoder": (lambda p: arch.decoder(p, tied=True), arch.ragged(), 4),
    "deep decoder": (lambda p: arch.decoder(p, layers=9), arch.ragged(layers=9), 9),
    "weights beside it": (lambda p: arch.decoder(p, external="w.bin"), arch.ragged(), 4),
    "fused decoder": (arch.fused_decoder, arch.ragged("fused"), 4),
    "bert": (arch.bert, arch.ragged("bert"), 4),
    "bert opset 13": (lambda p: arch.bert(p, opset=13), arch.ragged("bert"), 4),
    "fused bert": (lambda p: arch.bert(p, fused=True), arch.ragged("bert"), 4),
    "cross decoder": (arch.cross_decoder, arch.ragged("cross"), 4),
    "merged decoder": (arch.merged_decoder, arch.ragged("merged", layers=3), 6),
    "loop between": (arch.loop_between, [arch.float_feed(2, 5), arch.float_feed(1, 1)], 4),
    "funnel": (arch.funnel, [arch.float_feed(2, 5), arch.float_feed(1, 1)], 2),
    "tangle": (arch.tangle, [arch.float_feed(2, 5)], 1),
    "language model": (zoo.language_model, zoo.lm_feeds([*zoo.token_ids(1), *zoo.token_ids(1, 3)]), 2),
    "tied language model": (lambda p: zoo.language_model(p, tied=True), zoo.lm_feeds(zoo.token_ids(2)), 2),
    "encoder": (zoo.encoder, zoo.float_feeds(2), 1),
    "nameless nodes": (lambda p: zoo.encoder(p, named=False), zoo.float_feeds(2), 1),
}
X48 = zoo.correlated(3, 9, 48)
ODD: dict[str, tuple[Callable[[Path], Path], list[arch.Feed], int]] = {
    "siblings": (
        lambda p: zoo.siblings(p, {"a": zoo.weight(1, 48, 20), "b": zoo.weight(2, 48, 8)}), [{"x": X48[None]}], 1,
    ),
    "chain of outputs": (zoo.chain, [{"x": zoo.correlated(1, 5, 600)}], 1),
    "gemms": (zoo.gemms, [{"a": zoo.correlated(1, 7, 40)}], 1),
    "constants": (zoo.constants, [{"x": X48[None]}], 1),
    "branches": (zoo.branches, [{"x": X48[None], "flag": np.array(flag)} for flag in (True, False)], 1),
    "branches with the same names": (
        lambda p: zoo.branches(p, same_names=True), [{"x": X48[None], "flag": np.array(f)} for f in (True, False)], 1,
    ),
    "loop": (zoo.loop, [{"x": X48[None]}], 1),
    "functions": (zoo.functions, [{"x": X48[None]}], 1),
    "leftovers": (
        zoo.leftovers, [{"x": np.stack([X48, X48[::-1]]), "other": np.ones((2, 48, 8), np.float32), "a": X48}], 1,
    ),
    "no weights": (zoo.no_weights, [{"x": np.ones((4, 8), np.float32), "y": np.ones((8, 4), np.float32)}], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LAYERED, *ODD])
def test_equal_to_the_whole_model(name, tmp_path):
    build, feeds, blocks = (LAYERED | ODD)[name]
    equal_on(build(tmp_path / "m.onnx"), feeds, blocks=blocks)


def test_equal_on_the_demo_model():
    rng = np.random.default_rng(0)
    session = measure.session(DEMO)
    layers = sum(value.name.startswith("past_key_values") for value in session.get_inputs()) // 2
    for rows, length, padded in ((1, 12, 0), (3, 7, 3)):
        ids = rng.integers(3, 60, (rows, length))
        mask = np.ones_like(ids)
        mask[-1, :padded] = 0
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
        for value in session.get_inputs():
            if value.name not in feed:
                assert "float" in value.type, value.name
                feed[value.name] = np.zeros([rows, *[d if isinstance(d, int) else 0 for d in value.shape[1:]]], "f4")
        feed = {value.name: feed[value.name] for value in session.get_inputs()}
        equal_on(DEMO, [feed], blocks=max(2, layers))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("plain") / "m.onnx", layers=3)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 5), st.data())
def test_equal_whatever_the_shape(plain, rows, length, past, data):
    padded = data.draw(st.integers(0, past + length - 1))
    feed = arch.ids_feed(rows, length, past=past, layers=3, padded=padded, left=data.draw(st.booleans()))
    equal_on(plain, [feed], blocks=3)


# Half precision


def in_float32(path: Path) -> bytes:
    """The same model with everything of half precision, its rounded weights too, in float32."""
    model = onnx.load(path)
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        if tensor.data_type in half:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            assert attribute.type not in (AttributeProto.GRAPH, AttributeProto.TENSOR)
            if attribute.name == "to" and attribute.i in half:
                attribute.i = TensorProto.FLOAT
    return model.SerializeToString()


def wide(feed: arch.Feed) -> arch.Feed:
    return {k: v.astype(np.float32) if v.dtype in (np.float16, ml_dtypes.bfloat16) else v for k, v in feed.items()}


def half_feeds(kind: str, dtype: int) -> list[arch.Feed]:
    """No row without a token to look at: float16 cannot tell scores apart down there."""
    return arch.ragged(kind, left=False, dtype=dtype)


HALVES = {"decoder": arch.decoder, "fused": arch.fused_decoder, "bert": arch.bert, "cross": arch.cross_decoder}


@pytest.mark.parametrize("dtype", [zoo.F16, zoo.BF16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_is_as_good_as_float32_rounded(kind, dtype, tmp_path):
    """The reference is the same model in float32: ONNX Runtime does not run bfloat16, and rounds float16 everywhere."""
    model = HALVES[kind](tmp_path / "m.onnx", dtype=dtype)
    source = load(model)
    assert len(cuts(source)[0].blocks) >= 4
    for feed in half_feeds(kind, dtype):
        wanted = whole(in_float32(model), wide(feed))
        assert_close(stitched(source, feed), wanted, HALF[dtype])


@pytest.mark.parametrize("kind", HALVES)
def test_float16_is_near_what_the_runtime_computes(kind, tmp_path):
    """ONNX Runtime rounds after every node: through four layers of some twenty each, a few units in the last place."""
    model = HALVES[kind](tmp_path / "m.onnx", dtype=zoo.F16)
    for feed in half_feeds(kind, zoo.F16):
        assert_close(stitched(load(model), feed), whole(model, feed), 8 * HALF[zoo.F16])


def test_weights_stored_in_bfloat16_and_cast(tmp_path):
    """The runtime runs these, so they have to be equal to 1e-5."""
    model = arch.decoder(tmp_path / "m.onnx")
    proto = onnx.load(model)
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".weight"):
            array = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            wide_name, short = tensor.name, f"{tensor.name}.stored"
            tensor.CopyFrom(numpy_helper.from_array(array, short))
            casts.append(onnx.helper.make_node("Cast", [short], [wide_name], name=f"cast/{wide_name}", to=zoo.F32))
    assert len(casts) == 29
    for cast in reversed(casts):
        proto.graph.node.insert(0, cast)
    onnx.save(proto, model)
    equal_on(model, arch.ragged(), blocks=4)


# Repeated calls


def test_a_feed_is_not_changed_and_results_do_not_depend_on_what_ran_before(plain):
    source = load(plain)
    feed = arch.ids_feed(2, 5, past=2, layers=3, padded=1, left=True)
    before = {name: array.copy() for name, array in feed.items()}
    first = stitched(source, feed)
    stitched(source, arch.ids_feed(1, 9, layers=3, seed=5))
    again = stitched(source, feed)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(np.array_equal(feed[name], before[name]) for name in before)


def test_it_really_runs_in_pieces(plain, forwards):
    """No run may fetch more than a block leaves: as many runs as blocks at least, and none of the whole model."""
    source = load(plain)
    stitched(source, arch.ids_feed(1, 4, layers=3))
    assert len(forwards) >= len(cuts(source)[0].blocks) >= 3
