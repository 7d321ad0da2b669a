"""Sessions of models in memory compute what the file would, with the weights left where they are."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_woq.errors import DataError, MemoryLimit, ModelError, RecipeError
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime import session as module
from onnx_woq.runtime.session import make_session
from tests.zoo.chains import K, chain
from tests.zoo.nodes import BOOL, graph, lower, lower_group, node, random, rtn, run, value, write

FEED = {"x": random(2, 7, K)}


def outputs(source, **options):
    return make_session(source, **options).run(None, FEED)


@pytest.mark.parametrize("for_calibration", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_file_and_model_agree(external, for_calibration, tmp_path):
    path = chain(tmp_path / "m.onnx", external=external)
    (expected,) = run(path, FEED)
    for source in (path, str(path), load(path)):
        np.testing.assert_allclose(outputs(source, for_calibration=for_calibration)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("external", [False, True])
def test_behind_links_like_those_of_the_hugging_face_cache(external, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = chain(tmp_path / "m.onnx", external=external)
    (expected,) = run(path, FEED)
    for i, file in enumerate(sorted(tmp_path.glob("m.onnx*"))):
        file.rename(tmp_path / "blobs" / f"blob{i}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/blob{i}")
    named = tmp_path / "snapshot" / "m.onnx"
    for source in (named, load(named)):
        assert np.array_equal(outputs(source)[0], expected)


def test_changed_tensors_and_low_bit_weights(tmp_path):
    path = chain(tmp_path / "m.onnx", external=True)
    model = load(path)
    gamma = model.ir.graph.initializers["g2"]
    gamma.const_value = ir.Tensor(gamma.const_value.numpy() * 2, name="g2")
    groups, _ = find_linear_groups(model, Recipe())
    for group in groups[:2]:
        lower_group(model, group, rtn(group), accuracy_level=0)
    assert not np.allclose(outputs(model)[0], run(path, FEED)[0], rtol=1e-3)
    assert np.array_equal(outputs(model)[0], run(model, FEED)[0])
    assert np.allclose(outputs(model, for_calibration=True)[0], outputs(model)[0], rtol=1e-4, atol=1e-4)


def test_weights_in_bodies(tmp_path):
    body = graph([node("MatMul", ["x", "A"], ["a"])], [], [value("a", ("b", "t", K))], {"A": random(K, K)}, name="then")
    other = graph([node("MatMul", ["x", "B"], ["o"])], [], [value("o", ("b", "t", K))], {"B": random(K, K, seed=1)})
    main = graph(
        [node("If", ["flag"], ["y"], then_branch=body, else_branch=other)],
        [value("flag", (), BOOL), value("x", ("b", "t", K))],
        [value("y", ("b", "t", K))],
    )
    path = write(tmp_path / "m.onnx", main)
    for flag in (True, False):
        feed = FEED | {"flag": np.array(flag)}
        assert np.array_equal(make_session(load(path)).run(None, feed)[0], run(path, feed)[0])
    model = load(path)
    _, (q,), _ = lower(model)
    (y,) = make_session(model, for_calibration=True).run(None, FEED | {"flag": np.array(True)})
    halves = np.split(q.dequantize(), 2, axis=1)
    then = min(halves, key=lambda half: np.abs(half - random(K, K)).max())
    np.testing.assert_allclose(y, FEED["x"] @ then, rtol=1e-3, atol=1e-4)


def test_a_calibration_session_makes_no_copy_of_the_weights(tmp_path):
    """Private memory grows by far less than the weights take, in the file or beside it."""
    weights = {f"W{i}": random(1024, 1024, seed=i) for i in range(8)}  # 4 MB each
    nodes = [node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(8)]
    main = graph(nodes, [value("x0", ("t", 1024))], [value("x8", ("t", 1024))], weights)
    for external in (False, True):
        model = load(write(tmp_path / f"{external}.onnx", main, external=external))
        before = private_bytes()
        session = make_session(model, for_calibration=True)
        session.run(None, {"x0": random(4, 1024)})
        assert private_bytes() - before < 8 << 20


def private_bytes():
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        pytest.skip("needs /proc")
    return int(status.split("RssAnon:")[1].split()[0]) << 10


@pytest.mark.parametrize("content", [b"", b"no model" * 9])
def test_files_that_cannot_be_run(content, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx cannot be run: \w"):
        make_session(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"none\.onnx cannot be run"):
        make_session(tmp_path / "none.onnx")


def test_messages_are_readable(tmp_path, capfd):
    path = chain(tmp_path / "m.onnx", external=True)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError) as caught:
        make_session(path)
    assert "m.onnx.data" in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert ".cc:" not in str(caught.value)
    assert "\n" not in str(caught.value)
    session = make_session(chain(tmp_path / "n.onnx"))
    with pytest.raises(DataError, match=r"on sample 3 \(x \[2, 7, 5\]\)"):
        module.run(session, None, {"x": random(2, 7, 5)}, "sample 3")
    assert capfd.readouterr() == ("", ""), "what is raised is not also printed"


def test_an_operator_the_runtime_does_not_know(tmp_path):
    main = graph([node("Nonsense", ["x"], ["y"])], [value("x", (3,))], [value("y", (3,))])
    proto = onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="Nonsense"):
        make_session(tmp_path / "m.onnx")


def test_threads(tmp_path, monkeypatch):
    path = chain(tmp_path / "m.onnx")
    count = lambda **options: make_session(path, **options).get_session_options().intra_op_num_threads  # noqa: E731
    monkeypatch.delenv(module.THREADS_VARIABLE, raising=False)
    assert count(threads=3) == 3
    monkeypatch.setenv(module.THREADS_VARIABLE, "2")
    assert count() == 2
    assert count(threads=1) == 1
    monkeypatch.setenv(module.THREADS_VARIABLE, "many")
    with pytest.raises(ModelError, match=module.THREADS_VARIABLE):
        count()
    monkeypatch.delenv(module.THREADS_VARIABLE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert count() == 1, "a process pinned to one core"


def test_the_models_folder_is_left_alone(tmp_path):
    path = chain(tmp_path / "m.onnx")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    outputs(load(path), for_calibration=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_a_session_keeps_the_arrays_it_reads(tmp_path, monkeypatch):
    """A tensor that is not contiguous is handed over as a copy, which nothing but the session keeps alive."""
    weight = random(K, K)
    main = graph([node("MatMul", ["x", "W"], ["y"])], [value("x", ("b", "t", K))], [value("y")], {"W": weight})
    model = load(write(tmp_path / "m.onnx", main))
    model.ir.graph.initializers["W"].const_value = ir.Tensor(np.asfortranarray(weight), name="W")
    borrowed = []
    hand_over = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    monkeypatch.setattr(
        ort.OrtValue,
        "ortvalue_from_numpy_with_onnx_type",
        lambda array, kind: (borrowed.append(weakref.ref(array)), hand_over(array, kind))[1],
    )
    session = make_session(model, for_calibration=True)
    gc.collect()
    assert [array() is not None for array in borrowed] == [True]
    np.testing.assert_allclose(session.run(None, FEED)[0], FEED["x"] @ weight, rtol=1e-4, atol=1e-4)


def test_why_a_model_is_not_opened(tmp_path):
    path = chain(tmp_path / "m.onnx", external=True)
    assert module.why_not_opened(path) == ""
    assert module.why_not_opened(load(path)) == ""
    other = write(tmp_path / "n.onnx", graph([node("Nonesuch", ["x"], ["y"])], [value("x", [1])], [value("y", [1])]))
    assert "Nonesuch" in module.why_not_opened(other)
    assert "n.onnx" in module.why_not_opened(load(other))
    assert "missing.onnx" in module.why_not_opened(tmp_path / "missing.onnx")


def test_opening_leaves_the_weights_in_their_files(tmp_path, monkeypatch):
    """Neither optimized nor rearranged, since either may copy every weight."""
    given = []

    def remembered(content, options, **_):
        given.append(options)
        raise RuntimeError("no")

    monkeypatch.setattr(ort, "InferenceSession", remembered)
    assert "no" in module.why_not_opened(chain(tmp_path / "m.onnx"))
    assert given[0].graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert given[1].graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "some open only so"
    assert {one.get_session_config_entry("session.disable_prepacking") for one in given} == {"1"}


def fails(model, other="", *, error):
    raise error


@pytest.mark.parametrize("argument", ["model", "other"])
def test_what_is_raised_on_an_invalid_model_is_blamed_on_it(argument, tmp_path):
    sane = chain(tmp_path / "m.onnx")
    main = graph([node("Add", ["x", "ghost"], ["y"])], [value("x", [1])], [value("y", [1])])
    invalid = write(tmp_path / "invalid.onnx", main)
    guarded = module.blames_models("model", "other")(fails)
    models = {"model": sane, "other": sane, argument: invalid}
    with pytest.raises(ModelError, match=r"invalid\.onnx.*ghost.*KeyError: 'k'"):
        guarded(**models, error=KeyError("k"))
    with pytest.raises(ModelError, match="ghost"):
        guarded(**models, error=DataError("samples of another shape"))
    with pytest.raises(RecipeError, match="as it is"):
        guarded(**models, error=RecipeError("as it is"))
    with pytest.raises(KeyboardInterrupt):
        guarded(**models, error=KeyboardInterrupt())


@pytest.mark.parametrize("domain", ["", "elsewhere"])
def test_a_fault_of_the_package_stays_one(domain, tmp_path):
    """On a model that opens, and on one with an operator that only other runtimes have."""
    operator = node("Nonesuch" if domain else "Relu", ["x"], ["y"], domain=domain)
    main = graph([operator], [value("x", [1])], [value("y", [1])])
    path = write(tmp_path / "m.onnx", main, domains={"elsewhere": 1})
    guarded = module.blames_models("model", "other")(fails)
    with pytest.raises(KeyError):
        guarded(path, path, error=KeyError("k"))
    with pytest.raises(MemoryLimit, match=r"too little memory.*715 GiB"):
        guarded(path, path, error=MemoryError("715 GiB"))


def test_a_guarded_function_is_still_itself(tmp_path):
    assert module.blames_models("model")(fails).__name__ == "fails"
    assert module.blames_models("model")(len)([1, 2]) == 2
