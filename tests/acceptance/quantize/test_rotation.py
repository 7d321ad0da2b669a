"""Rotation of the residual stream: nothing changes in float, and rounding costs less where channels stick out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_woq import Recipe, Spec, quantize, tune
from onnx_woq.errors import RotationError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.graph.rewrite.rotate import rotate
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo" / "model.onnx"


def rotated(path: Path, out: Path, *, head: bool = True) -> Path:
    """The float model with its stream rotated, for a recipe that quantizes the head or not."""
    model = load(path)
    rotate(
        model, {linear.node for group in find_linear_groups(model, Recipe(lm_head=head))[0] for linear in group.linears}
    )
    save(model, out, metadata={})
    return out


def assert_same(before: Path, after: Path, feeds, bound: float = 3e-6) -> None:
    for feed in feeds:
        old, new = (measure.run(path, [feed]) for path in (before, after))
        assert old.keys() == new.keys()
        for name, wanted in old.items():
            assert np.linalg.norm(new[name] - wanted) <= bound * np.linalg.norm(wanted), name


def weights(path: Path) -> dict[str, np.ndarray]:
    """Every large constant of a file."""
    return {name: w for name, w in measure.tensors(onnx.load(path)).items() if w.size > 400}


def sticking_out(path: Path, factor: float = 12.0, channels: tuple[int, ...] = (3, 17, 50)) -> Path:
    """The same model with weights that make much of a few channels of the stream: groups of a wide range."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("q", "k", "v", "gate", "up", "head")):
            array = numpy_helper.to_array(tensor).copy()
            array[list(channels)] *= factor
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return path


MODELS = {
    "decoder": (arch.decoder, "decoder", {}),
    "tied decoder": (lambda p: arch.decoder(p, tied=True), "decoder", {}),
    "new operators": (lambda p: arch.decoder(p, opset=21), "decoder", {}),
    "fused norms": (arch.fused_decoder, "fused", {}),
    "merged branches": (arch.merged_decoder, "merged", {"layers": 3}),
    "external data": (lambda p: arch.decoder(p, external="weights"), "decoder", {}),
}


@pytest.mark.parametrize("head", [True, False], ids=["head quantized", "head float"])
@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_computes_the_same(name, head, tmp_path):
    build, kind, options = MODELS[name]
    before = build(tmp_path / "m.onnx")
    after = rotated(before, tmp_path / "r.onnx", head=head)
    onnx.checker.check_model(str(after)) if kind != "fused" else None
    assert_same(before, after, arch.ragged(kind, **options))


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_touches_the_stream_is_rotated(name, tmp_path):
    """By its own naive product: what writes is W·R for one R, what reads Rᵀ·diag(gamma)·W."""
    build, _, _ = MODELS[name]
    before = build(tmp_path / "m.onnx")
    old, new = weights(before), weights(rotated(before, tmp_path / "r.onnx"))
    r = np.linalg.lstsq(old["layer0.down.weight"], new["layer0.down.weight_rotated"], rcond=None)[0].astype(np.float64)
    np.testing.assert_allclose(r @ r.T, np.eye(arch.D), atol=1e-4)
    np.testing.assert_allclose(np.abs(r), arch.D**-0.5, atol=1e-4)  # Hadamard
    gamma = np.linspace(0.5, 1.5, arch.D)[:, None]
    for layer in range(3):
        for kind in ("o", "down"):
            w = f"layer{layer}.{kind}.weight"
            np.testing.assert_allclose(new[f"{w}_rotated"], old[w] @ r, atol=1e-4)
        for kind in ("q", "k", "v", "gate", "up"):
            w = f"layer{layer}.{kind}.weight"
            np.testing.assert_allclose(new[f"{w}_rotated"], r.T @ (gamma * old[w]), atol=1e-4)
    assert not any(w in new for w in old if w.startswith("layer"))


@pytest.mark.parametrize("head", [True, False], ids=["head quantized", "head float"])
def test_a_language_model_with_positions(head, lm, tied_lm, lm_data, tmp_path):
    for path in (lm, tied_lm):
        assert_same(path, rotated(path, tmp_path / "r.onnx", head=head), lm_data)


@pytest.mark.parametrize("head", [True, False], ids=["head quantized", "head float"])
def test_the_demo_model(head, tmp_path):
    ids = np.random.default_rng(0).integers(0, 1280, (2, 50))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(50), (2, 1))}
    for past in measure.session(DEMO).get_inputs():
        if past.name not in feed:
            feed[past.name] = np.zeros((2, past.shape[1], 0, past.shape[3]), np.float32)
    after = rotated(DEMO, tmp_path / "r.onnx", head=head)
    old, new = (measure.session(path).run(["logits"], feed)[0].astype(np.float64) for path in (DEMO, after))
    assert np.linalg.norm(new - old) <= 3e-6 * np.linalg.norm(old)


def test_a_float_input_that_is_the_stream(tmp_path):
    model = arch.loop_between  # the Loop in the middle reads the stream
    with pytest.raises(RotationError, match="Loop"):
        rotate(load(model(tmp_path / "loop.onnx")))
    net = arch.Layers()
    h = "x"
    for layer in range(3):
        h = net.op("Add", h, net.gated(net.rms_norm(h, f"norm{layer}"), f"layer{layer}.", layer), out=f"h{layer}")
    h = net.op("Add", h, net.linear("x", "straight", arch.D, arch.D, 77), out="sum")
    net.linear(net.rms_norm(h, "final"), "y", arch.D, 48, 9)
    path = net.save(tmp_path / "m.onnx", {"x": (arch.F32, ["b", "s", arch.D])}, {"y": (arch.F32, ["b", "s", 48])})
    assert_same(path, rotated(path, tmp_path / "r.onnx"), [arch.float_feed(2, 7)])


def test_half_precision_stays_close(tmp_path):
    before = arch.decoder(tmp_path / "m.onnx", dtype=arch.F16)
    assert_same(before, rotated(before, tmp_path / "r.onnx"), arch.ragged(dtype=arch.F16), bound=5e-3)


def test_a_tied_float_head_costs_two_small_matrices_and_no_second_table(tmp_path):
    before = arch.decoder(tmp_path / "m.onnx", tied=True)
    after = rotated(before, tmp_path / "r.onnx", head=False)
    added = sum(w.nbytes for w in weights(after).values()) - sum(w.nbytes for w in weights(before).values())
    assert added == 2 * 4 * arch.D**2
    model = onnx.load(after)
    assert [n.op_type for n in model.graph.node if "embedding" in n.input] == ["Gather", "Transpose"]


def test_an_untied_table_is_rotated_where_it_lies(tmp_path):
    before = arch.decoder(tmp_path / "m.onnx")
    after = rotated(before, tmp_path / "r.onnx", head=False)
    sizes = [sum(w.nbytes for w in weights(p).values()) for p in (before, after)]
    assert sizes[0] == sizes[1]
    kinds = [[n.op_type for n in onnx.load(p).graph.node] for p in (before, after)]
    assert kinds[0] == kinds[1]


def test_weights_are_computed_when_they_are_read(tmp_path):
    """Rotating holds none of them in memory."""
    model = load(arch.decoder(tmp_path / "m.onnx", external="weights"))
    rotate(model)
    found = [v.const_value for n, v in model.ir.graph.initializers.items() if n.endswith("weight_rotated")]
    assert found
    assert {type(tensor).__name__ for tensor in found} == {"LazyTensor"}


REFUSED = {
    "LayerNorm": (arch.bert, "LayerNorm"),
    "LayerNorm as an operator": (lambda p: arch.bert(p, fused=True), "LayerNorm"),
    "decoder with LayerNorm": (arch.cross_decoder, "LayerNorm"),
    "no norm at all": (arch.funnel, "no RMSNorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name, tmp_path):
    build, reason = REFUSED[name]
    with pytest.raises(RotationError, match=reason):
        rotate(load(build(tmp_path / "m.onnx")))


def another_reader(kind: str, value: str):
    """A builder of a decoder in which something else looks at a value."""

    def build(path: Path) -> Path:
        arch.decoder(path)
        model = onnx.load(path)
        model.graph.node.append(onnx.helper.make_node(kind, [value], ["extra"], name="odd"))
        model.graph.output.append(onnx.helper.make_tensor_value_info("extra", arch.F32, None))
        onnx.save(model, path)
        return path

    return build


@pytest.mark.parametrize("value", ["layer1.h1", "layer1.norm1", "layer1.norm1_unit"])
@pytest.mark.parametrize("kind", ["Tanh", "Identity"])
def test_a_reader_that_is_not_understood_is_named_and_nothing_is_changed(kind, value, tmp_path):
    path = another_reader(kind, value)(tmp_path / "m.onnx")
    model = load(path)
    names = set(model.ir.graph.initializers)
    with pytest.raises(RotationError, match="odd" if kind == "Tanh" else "extra"):
        rotate(model)
    assert set(model.ir.graph.initializers) == names
    save(model, tmp_path / "s.onnx", metadata={})
    assert_same(path, tmp_path / "s.onnx", arch.ragged(), bound=0)


SPEC = Spec(4, 32)


def error(model: Path, out: Path, recipe: Recipe, data) -> float:
    """Quantizes; gives the squared error of the outputs, as a share of their squares."""
    quantize(model, out, recipe, data)
    before, after = measure.run(model, data)["logits"], measure.run(out, data)["logits"]
    return float(np.square(after - before).sum() / np.square(before).sum())


def recipe(method: str = "gptq", **fields) -> Recipe:
    return Recipe(method, SPEC, accuracy_level=0, **fields)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory) -> Path:
    return sticking_out(zoo.language_model(tmp_path_factory.mktemp("outliers") / "m.onnx"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounding_costs_less_where_channels_stick_out(method, outliers, lm_data, tmp_path):
    plain = error(outliers, tmp_path / "p.onnx", recipe(method), lm_data)
    turned = error(outliers, tmp_path / "q.onnx", recipe(method, rotation=True), lm_data)
    assert turned < 0.8 * plain


def test_what_is_quantized_is_the_rotated_model(lm, lm_data, tmp_path):
    """The same codes as those of the rotated float model written first and then quantized without."""
    turned = rotated(lm, tmp_path / "r.onnx")
    quantize(turned, tmp_path / "a.onnx", recipe(), lm_data)
    quantize(lm, tmp_path / "b.onnx", recipe(rotation=True), lm_data)
    a, b = (measure.decoded(tmp_path / f"{name}.onnx") for name in "ab")
    assert a.keys() == b.keys()
    for name, w in a.items():
        np.testing.assert_array_equal(b[name], w)


@pytest.mark.parametrize("fields", [{"lm_head": True}, {"lm_head": False}], ids=["head", "no head"])
def test_tied_models(fields, tied_lm, lm_data, tmp_path):
    """The small matrices stay float, and the head is quantized or not as the recipe says."""
    quantize(tied_lm, tmp_path / "q.onnx", recipe(rotation=True, **fields), lm_data)
    low = measure.low_bit(tmp_path / "q.onnx")
    assert ("logits" in low) == fields["lm_head"]
    assert not any("rotat" in name for name in low)
    assert error(tied_lm, tmp_path / "q.onnx", recipe(rotation=True, **fields), lm_data) < 0.1


def test_attention_to_half_precision_and_options_that_add(tmp_path):
    model, data = arch.decoder(tmp_path / "m.onnx", dtype=arch.F16), arch.ragged(dtype=arch.F16)
    what = recipe(rotation=True, attention_weighted=True, bias_correction=True, lowrank=16)
    quantize(model, tmp_path / "q.onnx", what, data)
    before, after = (measure.run(path, data[:1])["logits"] for path in (model, tmp_path / "q.onnx"))
    assert np.linalg.norm(after - before) < 0.3 * np.linalg.norm(before)


def test_folding_still_goes_into_the_norms(lm, lm_data, tmp_path):
    report = quantize(lm, tmp_path / "q.onnx", recipe("awq", rotation=True), lm_data)
    assert {group.scaling for group in report.groups} >= {"norm"}


def test_little_memory_gives_the_same_bytes(lm, lm_data, tmp_path):
    for name, limit in (("a", None), ("b", 1_000_000_000)):
        quantize(lm, tmp_path / f"{name}.onnx", recipe(rotation=True), lm_data, max_memory=limit)
    assert len({(tmp_path / f"{name}.onnx.data").read_bytes() for name in "ab"}) == 1


def test_tuning_over_rotated_and_other_configurations(outliers, lm_data, tmp_path):
    """Each on its own statistics: the same models as alone."""
    configs = {"plain": recipe(), "turned": recipe(rotation=True), "head": recipe(rotation=True, lm_head=False)}
    found: dict[str, dict[str, np.ndarray]] = {}

    def judge(path: Path) -> float:
        found[Path(path).parent.name.split("-")[0]] = measure.decoded(path) if "-" in Path(path).parent.name else {}
        return 0.0

    tune(outliers, judge, lm_data, configs=configs, higher_is_better=False, objective="best", workdir=tmp_path / "w")
    for name, what in configs.items():
        quantize(outliers, tmp_path / "q.onnx", what, lm_data)
        alone = measure.decoded(tmp_path / "q.onnx")
        assert found[name].keys() == alone.keys()
        for linear, w in alone.items():
            np.testing.assert_array_equal(found[name][linear], w)


def test_a_model_that_cannot_be_rotated_is_refused_and_nothing_is_written(enc, tmp_path, cli):
    bert = arch.bert(tmp_path / "bert.onnx")
    result = cli("quantize", bert, "-o", tmp_path / "out", "--config", "RTN_G32ASYM", "--option", "rotation=true")
    assert result.exit_code == 2
    assert "LayerNorm" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8], ids=["shared codes", "codes of its own"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_with_low_bit_embeddings(method, bits, tied_lm, lm_data, tmp_path):
    """A table on the head's grid shares its codes, rotated or not; another one is rotated as it is put in."""
    what = recipe(method, embedding=Spec(bits, 32))
    report = quantize(tied_lm, tmp_path / "p.onnx", what, lm_data)
    turned = quantize(tied_lm, tmp_path / "q.onnx", replace(what, rotation=True), lm_data)
    assert [t.shared_with for t in turned.embeddings] == [t.shared_with for t in report.embeddings]
    plain, found = (error(tied_lm, tmp_path / "x.onnx", replace(what, rotation=r), lm_data) for r in (False, True))
    assert found < 1.3 * plain
    extra = turned.bytes_after - report.bytes_after
    assert extra < 2 * 4 * zoo.HIDDEN**2 + 4000 if bits == 4 else extra < 4000


def test_tuning_with_and_without_shared_codes(tied_lm, lm_data, tmp_path):
    configs = {"none": recipe(rotation=True), "shared": recipe(rotation=True, embedding=SPEC)}
    found: dict[str, dict[str, np.ndarray]] = {}

    def judge(path: Path) -> float:
        found[Path(path).parent.name.split("-")[0]] = measure.decoded(path) if "-" in Path(path).parent.name else {}
        return 0.0

    tune(tied_lm, judge, lm_data, configs=configs, higher_is_better=False, objective="best", workdir=tmp_path / "w")
    for name, what in configs.items():
        quantize(tied_lm, tmp_path / "q.onnx", what, lm_data)
        for linear, w in measure.decoded(tmp_path / "q.onnx").items():
            np.testing.assert_array_equal(found[name][linear], w)


def test_a_weight_that_two_norms_would_turn_into_two_is_refused(tmp_path):
    net = arch.Layers()
    h, w = "x", net.const("both.weight", zoo.weight(1, arch.D, arch.D))
    for layer in range(2):
        x = net.rms_norm(h, f"norm{layer}")
        h = net.op("Add", h, net.op("MatMul", x, w, out=f"product{layer}"), out=f"h{layer}")
    net.const("norm1.gamma", np.ones(arch.D))
    next(t for t in net.tensors if t.name == "norm1.gamma").CopyFrom(
        numpy_helper.from_array(np.linspace(2, 3, arch.D).astype(np.float32), "norm1.gamma")
    )
    net.linear(net.rms_norm(h, "final"), "y", arch.D, 48, 9)
    path = net.save(tmp_path / "m.onnx", {"x": (arch.F32, ["b", "s", arch.D])}, {"y": (arch.F32, ["b", "s", 48])})
    with pytest.raises(RotationError, match="would have to become two"):
        rotate(load(path))


def test_a_mix_of_rotated_weights_is_predicted_and_measured_alike(tied_lm, lm_data, tmp_path):
    """Its losses are those of the rotated weights on the rotated stream, its bytes those of the file."""
    data = [*lm_data, *zoo.lm_feeds(zoo.token_ids(8, seed=5))]
    result = tune(tied_lm, None, data, configs={"m": recipe(rotation=True)}, workdir=tmp_path / "w",
                  objective="pareto", points=4, output=tmp_path / "m.onnx")  # fmt: skip
    mixes = [point for point in result.frontier if point.name and point.kind == "mix"]
    assert len(mixes) == 4
    assert max(abs(np.log(point.predicted / point.measured)) for point in mixes) < np.log(3)
    assert result.best.recipe.rotation
    size = sum(file.stat().st_size for file in tmp_path.glob("m.onnx*"))
    assert abs(size - result.best.bytes) < 2000


def test_both_streams_are_left_out_of_the_statistics_of_a_mix(lm, lm_data, tmp_path):
    what = recipe(rotation=True, both_streams=True)
    result = tune(lm, None, lm_data, configs={"m": what}, workdir=tmp_path / "w", target_bpw=4.2)
    assert result.best.recipe.asymmetric_calibration
    assert result.best.recipe.rotation


def odd_forms(path: Path) -> Path:
    """Gemm of every form, biases, a scaled embedding, norms by Reciprocal, by ReduceL2 and as operators."""
    net = arch.Layers(opset=23)
    d, wide = arch.D, arch.WIDE
    rng = np.random.default_rng(0)
    const = lambda name, *shape: net.const(name, rng.normal(size=shape).astype(np.float32) / 8)  # noqa: E731
    h = net.op("Mul", net.op("Gather", const("table", 50, d), "ids", out="rows"), net.const("times", 8.0), out="h")
    h = net.op("Add", const("start", 1, d), h, out="shifted")
    size = net.op("Sqrt", net.mean(net.op("Mul", h, h, out="hh"), "hh_mean"), out="size")
    x = net.op("Mul", net.op("Reciprocal", size, out="inverse"), h, out="unit")
    x = net.op("Mul", net.gamma("one"), x, out="x")
    a = net.op("Gemm", x, const("a", wide, d), const("a_bias", wide), out="a_out", transB=1, alpha=0.5)
    b = net.op("Gemm", net.op("Tanh", a, out="a_on"), const("b", d, wide), const("b_bias", d), out="b_out", transB=1)
    h = net.op("Add", h, b, out="h1")
    length = net.op("ReduceL2", h, net.ints(-1), out="length", keepdims=1)
    x = net.op("Identity", net.op("Mul", net.op("Div", h, length, out="u2"), net.gamma("two"), out="x2"), out="x2_same")
    c = net.op("Gemm", x, const("c", d, d), const("c_bias", 1, d), out="c_out", alpha=-1.5, beta=0.25)
    h = net.op("Add", h, c, out="h2")
    x = net.op("RMSNormalization", h, net.gamma("three"), out="x3", axis=-1)
    e = net.op("Add", net.op("MatMul", x, const("e", 1, 1, d, d), out="e_out4"), const("e_bias", d), out="e_out")
    h = net.op("Add", net.op("Reshape", e, net.ints(-1, d), out="e_flat"), net.op("Neg", h, out="minus"), out="refused")
    net.op("MatMul", net.op("RMSNormalization", h, net.gamma("last"), out="x4"), const("f", d, 20), out="y")
    inputs, outputs = {"ids": (arch.I64, ["n"])}, {"y": (arch.F32, None)}
    return net.save(path, inputs, outputs, opset=23, check=False)


def test_what_only_some_exporters_write(tmp_path):
    """As far as Reshape and Neg, for which there is no rule; without them the outputs are the same."""
    path = odd_forms(tmp_path / "m.onnx")
    with pytest.raises(RotationError, match=r"Neg|Reshape"):
        rotate(load(path))
    model = onnx.load(path)
    nodes = {node.output[0]: node for node in model.graph.node}
    nodes["refused"].input[:] = ["e_out4d", "h2"]
    nodes["e_out4"].input[1], nodes["e_out"].output[0] = "e_flat_weight", "e_out4d"
    model.graph.node.remove(nodes["e_flat"])
    model.graph.node.remove(nodes["minus"])
    four = next(t for t in model.graph.initializer if t.name == "e")
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(four)[0, 0], "e_flat_weight"))
    onnx.save(model, path)
    assert_same(path, rotated(path, tmp_path / "r.onnx"), [{"ids": np.arange(50)}])
    touched = {"table", "start", "a", "b", "b_bias", "c", "c_bias", "e_flat_weight", "e_bias", "f"}
    names = {tensor.name for tensor in onnx.load(tmp_path / "r.onnx").graph.initializer}
    assert {f"{name}_rotated" for name in touched} <= names


def test_a_norm_by_the_length_of_something_else_is_refused(tmp_path):
    net = arch.Layers()
    h = net.op("Add", "x", net.gated(net.rms_norm("x", "norm"), "layer.", 1), out="h")
    other = net.op("Sqrt", net.mean(net.op("Mul", "z", "z", out="zz"), "z_mean"), out="z_size")
    h = net.op("Mul", h, other, out="scaled")
    net.linear(net.rms_norm(h, "final"), "y", arch.D, 48, 9)
    shapes = {name: (arch.F32, ["b", "s", arch.D]) for name in "xz"}
    path = net.save(tmp_path / "m.onnx", shapes, {"y": (arch.F32, ["b", "s", 48])})
    with pytest.raises(RotationError, match="length of something else"):
        rotate(load(path))


def test_squares_are_for_lengths_alone(tmp_path):
    path = another_reader("Tanh", "layer1.norm1_square")(tmp_path / "m.onnx")
    with pytest.raises(RotationError, match=r"Pow .*layer1\.norm1_square"):
        rotate(load(path))
