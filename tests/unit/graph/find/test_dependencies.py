"""What depends on what, against the definitions written down as searches through the whole graph."""

from __future__ import annotations

import pytest

from onnx_woq.graph.find.dependencies import (
    bodies,
    find_dependencies,
    is_costly,
    owners,
    product_bytes,
    reads_of,
    weight_shapes,
)
from onnx_woq.graph.io.model import load
from tests.zoo import architectures as arch
from tests.zoo.nodes import BOOL, graph, node, random, value, write

K = 16
W = random(K, K)
BUILDERS = {"decoder": arch.decoder, "fused": arch.fused_decoder, "tangle": arch.tangle, "merged": arch.merged_decoder}


@pytest.fixture(scope="module", params=BUILDERS)
def found(request, tmp_path_factory):
    model = load(BUILDERS[request.param](tmp_path_factory.mktemp("m") / "m.onnx"))
    return find_dependencies(model.ir.graph)


@pytest.fixture
def nested(tmp_path):
    """If(flag: If(flag: x·A, else h), else relu(x)) behind h = x·B."""
    inner = [
        graph([node("MatMul", ["x", "A"], ["p"], name="deep")], [], [value("p")]),
        graph([node("Identity", ["h"], ["q"], name="same")], [], [value("q")]),
    ]
    outer = [
        graph([node("If", ["flag"], ["r"], name="in", then_branch=inner[0], else_branch=inner[1])], [], [value("r")]),
        graph([node("Relu", ["x"], ["s"], name="shallow")], [], [value("s")]),
    ]
    nodes = [
        node("MatMul", ["x", "B"], ["h"], name="before"),
        node("If", ["flag"], ["y"], name="out", then_branch=outer[0], else_branch=outer[1]),
    ]
    inputs = [value("x", ("m", K)), value("flag", [], BOOL)]
    main = graph(nodes, inputs, [value("y")], {"A": W, "B": random(K, 3 * K)})
    return load(write(tmp_path / "m.onnx", main)).ir.graph


def named(main, name):
    return next(n for n in main.all_nodes() if n.name == name)


def test_a_node_reads_what_its_bodies_read_from_outside(nested):
    assert [v.name for v in reads_of(named(nested, "out"), nested)] == ["flag", "x", "h", "A"]
    assert [v.name for v in reads_of(named(nested, "before"), nested)] == ["x", "B"]


def test_every_node_in_a_body_has_its_owner(nested):
    found = {inner.name: owner.name for inner, owner in owners(nested).items()}
    assert found == {"deep": "in", "same": "in", "in": "out", "shallow": "out"}
    assert [len(bodies(n)) for n in nested] == [0, 2]


def test_a_node_costs_what_its_bodies_cost(nested):
    out = named(nested, "out")
    assert (is_costly(out), weight_shapes(out), product_bytes(out)) == (True, (), 4 * K * K)
    assert (is_costly(named(nested, "shallow")), product_bytes(named(nested, "shallow"))) == (False, 0)
    assert product_bytes(named(nested, "before")) == 4 * K * 3 * K


@pytest.mark.parametrize(
    ("made", "weights", "shapes"),
    [
        (node("MatMul", ["x", "A"], ["y"]), {"A": random(K, 5)}, ((K, 5),)),
        (node("Gemm", ["x", "A"], ["y"], transB=1), {"A": random(5, K)}, ((K, 5),)),
        (node("Gemm", ["x", "A", "c"], ["y"]), {"A": random(K, 5), "c": random(5)}, ((K, 5),)),
        (node("MatMul", ["A", "x"], ["y"]), {"A": random(7, 6)}, ((7, 6),)),
        (node("MatMul", ["x", "x"], ["y"]), {}, ()),
        (node("Add", ["x", "A"], ["y"]), {"A": random(K, K)}, ()),
    ],
)
def test_the_weights_that_a_node_multiplies_by(made, weights, shapes, tmp_path):
    main = graph([made], [value("x")], [value("y")], weights)
    (only,) = load(write(tmp_path / "m.onnx", main)).ir.graph
    assert weight_shapes(only) == shapes
    assert is_costly(only) == bool(shapes)


def reachable(starts, following):
    seen, pending = set(), list(starts)
    while pending:
        if (one := pending.pop()) not in seen:
            seen.add(one)
            pending += following(one)
    return seen


def test_downstream_is_whatever_a_product_leads_to(found):
    products = [n for n in found.nodes if is_costly(n)]
    reached = reachable(products, lambda n: [r for v in n.outputs for r in found.readers.get(v, [])])
    assert found.downstream == [n for n in found.nodes if n in reached]
    assert found.costly == set(products)
    assert found.count_costly(found.nodes[: len(found.nodes) // 2]) == sum(
        n in found.costly for n in found.nodes[: len(found.nodes) // 2]
    )


def test_free_is_what_depends_on_no_input(found):
    for n in found.nodes:
        above = reachable(found.reads[n], lambda v: found.reads.get(v.producer(), []))
        depends = any(v.producer() is None and not v.is_initializer() for v in above)
        product = any(is_costly(p) for v in above if (p := v.producer())) or is_costly(n)
        assert (n in found.free) == (not depends and not product), n.name


def test_live_is_what_is_there_and_still_wanted(found):
    steps = found.downstream
    at = {n: i for i, n in enumerate(steps)}
    last = {v: max((at[r] for r in readers if r in at), default=-1) for v, readers in found.readers.items()}
    early = {
        v for v, end in last.items()
        if v.producer() and v.producer() not in at and v.producer() not in found.free and 2 * end < len(steps)
    }  # fmt: skip
    naive = [
        sum(end > i and (at[v.producer()] <= i if v.producer() in at else v in early) for v, end in last.items())
        for i in range(len(steps))
    ]
    assert found.live_counts() == naive
