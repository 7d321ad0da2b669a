"""The distance that one replaced weight makes, against a model file in which it is replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnx_woq.core.spec import Spec
from onnx_woq.errors import DataError
from onnx_woq.graph.find.embeddings import Embedding, find_embeddings
from onnx_woq.graph.find.linears import LinearGroup, find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from onnx_woq.runtime.evaluation.metrics import compare
from onnx_woq.runtime.evaluation.perturb import Variant, distances, group_variant, table_variant
from tests.zoo import small as zoo


def noisy(group: LinearGroup) -> np.ndarray:
    """The weights of a tap with noise that follows from its name."""
    weight = group.weight()
    rng = np.random.default_rng(sum(map(ord, group.name)))
    return (weight + 0.05 * weight.std() * rng.normal(size=weight.shape)).astype(np.float32)


def variants(groups: list[LinearGroup]) -> list[Variant]:
    return [group_variant(group, noisy) for group in groups]


def replaced_file(path: Path, out: Path, group: LinearGroup) -> Path:
    """The model with the weights of `tap` replaced in its file: an edit that knows nothing of blocks."""
    model, weight = onnx.load(path), noisy(group)
    graphs = [model.graph, *(a.g for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)]
    nodes = {node.output[0]: node for graph in graphs for node in graph.node}
    for number, (linear, columns) in enumerate(group.slices()):
        array = weight[:, columns] / linear.scale
        dtype = np.float16 if linear.dtype == ir.DataType.FLOAT16 else np.float32
        stored = np.ascontiguousarray(array.T if linear.transposed() else array, dtype)
        tensor = numpy_helper.from_array(stored, f"replaced{number}")
        model.graph.initializer.append(tensor)
        nodes[linear.name].input[1] = tensor.name
    onnx.save(model, out)
    return out


def measured(path: Path, folder: Path, group: LinearGroup, feeds: list[dict[str, np.ndarray]]) -> float:
    found = compare(replaced_file(path, folder / "replaced.onnx", group), path, feeds)
    return found.kl if found.kind == "lm" else 10 ** (-found.sqnr_db / 10)


MODELS = {
    "lm": (zoo.language_model, {"layers": 4}, lambda: zoo.lm_feeds(zoo.token_ids(3, length=12))),
    "tied": (zoo.language_model, {"tied": True}, lambda: zoo.lm_feeds(zoo.token_ids(2, length=9))),
    "encoder": (zoo.encoder, {}, lambda: zoo.float_feeds(3)),
    "gemms": (zoo.gemms, {}, lambda: [{"a": zoo.correlated(i, 30, 40)} for i in range(2)]),
    "constants": (zoo.constants, {}, lambda: [{"x": zoo.correlated(i, 8, 48)[None]} for i in range(2)]),
    "loop": (zoo.loop, {}, lambda: [{"x": zoo.correlated(i, 8, 48)[None]} for i in range(2)]),
    "half": (
        zoo.chain,
        {"widths": (64, 48, 32), "dtype": zoo.F16},
        lambda: [{"x": zoo.correlated(1, 30, 64).astype(np.float16)}],
    ),
    "branches": (
        zoo.branches,
        {},
        lambda: [{"x": zoo.correlated(i, 8, 48)[None], "flag": np.array(True)} for i in (1, 2)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_distance_is_that_of_the_edited_file(name, tmp_path):
    build, options, make_feeds = MODELS[name]
    path, feeds = build(tmp_path / "m.onnx", **options), make_feeds()
    model = load(path)
    groups = find_linear_groups(model, Recipe())[0]
    found = distances(model, variants(groups), feeds)
    assert list(found) == [group.name for group in groups]
    for group in groups:
        expected = measured(path, tmp_path, group, feeds)
        rounding = 0.05 if name == "half" else 2e-3  # the runtime computes that model in half precision
        assert found[group.name] == pytest.approx(expected, rel=rounding, abs=1e-12), group.name
    if name == "branches":  # the branch that no sample takes moves nothing
        assert sorted(value > 0 for value in found.values()) == [False, True, True]
    else:
        assert all(value > 0 for value in found.values())


def test_the_budget_changes_nothing_and_the_model_is_left_as_it_is(lm, lm_data):
    model = load(lm)
    groups = find_linear_groups(model, Recipe())[0]
    nodes, initializers = list(model.ir.graph), set(model.ir.graph.initializers)
    wide = distances(model, variants(groups), lm_data[:2])
    assert distances(model, variants(groups), lm_data[:2], memory_budget=1) == wide
    assert (list(model.ir.graph), set(model.ir.graph.initializers)) == (nodes, initializers)
    assert distances(model, variants(groups[::2]), lm_data[:2]) == {
        group.name: wide[group.name] for group in groups[::2]
    }


def test_masked_tokens_do_not_count(lm):
    model = load(lm)
    groups = find_linear_groups(model, Recipe())[0]
    [whole] = zoo.lm_feeds(zoo.token_ids(1, length=12))
    padded = {name: np.concatenate([array, array[:, :5]], axis=1) for name, array in whole.items()}
    padded["attention_mask"][:, 12:] = 0
    short, long = (distances(model, variants(groups), [feed]) for feed in (whole, padded))
    assert long == pytest.approx(short, rel=1e-3)


def test_noise_beyond_what_an_exponential_holds_is_still_a_number(lm, lm_data):
    model = load(lm)
    head = find_linear_groups(model, Recipe())[0][-1]
    [found] = distances(
        model, [group_variant(head, lambda group: group.weight() * np.float32(1e4))], lm_data[:1]
    ).values()
    assert np.isfinite(found)
    assert found > 1


def test_broken_outputs_and_missing_samples_are_named_errors(lm, lm_data):
    model = load(lm)
    groups = find_linear_groups(model, Recipe())[0]
    with pytest.raises(DataError, match="sample"):
        distances(model, variants(groups), [])
    with pytest.raises(DataError, match="finite"):
        distances(model, [group_variant(groups[-1], lambda group: np.full((group.k, group.n), np.nan))], lm_data[:1])


def test_a_table_is_replaced_for_its_gathers_alone(tied_lm, lm_data, tmp_path):
    """Of a tied head the weight stays: the edited file has a table of its own for the Gather."""
    model, recipe = load(tied_lm), Recipe(embedding=Spec())
    [table] = find_embeddings(model, recipe, find_linear_groups(model, recipe)[0])[0]

    def rounded(table: Embedding) -> np.ndarray:
        [part] = table.weight_sources()
        return np.round(part.read() * 3) / 3

    proto = onnx.load(tied_lm)
    [gather] = [node for node in proto.graph.node if node.output[0] == table.name]
    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(rounded(table).T), "other"))
    gather.input[0] = "other"
    onnx.save(proto, tmp_path / "edited.onnx")
    found = distances(model, [table_variant(table, rounded)], lm_data[:2])
    expected = compare(tmp_path / "edited.onnx", tied_lm, lm_data[:2]).kl
    assert found == {table.name: pytest.approx(expected, rel=2e-3)}
    assert expected > 1e-4
