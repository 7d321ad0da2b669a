"""ONNX Runtime must compute what the written codes, scales and zero points say, whatever the model looks like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, quantize
from onnx_woq.targets.matmulnbits import minimum_runtime
from tests.support import measure
from tests.support.runtimes import need, need_opset
from tests.zoo import small as zoo

WIDTHS = (600, 144, 37, 19, 1)
CHAIN_INPUT = zoo.correlated(1, 7, WIDTHS[0])


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("chains")
    return {dtype: zoo.chain(folder / f"{dtype}.onnx", WIDTHS, dtype=dtype) for dtype in (zoo.F32, zoo.F16)}


def need_kernel(bits: int, dtype: type[np.floating]) -> None:
    """Skips where the runtime has no kernel for `bits` bits in float arithmetic."""
    version = minimum_runtime(bits, accuracy_level=0, scale_dtype=dtype)
    need(version, f"MatMulNBits for {bits} bits and {np.dtype(dtype)}")


def assert_close_to(out: np.ndarray, x: np.ndarray, w: np.ndarray, eps: float) -> None:
    """|out − x·w| within the rounding of a sum of products."""
    room = eps * (np.abs(x) @ np.abs(w)) + eps * 1e-3
    assert np.isfinite(out).all()
    worst = np.max(np.abs(out - x @ w) / room)
    assert worst <= 1, f"{worst:.1f} times the rounding error"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, -1, 512])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("dtype", [zoo.F32, zoo.F16], ids=["fp32", "fp16"])
def test_every_grid(bits, group, symmetric, dtype, chains, tmp_path):
    kind = np.float32 if dtype == zoo.F32 else np.float16
    need_kernel(bits, kind)
    model, before = chains[dtype], measure.digest(chains[dtype])
    quantize(model, tmp_path / "q.onnx", Recipe("rtn", Spec(bits, group, symmetric), accuracy_level=0))
    out = tmp_path / "q.onnx"
    onnx.checker.check_model(str(out), full_check=False)
    x = CHAIN_INPUT.astype(kind)
    rows = measure.run(out, [{"x": x}])
    full, values, floats = onnx.load(out), measure.tensors(onnx.load(out)), measure.float_weights(model)
    found = {node.output[0]: node for node in measure.nodes(full) if node.op_type == "MatMulNBits"}
    assert list(found) == ["h0", "h1", "h2", "h3"]
    previous = x.astype(np.float64)
    for name, node in found.items():
        a = measure.attributes(node)
        codes, scale, zero = measure.grid(node, values)
        w = measure.dequantize(node, values)
        assert w.shape == floats[name].shape
        assert_close_to(rows[name], previous, w, 1e-5 if dtype == zoo.F32 else 4e-3)
        assert (a["bits"], a["block_size"]) in {(b, g) for b in (2, 4, 8) for g in (16, 32, 64, 128, 256)}
        assert a["bits"] == min(b for b in (2, 4, 8) if b >= bits)
        assert len(node.input) < 5 or not node.input[4], "g_idx is slow and ignores zero points"
        assert len(node.input) < 4 or not node.input[3] or values[node.input[3]].dtype == np.uint8
        reach = np.abs(codes - zero).max()
        assert reach <= 2**bits - 1, "values outside the grid that was asked for"
        step = min(group, len(w)) if group > 0 else len(w)
        for start in range(0, len(w), step):
            part = slice(start, start + step)
            assert bool((scale[part] == scale[start]).all())
            assert bool((zero[part] == zero[start]).all())
            assert np.ptp(codes[part], axis=0).max() <= 2**bits - 1
        if bits > 1:  # at one bit, zero and the extreme are the two levels
            off = np.abs(w - floats[name]) - 2**-9 * np.abs(floats[name])
            assert np.max(off / np.abs(scale)) <= 0.51, "further from the weight than half a step"
        previous = rows[name]
    assert measure.digest(model) == before


@pytest.mark.parametrize("dtype", [zoo.F32, zoo.F16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("bits", "group"), [(1, 32), (2, 64), (3, -1), (4, 32), (5, 16), (8, 512)])
def test_calibrated_methods_write_what_runs(method, bits, group, dtype, tmp_path):
    kind = np.float32 if dtype == zoo.F32 else np.float16
    need_kernel(bits, kind)
    model = zoo.chain(tmp_path / "m.onnx", (160, 37, 24), dtype=dtype)
    data = [{"x": zoo.correlated(i, 40, 160).astype(kind)} for i in range(2)]
    quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(bits, group), accuracy_level=0), data)
    got, twin = measure.run(tmp_path / "q.onnx", data), measure.run(measure.decoded_twin(tmp_path / "q.onnx"), data)
    for name, value in twin.items():
        np.testing.assert_allclose(got[name], value, atol=(1e-4 if dtype == zoo.F32 else 1e-2) * np.abs(value).max())


@pytest.mark.parametrize("group", [48, 80, 96, 272, 384, 1024])
def test_groups_that_are_not_native_are_exact_too(group, tmp_path):
    """Multiples of 16 are stored in the largest native block that divides them."""
    model, x = zoo.chain(tmp_path / "m.onnx", (600, 37)), CHAIN_INPUT
    quantize(model, tmp_path / "q.onnx", Recipe("rtn", Spec(4, group), accuracy_level=0))
    w, before = measure.decoded(tmp_path / "q.onnx")["h0"], measure.float_weights(model)["h0"]
    assert_close_to(measure.run(tmp_path / "q.onnx", [{"x": x}])["h0"], x.astype(np.float64), w, 1e-5)
    for start in range(0, 600, group):
        part = before[start : start + group]
        step = (np.maximum(part.max(0), 0) - np.minimum(part.min(0), 0)) / 15
        assert (np.abs(w[start : start + group] - part) <= 0.51 * step).all()


@pytest.mark.parametrize("opset", [13, 14, 17, 21, 25])
def test_every_opset(opset, tmp_path):
    need_opset(opset)
    model = zoo.language_model(tmp_path / "m.onnx", opset=opset)
    data = zoo.lm_feeds(zoo.token_ids(2))
    quantize(model, tmp_path / "q.onnx", Recipe("gptq", Spec(8, 32), accuracy_level=0), data)
    onnx.checker.check_model(str(tmp_path / "q.onnx"))
    assert measure.sqnr(*(measure.run(m, data)["logits"] for m in (model, tmp_path / "q.onnx"))) > 35


X = zoo.correlated(3, 9, 48)[None]
SHAPES = {
    "gemms": (zoo.gemms, [{"a": zoo.correlated(2, 9, 40)}], {f"g{i}" for i in range(10)}),
    "constants": (
        zoo.constants,
        [{"x": X}],
        {"by_constant", "by_transpose", "by_cast", "by_cast_bf16", "by_identity", "by_squeeze", "shared_1", "shared_2"},
    ),
    "branches": (zoo.branches, [{"x": X, "flag": np.array(f)} for f in (True, False)], {"yes_out", "no_out", "y"}),
    "loop": (zoo.loop, [{"x": X}], {"step", "y"}),
    "functions": (zoo.functions, [{"x": X}], None),
}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_model(shape, method, tmp_path):
    """All sites are found, the surgery keeps the function (8 bits stay close to float), the runtime runs the codes."""
    build, data, linears = SHAPES[shape]
    model = build(tmp_path / "m.onnx")
    before = measure.digest(model)
    report = quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(8, 16), accuracy_level=0), data)
    out = tmp_path / "q.onnx"
    onnx.checker.check_model(str(out))
    found = measure.low_bit(out)
    assert len(found) == (2 if linears is None else len(linears)), [s.reason for s in report.skipped]
    assert linears is None or set(found) == linears
    wanted, twin, got = measure.run(model, data), measure.run(measure.decoded_twin(out), data), measure.run(out, data)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert measure.sqnr(value, got[name]) > 35, name
        np.testing.assert_allclose(got[name], twin[name], atol=1e-4 * np.abs(value).max(), err_msg=name)
    assert measure.digest(model) == before


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_bodies_may_use_the_same_names(method, tmp_path):
    model = zoo.branches(tmp_path / "m.onnx", same_names=True)
    data = [{"x": X, "flag": np.array(flag)} for flag in (True, False)]
    quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(8, 16), accuracy_level=0), data)
    assert len([n for n in measure.nodes(onnx.load(tmp_path / "q.onnx")) if n.op_type == "MatMulNBits"]) == 3
    assert measure.sqnr(*(measure.run(m, data)["y"] for m in (model, tmp_path / "q.onnx"))) > 35


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_branch_that_calibration_never_takes(method, tmp_path):
    """No statistics for one body: the model still comes out whole."""
    need("1.29", "correct int8 products with zero points in bodies")
    model = zoo.branches(tmp_path / "m.onnx")
    quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(8, 16)), [{"x": X, "flag": np.array(True)}] * 2)
    for flag in (True, False):
        data = [{"x": X, "flag": np.array(flag)}]
        assert measure.sqnr(*(measure.run(m, data)["y"] for m in (model, tmp_path / "q.onnx"))) > 25


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_unnamed_nodes(method, enc_data, tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx", named=False)
    quantize(model, tmp_path / "q.onnx", Recipe(method, Spec(8, 32), accuracy_level=0), enc_data)
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {"first", "left", "right", "y"}
    assert measure.sqnr(*(measure.run(m, enc_data)["y"] for m in (model, tmp_path / "q.onnx"))) > 35


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_tied_embedding(method, tied_lm, lm_data, tmp_path):
    report = quantize(tied_lm, tmp_path / "q.onnx", Recipe(method, Spec(8, 32), accuracy_level=0), lm_data)
    assert "logits" in measure.low_bit(tmp_path / "q.onnx")
    assert sum(report.copies.values()) == zoo.VOCAB * zoo.HIDDEN * 4
    assert report.to_dict()["copies"]
    logits = [measure.run(m, lm_data)["logits"] for m in (tied_lm, tmp_path / "q.onnx")]
    assert measure.sqnr(*logits) > 35
    untied = quantize(tied_lm, tmp_path / "u.onnx", Recipe(method, Spec(8, 32), exclude=("logits",)), lm_data)
    assert not untied.copies


def test_bfloat16_activations_are_quantized_or_refused_with_a_reason(tmp_path):
    """The CPU kernel has no bfloat16: whatever happens, it must not be a model that no one can load unannounced."""
    model = zoo.chain(tmp_path / "m.onnx", (64, 32, 16), dtype=zoo.BF16)
    from onnx_woq import OnnxWoqError, inspect

    try:
        quantize(model, tmp_path / "q.onnx", Recipe("rtn", Spec(8, 32)))
    except OnnxWoqError:
        assert all(s.reason for s in inspect(model).skipped)
        assert len(inspect(model).skipped) == 2
    else:
        onnx.checker.check_model(str(tmp_path / "q.onnx"))
        values = measure.tensors(onnx.load(tmp_path / "q.onnx"))
        for node in measure.low_bit(tmp_path / "q.onnx").values():
            assert np.isfinite(measure.dequantize(node, values)).all()


def test_accuracy_level_is_written(enc, tmp_path):
    for level in (0, 4):
        quantize(enc, tmp_path / "q.onnx", Recipe(accuracy_level=level))
        assert {measure.attributes(n)["accuracy_level"] for n in measure.low_bit(tmp_path / "q.onnx").values()} == {
            level
        }
    quantize(enc, tmp_path / "q.onnx", "RTN_G32ASYM")
    levels = {measure.attributes(n)["accuracy_level"] for n in measure.low_bit(tmp_path / "q.onnx").values()}
    assert levels == {4}, "native speed by default"


def test_the_files_shrink_with_the_bits(tmp_path):
    model = zoo.siblings(tmp_path / "m.onnx", {"y": zoo.weight(1, 160, 400)})
    sizes = []
    for bits in (1, 2, 3, 4, 8):
        report = quantize(model, tmp_path / str(bits) / "q.onnx", Recipe("rtn", Spec(bits, 32)))
        size = sum(p.stat().st_size for p in (tmp_path / str(bits)).iterdir())
        assert report.bytes_after == size
        sizes.append(size)
    assert report.bytes_before == model.stat().st_size
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert sizes[1] < sizes[2]
    assert sizes[2] == pytest.approx(sizes[3], rel=0.01)
    assert sizes[3] < sizes[4] < report.bytes_before


def test_metadata_tells_how_the_file_was_made(lm, lm_data, tmp_path):
    def properties(recipe: Recipe, data: object) -> dict[str, str]:
        quantize(lm, tmp_path / "q.onnx", recipe, data)
        return {p.key: p.value for p in onnx.load(tmp_path / "q.onnx", load_external_data=False).metadata_props}

    import importlib.metadata

    recipe = Recipe("gptq", Spec(3, 64, True), options={"actorder": True}, exclude=("logits",))
    first, again = properties(recipe, lm_data), properties(recipe, list(lm_data))
    other, none = properties(recipe, lm_data[:-1]), properties(Recipe(), None)
    assert first == again
    assert Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx")) == Recipe()
    assert any(json.dumps(recipe.to_dict(), sort_keys=True) == value for value in first.values())
    assert importlib.metadata.version("onnx-woq") in first.values()
    changed = {key for key in first if first[key] != other.get(key)} - {"onnx_woq.layers"}  # errors on the data
    assert len(changed) == 1, "only the calibration hash depends on the data"
    assert first[changed.pop()] not in none.values()


@pytest.mark.parametrize("external", ["", "weights.bin"])
def test_output_is_one_model_and_at_most_one_data_file(external, tmp_path):
    model = zoo.language_model(tmp_path / "in" / "m.onnx", external=external)
    before = measure.listing(tmp_path / "in")
    report = quantize(model, tmp_path / "out" / "q.onnx")
    assert measure.listing(tmp_path / "in") == before
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files[0] == "q.onnx"
    assert len(files) <= 2
    (tmp_path / "out").rename(tmp_path / "moved")
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    data = zoo.lm_feeds(zoo.token_ids(1))
    assert np.isfinite(measure.run(tmp_path / "moved" / "q.onnx", data)["logits"]).all()
    assert report.bytes_after == sum(p.stat().st_size for p in (tmp_path / "moved").iterdir())


def test_external_data_behind_symlinks_is_read(tmp_path):
    """The Hugging Face cache: snapshots/model.onnx -> ../blobs/…, its data likewise."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    real = zoo.language_model(tmp_path / "made" / "model.onnx", external="model.onnx_data")
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(real.parent.iterdir())):
        path.rename(blobs / f"blob{i}")
        (snapshot / path.name).symlink_to(blobs / f"blob{i}")
    before = measure.listing(tmp_path)
    data = zoo.lm_feeds(zoo.token_ids(2))
    quantize(snapshot / "model.onnx", tmp_path / "out" / "q.onnx", Recipe("gptq", Spec(8, 32)), data)
    embedded = zoo.language_model(tmp_path / "same" / "model.onnx")
    logits = [measure.run(m, data)["logits"] for m in (embedded, tmp_path / "out" / "q.onnx")]
    assert measure.sqnr(*logits) > 30
    assert measure.listing(tmp_path).items() >= before.items()


def test_the_same_input_gives_the_same_bytes(lm, lm_data, tmp_path):
    for name in ("a", "b"):
        quantize(lm, tmp_path / name / "q.onnx", Recipe("awq"), lm_data)
    assert measure.listing(tmp_path / "a") == measure.listing(tmp_path / "b")
