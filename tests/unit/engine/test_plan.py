"""A plan: one idea for everything that becomes codes, resolved once, and true to the file that is written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.plan import make_plan, prepared_plan
from onnx_woq.errors import AlreadyQuantized, NothingToQuantize, RecipeError
from onnx_woq.graph.io.model import load
from onnx_woq.graph.io.save import save
from onnx_woq.recipe import Recipe
from tests.zoo import small as zoo
from tests.zoo.nodes import graph, linear, node, random, value, write


@pytest.fixture
def tied(tmp_path):
    return load(zoo.language_model(tmp_path / "tied.onnx", tied=True))


def test_linear_groups_and_tables_are_one_kind_of_weight(tied):
    plan = make_plan(tied, Recipe(embedding=Spec(8, 32)))
    for weight in (*plan.groups, *plan.embeddings):
        arrays = [[np.zeros(shape, dtype) for shape, dtype in shapes] for shapes in weight.shapes()]
        packed, factors = weight.packed_from(arrays)
        assert sum(array.nbytes for one in packed for array in one.arrays) == weight.own_bytes
        assert (len(packed), factors) == (len(weight.weight_sources()), ())
        assert weight.report().bytes_after == weight.bytes
    assert {weight.kind for weight in plan.solved} == {"linear", "embedding"}


def test_a_table_on_the_grid_of_its_head_takes_nothing_and_is_not_solved(tied):
    plan = make_plan(tied, Recipe(embedding=Spec()))
    [table] = [one for one in plan.embeddings if one.lender]
    head = next(group for group in plan.groups if table.source in plan.borrowers(group))
    assert table.lender in head.source.linears
    assert (table.bytes, table.code_bytes) == (0, 0)
    assert table.own_bytes == head.own_bytes
    assert table not in plan.solved
    assert not make_plan(tied, Recipe(embedding=Spec(), target="qdq")).borrowers(head), "no code is lent under QDQ"


def test_bytes_are_those_of_codes_factors_and_corrections(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(64, 48)))
    [plain], [more] = (
        make_plan(model, Recipe(**extra)).groups for extra in ({}, {"lowrank": 16, "bias_correction": True})
    )
    factors = (64 + 48) * 16 + 4 * (2 * 16 + 1 * 48)  # 8 bits each, a scale of 4 bytes for every 32 inputs
    assert more.factor_dims == [(64, 16), (16, 48)]
    assert more.bytes - plain.bytes == pytest.approx(factors + 4 * 48, abs=16 * 48)  # the second factor is padded
    assert more.code_bytes == plain.bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_bits_take_more_bytes(bits, tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(64, 48), opset=21))
    [group] = make_plan(model, Recipe()).groups
    assert group.on(Spec(bits, 32)).bytes == group.on(Spec(bits, 32)).on(Spec(bits, 32)).bytes
    if bits < 8:
        assert group.on(Spec(bits, 32)).bytes < group.on(Spec(bits + 1, 32)).bytes


def test_a_plan_without_work_says_why(tmp_path):
    path = write(tmp_path / "n.onnx", graph([node("Relu", ["x"], ["y"])], [value("x", [4])], [value("y", [4])], {}))
    with pytest.raises(NothingToQuantize, match="has none at all"):
        make_plan(load(path), Recipe()).require_work()
    linear(tmp_path / "m.onnx", random(64, 48))
    with pytest.raises(NothingToQuantize, match="excluded by 'mm'"):
        make_plan(load(tmp_path / "m.onnx"), Recipe(exclude=("mm",))).require_work()


@pytest.mark.parametrize("target", ["matmulnbits", "qdq"])
def test_a_quantized_model_has_no_work(target, tmp_path):
    from onnx_woq import quantize

    linear(tmp_path / "m.onnx", random(64, 48))
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", Recipe(spec=Spec(8, 32), target=target))
    with pytest.raises(AlreadyQuantized):
        make_plan(load(tmp_path / "q.onnx"), Recipe()).require_work()


def test_auto_takes_the_first_target_that_holds_the_grid(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(64, 48)))
    targets = {size: make_plan(model, Recipe(spec=Spec(4, size), target="auto")).groups[0].target for size in (32, 24)}
    assert targets == {32: "matmulnbits", 24: "qdq"}
    with pytest.raises(RecipeError, match="--target qdq"):
        make_plan(model, Recipe(spec=Spec(4, 24)))
    with pytest.raises(RecipeError, match="did you mean qdq"):
        make_plan(model, Recipe(target="qdqq"))


@pytest.mark.parametrize(("bits", "opset"), [(8, 21), (4, 21), (2, 25)])
def test_the_opset_is_raised_as_far_as_the_codes_need_it_and_said(bits, opset, tmp_path, caplog):
    model = load(linear(tmp_path / "m.onnx", random(64, 48), opset=17))
    plan = make_plan(model, Recipe(spec=Spec(bits, 32), target="qdq"))
    raised = plan.raised()
    assert (plan.opset, raised.model.ir.opset_imports[""], model.ir.opset_imports[""]) == (opset, opset, 17)
    assert f"from 17 to {opset}" in caplog.text
    assert [group.name for group in raised.groups] == [group.name for group in plan.groups]
    save(raised.model, tmp_path / "r.onnx", metadata={})
    onnx.checker.check_model(str(tmp_path / "r.onnx"), full_check=True)
    assert raised.raised() is raised


def test_what_is_slow_is_said(tmp_path):
    model = load(linear(tmp_path / "m.onnx", random(64, 48)))
    assert make_plan(model, Recipe(target="qdq")).notes == []
    [line] = make_plan(model, Recipe(spec=Spec(4, 24), target="qdq")).notes
    assert "1 of 1 weights" in line
    assert "slower than float" in line


def test_planning_changes_nothing(tied):
    before = {name: id(one.const_value) for name, one in tied.ir.graph.initializers.items()}, len(list(tied.ir.graph))
    make_plan(tied, Recipe(embedding=Spec(), lowrank=16))
    prepared_plan(tied, Recipe())
    after = {name: id(one.const_value) for name, one in tied.ir.graph.initializers.items()}, len(list(tied.ir.graph))
    assert before == after


def test_how_a_plan_prepares_its_model_is_known_by_the_same_key_afterwards(tied):
    """Statistics are shared by it."""
    keys = {}
    for name, more in {
        "plain": {},
        "none": {"rotation": True},
        "shared": {"rotation": True, "embedding": Spec()},
    }.items():
        recipe = Recipe(**more)
        keys[name] = make_plan(tied, recipe).preparation
        assert prepared_plan(tied, recipe).preparation == keys[name]
    assert len(set(keys.values())) == 3
