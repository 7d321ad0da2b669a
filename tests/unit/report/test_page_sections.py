"""Sections of the page: the numbers of the result, and text that no browser takes for anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from onnx_woq.report.page_sections import sections
from onnx_woq.report.plain_json import to_plain
from tests.unit.report.results import SKIPPED, mixed, tuned

EVIL = "<b onload='x()'>\"&"
ESCAPED = "&lt;b onload=&#x27;x()&#x27;&gt;&quot;&amp;"


def row(name: str, **more: Any) -> dict[str, Any]:
    known = {"k": 64, "n": 32, "bytes": 1024, "bits": 4, "group_size": 32, "symmetric": False}
    return (
        {"name": name, "sites": [name], "layer": None, "kind": name, "error": None, "weight_error": None} | known | more
    )


def found(**more: Any) -> dict[str, Any]:
    return {
        "model": "folder/m.onnx", "output": "q.onnx", "bytes_before": 4_000_000, "bytes_after": 1_000_000,
        "seconds": 2.5, "recipe": {"method": "rtn"}, "calibration": "", "source": "abc", "needs_onnxruntime": "1.20",
        "command": "", "versions": {"onnx": "1"}, "tuning": None, "layers": [], "embeddings": [], "skipped": [],
        "worst": [],
    } | more  # fmt: skip


def tuning(result) -> dict[str, Any]:
    return to_plain(result.to_dict() | {"unit": "nats per token"})


def page(**more: Any) -> str:
    return "\n".join(sections(found(**more)))


def text(html: str) -> str:
    return re.sub(r"<[^>]+>", "|", re.sub(r"<script.*?</script>", "", html))


def rows_of(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_section_for_what_there_is_and_none_for_what_there_is_not():
    assert headings(page()) == ["How it was made"]
    everything = page(tuning=tuning(mixed()), layers=[row("a")], skipped=[vars(one) for one in SKIPPED])
    assert headings(everything) == [
        "Configurations", "Accuracy against size", "Tuning history", "The network, weight by weight", "Left float",
        "How it was made",
    ]  # fmt: skip


def test_the_facts_are_those_of_the_result():
    layers = [row("a"), row("b", bits=8, bytes=2048), row("c", bits=None, bytes=8192)]
    shown = text(page(layers=layers))
    assert "|4.0 MB||float model|" in shown
    assert "|25.0 %||of the float size|" in shown
    assert f"|{8 * 3072 / (2 * 64 * 32):.2f}||bits per quantized weight" in shown, "what stays float does not count"


@pytest.mark.parametrize(
    ("result", "lead"),
    [
        (tuned(), "good| was chosen: within the tolerance."),
        (tuned(met=False), "the best so far; nothing is surely within the tolerance."),
        (mixed(), "good| was chosen: for at most 4.25 bits per weight."),
        (mixed(met=False), "for at most 4.25 bits per weight; nothing is surely within it."),
        (tuned(best=None), "No configuration gave a model."),
    ],
)
def test_the_lead_says_what_was_chosen(result, lead):
    assert lead in text(page(tuning=tuning(result)))


def test_every_configuration_has_its_row():
    shown = text(page(tuning=tuning(tuned())))
    rows = {cells[1]: cells for cells in rows_of(page(tuning=tuning(tuned()))) if len(cells) == 8}
    assert rows["good"] == ["1", "good", "0.01 ± 0.002", "within", "500.0 kB", "12.5 %", "1.2", "chosen"]
    assert rows["bad"] == ["2", "bad", "0.5", "outside", "500.0 kB", "12.5 %", "1.2", "resumed"]
    assert (rows["lost"][3], rows["odd"][3]) == ("dropped out", "no number")
    assert rows["broken"][4:] == ["", "", "1.2", "RuntimeError: [no] memory"]
    assert "In nats per token. Accepted: at most 0.05; all tried." in shown
    assert "All tried." in text(page(tuning=tuning(tuned()) | {"limit": None}))


def test_the_worst_weights_come_first_and_all_behind_a_click():
    layers = [row(f"w{i}", error=i / 1e4, sites=[f"w{i}", "x"]) for i in range(12)]
    shown = text(page(layers=layers))
    first, every = shown.split("All 12, in the order of the graph")
    assert re.findall(r"\|(w\d+) \+1\|", first) == [f"w{i}" for i in range(11, 1, -1)]
    assert re.findall(r"\|(w\d+) \+1\|", every) == [f"w{i}" for i in range(12)]
    assert "3.32 %" in first


def test_reasons_are_counted():
    shown = text(page(skipped=[vars(one) for one in SKIPPED]))
    assert "2 × both inputs are computed" in shown
    assert "1 × an embedding" in shown


def test_no_text_of_others_is_taken_for_html():
    table = {"shared_with": EVIL, "weight_name": EVIL, "rows": 2, "columns": 64, "bytes_before": 0, "bytes_after": 0}
    evil = page(
        model=f"x/{EVIL}", output=EVIL, command=EVIL, versions={EVIL: EVIL}, recipe={"m": EVIL},
        layers=[row(EVIL, error=0.1)], embeddings=[table | {"spec": {"bits": 4}}],
        skipped=[{"node_name": EVIL, "name": "", "op_type": EVIL, "weight_bytes": 0, "reason": EVIL}],
    )  # fmt: skip
    own = re.sub(r"<script type=.application/json.*?</script>", "", evil)
    assert EVIL not in own
    assert own.count(ESCAPED) >= 9
    assert "<b onload" not in evil
