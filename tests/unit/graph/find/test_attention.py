"""What makes keys and values is found in every form that exporters write attention in."""

from __future__ import annotations

import pytest

from onnx_woq.graph.find.attention import FIRST_TOKEN, find_key_value_linears
from onnx_woq.graph.find.linears import find_linear_groups
from onnx_woq.graph.io.model import load
from onnx_woq.recipe import Recipe
from tests.zoo import architectures as arch

LAYERS, BRANCHES = range(2), ("with_past", "without_past")
SHOWN = {
    "decoder": (arch.decoder, {f"layer{i}.{n}": f"layer{i}.share" for i in LAYERS for n in "kv"}),
    "merged": (
        arch.merged_decoder,
        {f"{b}/layer{i}.{n}": f"{b}/layer{i}.share" for b in BRANCHES for i in LAYERS for n in "kv"},
    ),
    "fused": (arch.fused_decoder, {f"layer{i}.{n}": FIRST_TOKEN for i in LAYERS for n in "kv"}),
    "bert": (arch.bert, {f"layer{i}.{n}": f"layer{i}.share" for i in LAYERS for n in "kv"}),
    "cross": (
        arch.cross_decoder,
        {f"layer{i}.{p}.{n}": f"layer{i}.{p}.share" for i in LAYERS for p in ("encoder", "decoder") for n in "kv"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHOWN)
def test_keys_and_values_and_nothing_else_are_found(kind, tmp_path):
    build, wanted = SHOWN[kind]
    found = find_key_value_linears(load(build(tmp_path / "m.onnx", layers=len(LAYERS))))
    assert {node.outputs[0].name: probabilities for node, probabilities in found.items()} == wanted


def test_a_model_without_attention_has_none(tmp_path):
    assert find_key_value_linears(load(arch.funnel(tmp_path / "m.onnx"))) == {}


def test_keys_and_values_become_a_tap_of_their_own(tmp_path):
    model = load(arch.decoder(tmp_path / "m.onnx", layers=1))
    plain, _ = find_linear_groups(model, Recipe("gptq"))
    weighted, _ = find_linear_groups(model, Recipe("gptq", attention_weighted=True))
    linears = lambda groups: [[linear.name for linear in group.linears] for group in groups]  # noqa: E731
    assert linears(plain)[0] == ["layer0.q", "layer0.k", "layer0.v"]
    assert linears(weighted)[:2] == [["layer0.q"], ["layer0.k", "layer0.v"]]
    assert linears(plain)[1:] == linears(weighted)[2:]
    assert weighted[0].sources != weighted[1].sources
    assert weighted[0].values == weighted[1].values
