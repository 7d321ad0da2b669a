"""A plan is executed in order: what may not be seen before it is put in waits, what is known is not solved again."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest

from onnx_woq.core.spec import Spec
from onnx_woq.engine.execute import execute
from onnx_woq.engine.executors import Serial
from onnx_woq.engine.metadata import LAYERS, metadata
from onnx_woq.engine.output import destination
from onnx_woq.engine.plan import prepared_plan
from onnx_woq.engine.resources import open_resources
from onnx_woq.engine.statistics import collect
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.support import hooks, measure


def executed(path, out, recipe, data=(), *, statistics=None, cache=None, executor=None, resume="", progress=None):
    """A plan of the model at `path`, and what executing it gave."""
    data = list(data)
    plan = prepared_plan(load(path), recipe)
    with open_resources(plan, data, executor=executor or Serial(), progress=progress) as resources:
        given = statistics or (lambda left, states: collect(plan, left, data, resources, states))
        place = destination(out, path)
        result = execute(
            plan, place, lambda left, states: given(left, states), resources,
            properties=metadata(recipe, "0" * 32, "1" * 32), companions_from=path, resume=resume, cache=cache,
        )  # fmt: skip
    return plan, result


def test_rows_are_in_order_groups_before_tables_and_bytes_are_those_of_the_files(tied_lm, tmp_path):
    """With a table of its own, and one whose codes are those of its head."""
    recipe = Recipe(embedding=Spec(), overrides={"positions": Spec(8, 64)})
    said = []
    plan, done = executed(tied_lm, tmp_path / "q.onnx", recipe, progress=lambda *what: said.append(what))
    assert [row.name for row in done.weights] == [one.name for one in (*plan.groups, *plan.embeddings)]
    assert done.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert {row.bytes_after == 0 for row in done.weights if row.kind == "embedding"} >= {True}
    count = len(plan.solved)
    assert said == [("solve", number, count) for number in range(1, count + 1)]
    proto = onnx.load(tmp_path / "q.onnx", load_external_data=False)
    layers = json.loads(next(one.value for one in proto.metadata_props if one.key == LAYERS))
    assert [one["name"] for one in layers] == [group.name for group in plan.groups]


@pytest.mark.parametrize(
    ("fields", "waits"),
    [({}, "for nobody"), ({"true_sequential": True}, "for all"), ({"options": {"folding": True}}, "for all"),
     ({"true_sequential": True, "sequential_unit": "block"}, "for its block")],
    ids=["at once", "one by one", "folding", "by block"],
)  # fmt: skip
def test_who_waits_for_what_is_put_in(fields, waits, lm, lm_data, tmp_path):
    """When a group is drawn, which of those before it are low-bit already."""
    recipe, data, seen, gate = Recipe("awq", **fields), lm_data[:1], {}, threading.Event()
    plan = prepared_plan(load(lm), recipe)

    def held(real):
        return lambda *args, **kwargs: (gate.wait(20), real(*args, **kwargs))[1]

    with (
        hooks.solver("awq", held),
        ThreadPoolExecutor(3) as pool,
        open_resources(plan, data, executor=pool) as resources,
    ):

        def watched(left, states):
            for group, stats in collect(plan, left, data, resources, states):
                seen[group.name] = [one.name for one in plan.groups if is_low_bit(one)]
                if waits != "for nobody" or len(seen) == 2:
                    gate.set()
                yield group, stats

        execute(
            plan, destination(tmp_path / "q.onnx", lm), watched, resources,
            properties=metadata(recipe, "", ""), companions_from=lm, resume="",
        )  # fmt: skip
    names = [group.name for group in plan.groups]
    before = {name: names[:place] for place, name in enumerate(names)}
    if waits == "for all":
        assert seen == before
    elif waits == "for its block":
        assert all(seen[name] == before[name][: len(seen[name])] for name in names)
        assert sorted({len(done) for done in seen.values()}) == [0, 4, 8], "after each of the two layers"
    else:
        assert seen[names[1]] == [], "the first is being solved"


def is_low_bit(weight):
    return all(linear.node.op_type == "MatMulNBits" for linear in weight.source.linears)


def test_what_is_known_is_not_solved_again(enc, enc_data, tmp_path):
    """Recipes that choose alike for some weights share them; the files are those of a run alone."""
    first = Recipe("gptq")
    second = Recipe("gptq", overrides={"^first$": Spec(8, 32)})
    cache, log = {}, tmp_path / "log"
    with hooks.solver("gptq", hooks.logged(log)):
        plan, _ = executed(enc, tmp_path / "a" / "q.onnx", first, enc_data, cache=cache)
        assert hooks.solved(log) == len(cache) == len(plan.groups)
        executed(enc, tmp_path / "b" / "q.onnx", second, enc_data, cache=cache)
        assert hooks.solved(log) == len(plan.groups) + 1
        executed(enc, tmp_path / "c" / "q.onnx", first, enc_data, cache=cache)
        assert hooks.solved(log) == len(plan.groups) + 1
    executed(enc, tmp_path / "alone" / "q.onnx", second, enc_data)
    assert measure.listing(tmp_path / "b") == measure.listing(tmp_path / "alone")
    assert measure.listing(tmp_path / "c") == measure.listing(tmp_path / "a")


@pytest.mark.parametrize("after", [0, 2])
def test_what_goes_wrong_leaves_nothing_and_an_end_leaves_what_is_done(after, lm, tmp_path):
    def failing(error):
        def statistics(left, states):
            for count, weight in enumerate(left):
                if count == after:
                    raise error
                yield weight.source, None

        return statistics

    out = tmp_path / "made" / "q.onnx"
    with pytest.raises(ZeroDivisionError):
        executed(lm, out, Recipe(), statistics=failing(ZeroDivisionError()))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        executed(lm, out, Recipe(), statistics=failing(KeyboardInterrupt()))
    assert out.parent.exists() == (after > 0)
    asked = []

    def rest(left, states):
        asked.extend(weight.name for weight in left)
        return ((weight.source, None) for weight in left)

    plan, done = executed(lm, out, Recipe(), statistics=rest, resume="same")
    assert asked == [weight.name for weight in plan.groups][after:]
    executed(lm, tmp_path / "whole" / "q.onnx", Recipe())
    assert measure.listing(out.parent) == measure.listing(tmp_path / "whole")
    assert len(done.weights) == len(plan.groups)
