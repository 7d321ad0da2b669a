"""Any transformer is cut into its layers, and the pieces put together compute what the whole model computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from onnx_woq import quantize
from onnx_woq.graph.find.blocks import Block, Cut, blocks_of, cuts
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import Model, load
from onnx_woq.recipe import Recipe
from tests.zoo import architectures as arch
from tests.zoo import small as zoo


@dataclass(frozen=True)
class Case:
    """A model, and what is known of how it is cut: kind, layers, values alive between two blocks at most."""

    build: Callable[..., Path]
    kind: str
    layers: int = 0
    alive: int = 1
    options: dict[str, Any] = field(default_factory=dict)


LAYERED = {
    **{f"decoder opset {o}": Case(arch.decoder, "repeated", 4, options={"opset": o}) for o in (13, 14, 17, 20)},
    "deep decoder": Case(arch.decoder, "repeated", 9, options={"layers": 9}),
    "tied decoder": Case(arch.decoder, "repeated", 4, options={"tied": True}),
    "float16 decoder": Case(arch.decoder, "repeated", 4, options={"dtype": zoo.F16}),
    "bfloat16 decoder": Case(arch.decoder, "repeated", 4, options={"dtype": zoo.BF16}),
    "fused decoder": Case(arch.fused_decoder, "repeated", 4, alive=2),
    "float16 fused decoder": Case(arch.fused_decoder, "repeated", 4, alive=2, options={"dtype": zoo.F16}),
    "bert": Case(arch.bert, "repeated", 4),
    "bert opset 13": Case(arch.bert, "repeated", 4, options={"opset": 13}),
    "fused bert": Case(arch.bert, "repeated", 4, alive=2, options={"fused": True}),
    "cross decoder": Case(arch.cross_decoder, "repeated", 4),
    "two layers": Case(zoo.language_model, "repeated", 2),
    "five layers": Case(zoo.language_model, "repeated", 5, options={"layers": 5}),
}
OTHERS = {
    "funnel": Case(arch.funnel, "balanced"),
    "tangle": Case(arch.tangle, "whole"),
}
NAMES = [*LAYERED, *OTHERS, "loop between"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory) -> Callable[[str], Model]:
    folder, known = tmp_path_factory.mktemp("blocks"), {"loop between": Case(arch.loop_between, "")}
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            case = (LAYERED | OTHERS | known)[name]
            made[name] = load(case.build(folder / f"{name}.onnx", **case.options))
        return made[name]

    return get


# What a cut must be, read off the graph without any help of the package.


def reads(node: ir.Node) -> set[str]:
    """Names that a node reads, in its bodies too, from the graph it is in."""
    names = {v.name for v in node.inputs if v is not None}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            inside = {v.name for v in body.inputs} | set(body.initializers) | {v.name for n in body for v in n.outputs}
            names |= {name for n in body for name in reads(n)} - inside | {v.name for v in body.outputs} - inside
    return names


def needed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that an output of the graph depends on, in graph order."""
    want = {value.name for value in graph.outputs}
    found = []
    for node in reversed(list(graph)):
        if want & {v.name for v in node.outputs}:
            found.append(node)
            want |= reads(node)
    return found[::-1]


def pieces(cut: Cut) -> list[Block]:
    return [*([cut.side] if cut.side else []), *cut.blocks]


def owned(nodes: list[ir.Node], block: Block) -> list[ir.Node]:
    return [node for node in nodes if {v.name for v in node.outputs} & set(block.values)]


def alive_after(cut: Cut, index: int) -> set[str]:
    """What blocks up to `index` computed and later ones read."""
    made = {name for block in cut.blocks[: index + 1] for name in block.values}
    return made & {name for block in cut.blocks[index + 1 :] for name in block.inputs}


def graph_of(model: Model, cut: Cut) -> ir.Graph:
    """The main graph, or the branch whose values the cut speaks of."""
    if not cut.graph:
        return model.ir.graph
    some = cut.blocks[0].values[0]
    bodies = (g for g in model.ir.graph.subgraphs() if any(v.name == some for n in g for v in n.outputs))
    return next(bodies)


def check_partition(graph: ir.Graph, cut: Cut) -> None:
    nodes = needed(graph)
    assert nodes
    homes = Counter(name for piece in pieces(cut) for name in piece.values)
    assert {n.name: [homes[v.name] for v in n.outputs if v.name] for n in nodes} == {
        n.name: [1] * len([v for v in n.outputs if v.name]) for n in nodes
    }
    here = {v.name for v in graph.inputs} | {v.name for n in graph for v in n.outputs if v.name}
    ends = {v.name for v in graph.outputs}
    for index, piece in enumerate(pieces(cut)):
        inside = owned(nodes, piece)
        assert len({v.name for n in inside for v in n.outputs if v.name} ^ set(piece.values)) == 0
        read = {name for n in inside for name in reads(n)} - set(piece.values) - set(graph.initializers)
        assert set(piece.inputs) & here == read & here
        later = {name for other in pieces(cut)[index + 1 :] for n in owned(nodes, other) for name in reads(n)}
        assert set(piece.outputs) == set(piece.values) & (later | ends)


def check_order(graph: ir.Graph, cut: Cut) -> None:
    known = {v.name for v in graph.inputs}
    here = {v.name for n in graph for v in n.outputs} | known
    for piece in pieces(cut):
        assert set(piece.inputs) & here <= known
        known |= set(piece.outputs)
    assert {v.name for v in graph.outputs} <= known


@pytest.mark.parametrize("name", NAMES)
def test_every_node_that_counts_is_in_exactly_one_piece_and_runs_after_what_it_reads(name, model_of):
    model = model_of(name)
    cut = cuts(model)[0]
    assert cut.graph == ""
    check_partition(model.ir.graph, cut)
    check_order(model.ir.graph, cut)


@pytest.mark.parametrize("name", LAYERED)
def test_as_many_blocks_as_layers_and_between_them_the_residual_stream(name, model_of):
    model, case = model_of(name), LAYERED[name]
    cut = cuts(model)[0]
    assert cut.kind == case.kind
    assert case.layers <= len(cut.blocks) <= case.layers + 2  # what is before and after may stand alone
    alive = [alive_after(cut, i) for i in range(len(cut.blocks) - 1)]
    assert all(1 <= len(names) <= case.alive for names in alive), alive
    ends = {v.name for v in model.ir.graph.outputs}
    assert len({next(iter(names)) for names in alive}) == len(alive)
    assert not {name for names in alive for name in names if name.startswith("present")}
    assert {name for block in cut.blocks for name in block.outputs} == ends.union(*alive)


@pytest.mark.parametrize("name", LAYERED)
def test_every_layer_has_the_same_products_in_its_block(name, model_of):
    """A block is one period: seven products (or what the layer has), each kind of weight once."""
    cut, case = cuts(model_of(name))[0], LAYERED[name]
    made = {node.outputs[0].name: node for node in model_of(name).ir.graph if node.op_type == "MatMul"}
    kinds = [
        Counter(n.split(".", 1)[1] for n in block.values if n in made and n.startswith("layer")) for block in cut.blocks
    ]
    full = [kind for kind in kinds if kind]
    products = sum(map(Counter.total, full))
    assert products % case.layers == 0
    whole = [kind for kind in full if kind.total() == products // case.layers]
    assert len(whole) >= case.layers - 1  # the period may begin inside a layer: its ends are then shared out
    assert all(set(kind.values()) == {1} for kind in whole)


@pytest.mark.parametrize("name", [n for n in LAYERED if "decoder" in n and "cross" not in n])
def test_past_and_present_stay_with_their_block(name, model_of):
    cut, layers = cuts(model_of(name))[0], LAYERED[name].layers
    homes = set()
    for layer in range(layers):
        past = {f"past_key_values.{layer}.{kind}" for kind in ("key", "value")}
        present = {f"present.{layer}.{kind}" for kind in ("key", "value")}
        readers = {i for i, block in enumerate(cut.blocks) if past & set(block.inputs)}
        makers = {i for i, block in enumerate(cut.blocks) if present & set(block.outputs)}
        assert len(readers) == 1
        assert readers == makers
        assert past <= set(cut.blocks[min(readers)].inputs)
        assert present <= set(cut.blocks[min(readers)].outputs)
        homes |= readers
    assert len(homes) == layers


def test_present_of_an_encoder_decoder_pair_stays_too_and_the_encoder_is_read_by_each_layer(model_of):
    cut = cuts(model_of("cross decoder"))[0]
    for layer in range(4):
        present = {f"present.{layer}.{part}.{kind}" for part in ("decoder", "encoder") for kind in ("key", "value")}
        (home,) = [block for block in cut.blocks if present & set(block.outputs)]
        assert present <= set(home.outputs)
        assert "encoder_hidden_states" in home.inputs


@pytest.mark.parametrize("name", ["decoder opset 17", "cross decoder", "bert", "fused decoder"])
def test_masks_and_rotary_tables_are_computed_once(name, model_of):
    model = model_of(name)
    side = cuts(model)[0].side
    assert side is not None
    shared = {
        "decoder opset 17": {"mask", "cos", "sin"},
        "cross decoder": {"own_mask", "cross_mask"},
        "bert": {"mask"},
        "fused decoder": {"seqlens_k", "total_length"},
    }[name]
    assert shared <= set(side.values)
    assert shared <= set(side.outputs)
    read = {key for node in owned(list(model.ir.graph), side) for key in reads(node)}
    assert not {key for key in read if key.startswith("layer") and key.endswith(".weight")}


@pytest.mark.parametrize("name", NAMES)
def test_weight_bytes_add_up(name, model_of):
    model = model_of(name)
    graph, cut = model.ir.graph, cuts(model)[0]
    size = {key: value.const_value.nbytes for key, value in graph.initializers.items()}
    nodes = needed(graph)
    for piece in pieces(cut):
        read = {name for n in owned(nodes, piece) for name in reads(n)} & set(size)
        assert piece.weight_bytes == sum(size[key] for key in read)
    large = {key for n in nodes for key in reads(n) if size.get(key, 0) >= 4096}
    assert large
    tied = sum(size[key] for key in large) * (2 if name == "tied decoder" else 1)
    assert sum(size[key] for key in large) <= sum(piece.weight_bytes for piece in pieces(cut)) <= tied * 1.1


@pytest.mark.parametrize("name", OTHERS)
def test_without_repetition(name, model_of):
    cut = cuts(model_of(name))[0]
    assert cut.kind == OTHERS[name].kind
    assert len(cut.reason.split()) > 2
    if cut.kind == "whole":
        assert len(cut.blocks) == 1
        return
    assert len(cut.blocks) > 1
    assert all(len(alive_after(cut, i)) == 1 for i in range(len(cut.blocks) - 1))
    sizes = [block.weight_bytes for block in cut.blocks]
    assert max(sizes) < 0.8 * sum(sizes)  # balanced: no block holds nearly everything
    assert max(sizes) >= 300 * 64 * 4  # and none is smaller than the largest weight


def test_a_node_that_owns_a_subgraph_is_atomic(model_of):
    model = model_of("loop between")
    cut = cuts(model)[0]
    assert len(cut.blocks) >= 4
    (home,) = [block for block in cut.blocks if "looped" in block.values]
    graph = model.ir.graph
    (loop,) = [node for node in graph if node.op_type == "Loop"]
    inner = {v.name for g in graph.subgraphs() for n in g for v in n.outputs}
    assert inner
    assert not inner & {name for piece in pieces(cut) for name in piece.values}
    captured = reads(loop) - {v.name for v in loop.inputs if v}
    assert {"layer1.h", "turn.weight"} <= captured
    assert "layer1.h" in {*home.inputs, *home.values}
    assert home.weight_bytes >= arch.D * arch.D * 4


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Model:
    return load(arch.merged_decoder(tmp_path_factory.mktemp("merged") / "m.onnx", layers=3))


def test_each_branch_of_a_merged_decoder_is_cut_on_its_own(merged):
    main, *branches = cuts(merged)
    assert main.graph == ""
    assert [cut.kind for cut in branches] == ["repeated", "repeated"]
    assert len({cut.graph for cut in branches} | {""}) == 3
    bodies = [graph_of(merged, cut) for cut in branches]
    assert bodies[0] is not bodies[1]
    for cut, body in zip(branches, bodies, strict=True):
        check_partition(body, cut)
        assert 3 <= len(cut.blocks) <= 5
        assert all(len(alive_after(cut, i)) == 1 for i in range(len(cut.blocks) - 1))
        made = {name for block in cut.blocks for name in block.values}
        assert sum(name.endswith(".down") for name in made) == 3
        weights = {name for n in body for name in reads(n)} & set(merged.ir.graph.initializers)
        large = sum(merged.ir.graph.initializers[name].const_value.nbytes for name in weights)
        assert sum(piece.weight_bytes for piece in pieces(cut)) >= large  # though they are the outer graph's


# Taps by block


def flat(lists: list[list[Any]]) -> Iterator[Any]:
    return (group for members in lists for group in members)


@pytest.mark.parametrize("name", NAMES)
def test_taps_by_block(name, model_of):
    model = model_of(name)
    groups, _ = find_linear_groups(model, Recipe())
    lists = blocks_of(model, groups)
    assert list(flat(lists)) == groups
    assert all(lists)
    blocks = cuts(model)[0].blocks
    homes = {value: i for i, block in enumerate(blocks) for value in block.values}
    where = [[homes[group.linears[0].name] for group in members if group.linears[0].name in homes] for members in lists]
    assert all(len(set(numbers)) <= 1 for numbers in where), where
    assert len(lists) <= len(blocks)
    if name in LAYERED:
        assert len(lists) >= LAYERED[name].layers


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("name", ["decoder opset 17", "fused decoder", "bert"])
def test_blocks_stay_what_they_were_while_the_model_is_quantized(name, done, model_of, tmp_path):
    """A run that is resumed, or looks again half way, must find the taps that are left in the same lists."""
    model = model_of(name)
    groups, _ = find_linear_groups(model, Recipe())
    lists = [[group.name for group in members] for members in blocks_of(model, groups)]
    finished = [group.name for group in groups if int(group.name[5] if group.name.startswith("layer") else 9) < done]
    quantize(model.path, tmp_path / "q.onnx", Recipe(include=(rf"^layer[0-{done - 1}]\.",)))
    half = load(tmp_path / "q.onnx")
    left = [[group.name for group in members] for members in blocks_of(half, find_linear_groups(half, Recipe())[0])]
    assert len(finished) == 4 * done
    assert left == [rest for members in lists if (rest := [n for n in members if n not in finished])]


# What people see


@pytest.mark.parametrize("name", ["decoder opset 17", "fused decoder", "funnel", "tangle"])
def test_inspect_says_which_case_applies(name, model_of, cli):
    model = model_of(name)
    cut = cuts(model)[0]
    found = list(tables(cli.json("inspect", model.path)))
    assert any(entry.get("kind") == cut.kind and entry.get("reason") == cut.reason for entry in found)
    shown = " ".join(cli.ok("inspect", model.path).stdout.split())
    assert " ".join(cut.reason.split()) in shown
    others = {"repeated", "balanced", "whole"} - {cut.kind}
    assert not any(entry.get("kind") in others for entry in found)


def test_inspect_speaks_of_each_branch(merged, cli):
    kinds = [entry["kind"] for entry in tables(cli.json("inspect", merged.path)) if entry.get("kind") in KINDS]
    assert kinds.count("repeated") == 2


KINDS = ("repeated", "balanced", "whole")


def tables(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from tables(item)


def test_cutting_changes_nothing_in_the_model(model_of):
    model = model_of("decoder opset 17")
    before = onnx.ModelProto.FromString(ir.to_proto(model.ir).SerializeToString())
    assert cuts(model) == cuts(model)
    assert ir.to_proto(model.ir) == before
    assert json.dumps([b.inputs for b in cuts(model)[0].blocks])
