"""What is solved is what the model computes with afterwards, and an empty solution tells how large it will be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.apply import apply_solution, final_metadata, planned_file_bytes
from onnx_woq.engine.metadata import LAYERS, RUNTIME, metadata
from onnx_woq.engine.plan import prepared_plan
from onnx_woq.engine.solve import Solved
from onnx_woq.graph.io.model import load, serialize
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.session import make_session
from tests.zoo import small as zoo
from tests.zoo.codes import rounded

X = zoo.correlated(3, 5, zoo.HIDDEN)[None]


def outputs(model, feeds):
    return make_session(model, for_calibration=True).run(None, feeds)[0]


def solved(weight, *, scale=None, error=None):
    """A weight rounded to nearest, after its rows were multiplied by `scale`."""
    parts = [np.asarray(part.read(), np.float32) for part in weight.weight_sources()]
    parts = parts if scale is None else [part * scale[:, None] for part in parts]
    packed = tuple(weight.operator.pack(rounded(part, weight.spec), weight.storage) for part in parts)
    return Solved(packed, input_scale=scale, error=error)


@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
def test_the_model_computes_with_what_was_solved(target, enc):
    """At 8 bits nearly what it did; one weight after the other, and each has its row."""
    plan = prepared_plan(load(enc), Recipe(spec=Spec(8, 32), target=target, accuracy_level=0))
    want = outputs(load(enc), {"x": X})
    for weight in plan.solved:
        foretold = weight.report(0.5)
        assert apply_solution(plan, weight, solved(weight, error=0.5)) == foretold
    got = outputs(plan.model, {"x": X})
    assert 0 < np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(("options", "where"), [({}, {"mul", "norm"}), ({"folding": True}, {"norm"})])
def test_an_input_scale_goes_where_it_can_and_is_named(options, where, enc):
    """By powers of two nothing is rounded otherwise: with a scale or without, the outputs are the same."""
    recipe = Recipe("awq", Spec(8, 32), options=options, accuracy_level=0)
    scaled, plain = prepared_plan(load(enc), recipe), prepared_plan(load(enc), recipe)
    found = set()
    for weight, twin in zip(scaled.solved, plain.solved, strict=True):
        scale = np.full(weight.k, 4, np.float32)
        behind_a_norm = weight.source.values == ("norm",)
        row = apply_solution(scaled, weight, solved(weight, scale=scale if behind_a_norm or not options else None))
        assert apply_solution(plain, twin, solved(twin)).scaling == ""
        found.add(row.scaling)
        assert not behind_a_norm or row.scaling == "norm"
    assert found - {"", "linear"} == where
    np.testing.assert_allclose(*(outputs(plan.model, {"x": X}) for plan in (scaled, plain)), rtol=1e-4, atol=1e-5)


def test_a_table_on_the_grid_of_its_head_reads_the_codes_of_its_head(tied_lm, lm_data):
    plan = prepared_plan(load(tied_lm), Recipe(spec=Spec(8, 32), embedding=Spec(8, 32), accuracy_level=0))
    assert any(plan.borrowers(weight) for weight in plan.groups)
    for weight in plan.solved:
        apply_solution(plan, weight, solved(weight))
    assert "embedding" not in plan.model.ir.graph.initializers
    got, want = (outputs(model, lm_data[0]) for model in (plan.model, load(tied_lm)))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_the_last_metadata_speaks_of_linear_layers_and_the_runtime(tied_lm):
    plan = prepared_plan(load(tied_lm), Recipe(spec=Spec(2, 32), embedding=Spec(8, 64)))
    rows = [apply_solution(plan, weight, solved(weight)) for weight in plan.solved]
    said = final_metadata(plan.model, rows)
    assert [row["name"] for row in json.loads(said[LAYERS])] == [weight.name for weight in plan.groups]
    assert len(rows) > len(plan.groups)
    assert said[RUNTIME] == "1.24", "2 bits"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(spec=Spec(5, 32)),
        Recipe(target="qdq", embedding=Spec(8, 32)),
        Recipe("gptq", bias_correction=True, lowrank=16),
    ],
    ids=["5 bits", "qdq", "what is added"],
)
def test_bytes_of_the_files_are_known_before_anything_is_solved(recipe, tmp_path):
    """To the byte where numbers in the metadata have as many digits as those that are foretold."""
    path = zoo.language_model(tmp_path / "m.onnx", opset=21)
    source, out = load(path), tmp_path / "q.onnx"
    before = serialize(source)
    planned = planned_file_bytes(source, recipe, out, "0" * 32, "1" * 32)
    assert serialize(source) == before
    plan, rows = prepared_plan(load(path), recipe), []
    for weight in plan.solved:
        arrays = [[np.ones(shape, dtype) for shape, dtype in shapes] for shapes in weight.shapes()]
        packed, factors = weight.packed_from(arrays)
        bias = tuple(np.ones(part.n, np.float32) for part in weight.weight_sources()) if weight.corrected else ()
        error = 0.123456789012345678 if weight.kind == "linear" else None
        rows.append(apply_solution(plan, weight, Solved(packed, None, error, factors, bias)))
    files = save(plan.model, out, metadata=metadata(recipe, "0" * 32, "1" * 32) | final_metadata(plan.model, rows))
    assert sum(file.stat().st_size for file in files) == planned
