"""Embeddings in low bits: what is read is what is stored, once where a head is tied, and no float copy is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_woq import Recipe, Spec, inspect, quantize, tune
from onnx_woq.errors import RecipeError
from tests.acceptance.resume.test_resume import stopped
from tests.support import measure
from tests.zoo import architectures as arch
from tests.zoo import small as zoo

TABLE = zoo.VOCAB * zoo.HIDDEN * 4
METHODS = ("rtn", "gptq", "awq", "teq")
FOUR, EIGHT = Spec(4, 32), Spec(8, 32)


def rows_read(path: Path, name: str = "tokens") -> np.ndarray:
    """The whole table [V, D] as the Gather of a quantized model gives it."""
    ids = np.arange(zoo.VOCAB).reshape(-1, zoo.LONGEST)
    return measure.run(measure.exposed(path, [name]), zoo.lm_feeds(list(ids[:, None])))[name]


def untied(tied: Path, path: Path) -> Path:
    """The same function, with a head of its own."""
    model = onnx.load(tied)
    table = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "embedding")
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(table.T), "own_head"))
    next(node for node in model.graph.node if "head" in node.input).input[1] = "own_head"
    model.graph.node.remove(next(node for node in model.graph.node if "head" in node.output))
    onnx.save(model, path)
    return path


def floats(path: Path) -> dict[str, int]:
    """Bytes of the matrices that are float."""
    model = onnx.load(path)
    return {
        t.name: array.nbytes
        for t in model.graph.initializer
        if (array := numpy_helper.to_array(t)).dtype.kind == "f" and array.ndim == 2 and "_scales" not in t.name
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_head_lends_its_codes(method, tied_lm, lm_data, tmp_path):
    recipe = Recipe(method, FOUR, embedding=FOUR, accuracy_level=0)
    report = quantize(tied_lm, tmp_path / "q.onnx", recipe, lm_data)
    plain = quantize(tied_lm, tmp_path / "plain.onnx", Recipe(method, FOUR, accuracy_level=0), lm_data)
    assert (report.copies, plain.copies) == ({}, {"embedding": TABLE})
    (row,) = report.embeddings
    assert (row.shared_with, row.bytes_before, row.bytes_after, row.spec) == ("logits", 0, 0, FOUR)
    assert plain.bytes_after - report.bytes_after > 0.97 * TABLE
    assert "embedding" not in floats(tmp_path / "q.onnx")
    head = measure.decoded(tmp_path / "q.onnx")["logits"]
    np.testing.assert_array_equal(head, measure.decoded(tmp_path / "plain.onnx")["logits"])
    rows = rows_read(tmp_path / "q.onnx").reshape(zoo.VOCAB, zoo.HIDDEN)
    if method in ("awq", "teq"):  # the head's codes are those of a scaled weight
        scale = np.sum(rows * head.T, axis=0) / np.sum(head.T**2, axis=0)
        np.testing.assert_allclose(rows, head.T * scale, rtol=1e-5)
    else:
        np.testing.assert_array_equal(rows, head.T.astype(np.float32))
    was = onnx.load(tied_lm)
    table = next(numpy_helper.to_array(t) for t in was.graph.initializer if t.name == "embedding")
    assert measure.sqnr(table, rows) > 15
    before, after = measure.run(tied_lm, lm_data)["logits"], measure.run(tmp_path / "q.onnx", lm_data)["logits"]
    assert measure.sqnr(before, after) > 8


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_head_lends_codes_that_are_expanded_and_scales_that_are_cast(bits, symmetric, method, lm_data, tmp_path):
    """Both are, once the model is loaded, what those are that are stored as kernels read them."""
    source = zoo.language_model(tmp_path / "m.onnx", tied=True, opset=18)
    grid = Spec(bits, 32, symmetric)
    recipe = Recipe(method, grid, embedding=grid, half_scales=True, accuracy_level=0, true_sequential=method == "awq")
    report = quantize(source, tmp_path / "q.onnx", recipe, lm_data)
    assert report.embeddings[0].shared_with == "logits"
    onnx.checker.check_model(tmp_path / "q.onnx", full_check=True)
    head = measure.decoded(tmp_path / "q.onnx")["logits"]
    rows = rows_read(tmp_path / "q.onnx").reshape(zoo.VOCAB, zoo.HIDDEN)
    scale = np.sum(rows * head.T, axis=0) / np.sum(head.T**2, axis=0)
    np.testing.assert_allclose(rows, head.T * scale, rtol=1e-5)
    assert method == "awq" or np.array_equal(scale, np.ones(zoo.HIDDEN))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tied_and_untied_compute_the_same(bits, symmetric, tied_lm, tmp_path, lm_data):
    """Rounding to nearest gives head and table the same codes, stored once or twice."""
    spec = Spec(bits, 32, symmetric)
    recipe = Recipe("rtn", spec, embedding=spec)
    once = quantize(tied_lm, tmp_path / "once.onnx", recipe)
    twice = quantize(untied(tied_lm, tmp_path / "untied.onnx"), tmp_path / "twice.onnx", recipe)
    assert [row.shared_with for row in (*once.embeddings, *twice.embeddings)] == ["logits", ""]
    one, other = (measure.run(tmp_path / f"{name}.onnx", lm_data)["logits"] for name in ("once", "twice"))
    np.testing.assert_array_equal(one, other)
    codes = twice.embeddings[0].bytes_after
    assert abs(twice.bytes_after - once.bytes_after - codes) < 1024  # names, and where they are aligned


@pytest.mark.parametrize("method", METHODS)
def test_another_grid_than_the_heads(method, tied_lm, lm_data, tmp_path):
    recipe = Recipe(method, FOUR, embedding=EIGHT, accuracy_level=0)
    report = quantize(tied_lm, tmp_path / "q.onnx", recipe, lm_data)
    (row,) = report.embeddings
    assert (report.copies, row.shared_with, row.bytes_before) == ({}, "", 0)
    assert row.bytes_after == zoo.VOCAB * (zoo.HIDDEN + zoo.HIDDEN // 32 * 5)
    was = onnx.load(tied_lm)
    table = next(numpy_helper.to_array(t) for t in was.graph.initializer if t.name == "embedding")
    assert measure.sqnr(table, rows_read(tmp_path / "q.onnx").reshape(table.shape)) > 40
    plain = Recipe(method, FOUR, accuracy_level=0)
    quantize(tied_lm, tmp_path / "plain.onnx", plain, lm_data)
    one, other = (measure.run(tmp_path / f"{name}.onnx", lm_data)["logits"] for name in ("plain", "q"))
    assert measure.sqnr(one, other) > 33  # 8 bits of an embedding are next to nothing


def test_the_clip_search_serves_tables(tied_lm, lm_data, tmp_path):
    """Rows are looked up, so GPTQ is not for them; what is, leaves less of the error than plain rounding."""
    was = onnx.load(tied_lm)
    table = next(numpy_helper.to_array(t) for t in was.graph.initializer if t.name == "embedding")
    found = {}
    for method in ("rtn", "gptq"):
        recipe = Recipe(method, FOUR, embedding=Spec(2, 32), accuracy_level=0)
        quantize(tied_lm, tmp_path / f"{method}.onnx", recipe, lm_data)
        found[method] = measure.sqnr(table, rows_read(tmp_path / f"{method}.onnx").reshape(table.shape))
    assert found["gptq"] > found["rtn"] + 0.5


@pytest.mark.parametrize(("tied", "embedding"), [(True, FOUR), (True, EIGHT), (False, FOUR), (True, None)])
def test_inspect_says_what_becomes_of_it(tied, embedding, lm, tied_lm, tmp_path):
    model = tied_lm if tied else lm
    recipe = Recipe(embedding=embedding)
    found, done = inspect(model, recipe), quantize(model, tmp_path / "q.onnx", recipe)
    assert found.embeddings == done.embeddings
    assert found.copies == done.copies == ({"embedding": TABLE} if embedding is None else {})
    assert [s for s in found.skipped if s.op_type == "Gather"] == [s for s in done.skipped if s.op_type == "Gather"]
    assert found.bytes_before - found.bytes_after == pytest.approx(done.bytes_before - done.bytes_after, rel=0.05)
    json.dumps(found.to_dict()), json.dumps(done.to_dict())


@pytest.mark.parametrize("half_scales", [False, True])
def test_inspect_foretells_the_file_of_three_bits(half_scales, tmp_path):
    """Codes without gaps, of a table as of a head; its rows are what the same codes give in four bits."""
    rows = {}
    for opset in (17, 18):
        model = zoo.language_model(tmp_path / f"{opset}.onnx", tied=True, opset=opset)
        recipe, out = Recipe(spec=FOUR, embedding=Spec(3, 32), half_scales=half_scales), tmp_path / f"q{opset}.onnx"
        found, done = inspect(model, recipe), quantize(model, out, recipe)
        assert found.bytes_after == pytest.approx(done.bytes_after, rel=0.01)
        (row,) = done.embeddings
        assert row.bytes_after == zoo.VOCAB * (zoo.HIDDEN * (3 if opset == 18 else 4) // 8 + (5 if half_scales else 9))
        rows[opset] = rows_read(out)
    np.testing.assert_array_equal(rows[17], rows[18])


def test_what_stays_float_and_why(cli, tied_lm, tmp_path):
    shown = cli.ok("inspect", tied_lm).stdout
    assert "an embedding, left float without --embedding-bits" in shown
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"lm_head": False, "embedding": {"bits": 4}}))
    shown = cli.ok("inspect", tied_lm, "--recipe", recipe).stdout
    assert "MatMul 'node/logits', which stays float, reads the table as well" in shown
    assert "those of logits" in cli.ok("inspect", tied_lm, "--embedding-bits", 4).stdout
    assert "its own" in cli.ok("inspect", tied_lm, "--embedding-bits", 8).stdout


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ([], None),
        (["--embedding-bits", "8"], Spec(8, 32)),
        (["--embedding-bits", "4", "--embedding-group", "64"], Spec(4, 64)),
        (["--embedding-group", "64", "--bits", "8"], Spec(8, 64)),
        (["--embedding-bits", "2", "--scheme", "sym"], Spec(2, 32, True)),
        (["--embedding-bits", "4", "--config", "GPTQ_G128ASYM"], Spec(4, 128)),
        (["--recipe", "r.json"], Spec(3, 64, True)),
        (["--recipe", "r.toml", "--embedding-bits", "8"], Spec(8, 64, True)),
    ],
)
def test_flags_and_files_say_the_grid(flags, spec, cli, tied_lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(json.dumps({"embedding": {"bits": 3, "group_size": 64, "symmetric": True}}))
    Path("r.toml").write_text("[embedding]\nbits = 3\ngroup_size = 64\nsymmetric = true\n")
    found = cli.json("inspect", tied_lm, *flags)["embeddings"]
    assert [Spec(**row["spec"]) for row in found] == ([spec] if spec else [])


def test_a_recipe_with_an_embedding_survives_json():
    recipe = Recipe(embedding=Spec(8, 64, True))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.fingerprint() != Recipe().fingerprint()
    with pytest.raises(RecipeError, match="embedding=4 must be a Spec"):
        Recipe(embedding=4)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"unknown embedding field 'bit': .*bits"):
        Recipe.from_dict({"embedding": {"bit": 4}})


def test_bad_grids_are_bad_input(cli, tied_lm, tmp_path):
    result = cli("quantize", tied_lm, "-o", tmp_path / "q.onnx", "--embedding-bits", 9)
    assert (result.exit_code, "bits=9 is out of range" in result.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("embedding", [FOUR, EIGHT])
@pytest.mark.parametrize("unit", ["off", "tap"])
@pytest.mark.slow
def test_interrupted_again_and_again(unit, embedding, tied_lm, lm_data, tmp_path):
    recipe = Recipe("gptq", FOUR, embedding=embedding, true_sequential=unit == "tap")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    quantize(tied_lm, tmp_path / "a" / "q.onnx", recipe, lm_data)
    interrupts = 0
    for at in range(3, 200, 3):
        try:
            quantize(tied_lm, tmp_path / "b" / "q.onnx", recipe, lm_data, resume=True, progress=stopped(at))
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 2
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "a")


def test_a_table_that_was_finished_is_not_solved_again(tied_lm, lm_data, tmp_path, monkeypatch):
    from onnx_woq.engine import execute as making

    recipe = Recipe("gptq", FOUR, embedding=EIGHT)
    (tmp_path / "a").mkdir()
    quantize(tied_lm, tmp_path / "a" / "q.onnx", recipe, lm_data)
    (tmp_path / "b").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(making, "write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize(tied_lm, tmp_path / "b" / "q.onnx", recipe, lm_data)
    from onnx_woq.engine import schedule

    monkeypatch.setattr(schedule, "solve_task", lambda *_: pytest.fail("solved again"))
    quantize(tied_lm, tmp_path / "b" / "q.onnx", recipe, lm_data, resume=True)
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "a")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_same_bytes_wherever_it_is_solved(method, tied_lm, lm_data, tmp_path, processes, monkeypatch):
    from onnx_woq.engine import solve as solving

    recipe = Recipe(method, FOUR, embedding=EIGHT)
    for name in ("here", "there", "pieces"):
        (tmp_path / name).mkdir()
    quantize(tied_lm, tmp_path / "here" / "q.onnx", recipe, lm_data)
    quantize(tied_lm, tmp_path / "there" / "q.onnx", recipe, lm_data, executor=processes)
    assert measure.listing(tmp_path / "there") == measure.listing(tmp_path / "here")
    if method == "gptq":  # sums of the clip search depend on how much is searched at once
        return
    monkeypatch.setattr(solving, "PIECE", 1000)  # odd numbers of columns
    quantize(tied_lm, tmp_path / "pieces" / "q.onnx", recipe, lm_data)
    assert measure.listing(tmp_path / "pieces") == measure.listing(tmp_path / "here")


def test_tuned_models_have_the_same_bytes(tied_lm, lm_data, tmp_path):
    recipes = {f"{m}": Recipe(m, FOUR, embedding=spec) for m, spec in (("rtn", FOUR), ("gptq", EIGHT))}
    found = tune(tied_lm, lambda path: path.stat().st_size, lm_data, configs=recipes, objective="best",
                 higher_is_better=True, output=tmp_path / "best.onnx", workdir=tmp_path / "w")  # fmt: skip
    assert [trial.status for trial in found.trials] == ["ok", "ok"]
    quantize(tied_lm, tmp_path / "q.onnx", found.best.recipe, lm_data)
    assert measure.digest(tmp_path / "q.onnx.data") == measure.digest(Path(f"{found.best.path}.data"))


def test_both_branches_of_a_merged_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr("onnx_woq.graph.find.embeddings.SMALLEST_TABLE", 1 << 10)
    model = arch.merged_decoder(tmp_path / "m.onnx")
    report = quantize(model, tmp_path / "q.onnx", Recipe("rtn", EIGHT, embedding=EIGHT, accuracy_level=0))
    (row,) = report.embeddings
    assert len(row.gathers) == 2
    data = arch.ragged("merged", layers=3)
    assert {bool(feed["use_cache_branch"]) for feed in data} == {False, True}
    before, after = measure.run(model, data), measure.run(tmp_path / "q.onnx", data)
    assert all(measure.sqnr(value, after[name]) > 30 for name, value in before.items())
    gathers = [n for n in measure.nodes(onnx.load(tmp_path / "q.onnx")) if n.op_type == "GatherBlockQuantized"]
    assert len({tuple(n.input[i] for i in (0, 2, 3)) for n in gathers}) == 1


def test_a_large_table_takes_memory_for_its_codes_and_for_pieces(tied_lm):
    from onnx_woq.engine.memory import task_bytes
    from onnx_woq.engine.plan import make_plan
    from onnx_woq.graph.io.model import load

    recipe = Recipe(embedding=FOUR)
    (small,) = make_plan(load(tied_lm), recipe).embeddings
    taken = {}
    for rows in (100_000, 10_000_000):
        table = replace(small, source=replace(small.source, n=rows, weight_bytes=4 * rows * small.k))
        taken[rows] = task_bytes(table, recipe, 2) - table.own_bytes
        assert task_bytes(table, recipe, 1) < task_bytes(table, recipe, 2) or rows == 100_000
    assert taken[10_000_000] < 4 * taken[100_000] < 10_000_000 * small.k


def test_the_metadata_says_the_oldest_runtime(tied_lm, tmp_path):
    oldest = {}
    for bits in (2, 4):
        quantize(tied_lm, tmp_path / f"{bits}.onnx", Recipe(spec=Spec(4), embedding=Spec(bits)))
        model = onnx.load(tmp_path / f"{bits}.onnx")
        oldest[bits] = {p.key: p.value for p in model.metadata_props}["onnx_woq.minimum_onnxruntime"]
    assert oldest == {2: "1.27", 4: "1.23"}
