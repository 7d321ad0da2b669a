"""A report says what the result says, needs no network, trusts no name, and draws without a complaint in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, Spec, quantize, tune, write_report
from onnx_woq.cli import main
from onnx_woq.errors import OutputError
from onnx_woq.summary import histograms, layers_of, places, summary
from tests.acceptance import architectures as arch
from tests.acceptance import zoo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>console.error('run')</script><img src=x onerror=console.error(1)>"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return arch.decoder(tmp_path_factory.mktemp("page") / "m.onnx", layers=3)


@pytest.fixture(scope="module")
def data() -> list[dict[str, np.ndarray]]:
    return [arch.ids_feed(1, 24, layers=3, seed=i) for i in range(12)]


@pytest.fixture(scope="module")
def tuned(decoder, data, tmp_path_factory):
    configs = ["RTN_G32ASYM", "GPTQ_G32ASYM", "BEST_4BIT", Recipe("rtn", Spec(2, 32))]
    folder = tmp_path_factory.mktemp("tuned")
    return tune(
        decoder, None, data, configs=configs, objective="best", workdir=folder / "w", output=folder / "out.onnx"
    )


def test_json_says_what_the_result_says(tuned, decoder, tmp_path):
    found = json.loads(write_report(tuned, tmp_path / "r.json", model=decoder, command="onnx-woq …").read_text())
    assert found["tuning"]["best"] == tuned.best.name
    assert [t["metric"] for t in found["tuning"]["trials"]] == [t.metric for t in tuned.trials]
    assert found["bytes_after"] == tuned.best.bytes
    assert found["command"] == "onnx-woq …"
    assert found["recipe"] == json.loads(json.dumps(tuned.best.recipe.to_dict()))
    assert json.dumps(found, allow_nan=False)


def test_layers_are_those_of_the_written_model(decoder, data, tmp_path):
    recipe = Recipe("gptq", Spec(4, 32), overrides={"down": Spec(8, 32)})
    report = quantize(decoder, tmp_path / "q.onnx", recipe, data)
    rows = layers_of(report.output)
    assert [(r["name"], r["bits"], r["error"]) for r in rows] == [(t.name, t.spec.bits, t.error) for t in report.taps]
    assert {row["layer"] for row in rows} == {0, 1, 2, None}
    assert [row["kind"] for row in rows if row["layer"] == 1] == [row["kind"] for row in rows if row["layer"] == 2]


def test_a_layer_is_the_number_that_repeats():
    names = [f"/layers.{i}/mlp/fc{j}/MatMul" for i in range(4) for j in (1, 2)] + ["lm_head", "pooler.0"]
    assert places(names)[:4] == [
        (0, "/layers.#/mlp/fc1/MatMul"),
        (0, "/layers.#/mlp/fc2/MatMul"),
        (1, "/layers.#/mlp/fc1/MatMul"),
        (1, "/layers.#/mlp/fc2/MatMul"),
    ]
    assert places(names)[-2:] == [(None, "lm_head"), (None, "pooler.0")]
    assert places([]) == []


def test_histograms_count_every_weight_and_its_rounding_error(decoder, data, tmp_path):
    report = quantize(decoder, tmp_path / "q.onnx", Recipe("rtn", Spec(3, 32), accuracy_level=0), data)
    entries = histograms(decoder, report.output, layers_of(report.output))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(decoder).graph.initializer}
    assert len(entries) == 6
    for entry in entries:
        weight = tensors[f"{entry['name']}.weight"]
        for part in (entry["weight"], entry["rounding"]):
            assert sum(part["counts"]) + part["outside"] == weight.size
        assert entry["weight"]["rms"] == pytest.approx(np.sqrt(np.square(weight).mean()), rel=1e-4)
        spans = [np.ptp(weight[r : r + 32], axis=0).max() / 7 for r in range(0, len(weight), 32)]
        assert 0 < entry["rounding"]["largest"] <= 0.51 * max(spans), "half a step"


def test_a_scaled_input_hides_the_error(tmp_path):
    path = zoo.siblings(tmp_path / "s.onnx", {"a": zoo.weight(1, 96, 32)}, norm=True)
    feeds = [{"x": np.exp(np.random.default_rng(i).normal(size=(1, 40, 96)) * 2).astype(np.float32)} for i in range(4)]
    report = quantize(path, tmp_path / "q.onnx", Recipe("awq", Spec(4, 32)), feeds)
    found = summary(report, path)
    scaled = {row["name"] for row in found["layers"] if row["scaling"]}
    for entry in found["worst"]:
        assert (entry["rounding"] is None) == (entry["name"] in scaled)


def test_the_page_needs_no_network_and_trusts_no_name(data, tmp_path):
    path = arch.decoder(tmp_path / "m.onnx", layers=2)
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "MatMul" and node.output[0] == "layer1.q":
            node.name = EVIL
            for other in proto.graph.node:
                other.input[:] = [EVIL if name == "layer1.q" else name for name in other.input]
            node.output[0] = EVIL
    onnx.save(proto, path)
    two = [{k: v for k, v in feed.items() if ".2." not in k} for feed in data]
    report = quantize(path, tmp_path / "q.onnx", Recipe("gptq"), two)
    text = write_report(report, tmp_path / "r.html", model=path, command=EVIL).read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<img src=x" not in text.replace("\\u003c", "(")
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=["'](?!data:)""", text)


def test_what_cannot_be_written_is_refused_before_the_work(decoder, tmp_path):
    arguments = ["quantize", str(decoder), "-o", str(tmp_path / "q.onnx"), "--report"]
    for name, message in (("r.pdf", ".html"), (".", "name it")):
        done = CliRunner().invoke(main, [*arguments, str(tmp_path / name)])
        assert done.exit_code == 2
        assert message in done.output
    assert not (tmp_path / "q.onnx").exists()


def test_without_plotly_the_way_to_it_is_named(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("onnx_woq.page.find_spec", lambda _: None)
    done = CliRunner().invoke(main, ["quantize", str(decoder), "-o", str(tmp_path / "q.onnx"), "--report", "r.html"])
    assert done.exit_code == 2
    assert "onnx-woq[report]" in done.output
    assert not (tmp_path / "q.onnx").exists()


def test_a_report_that_fails_leaves_nothing(tuned, decoder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(tuned, tmp_path / "r.json", model=decoder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
def test_a_browser_draws_every_chart_without_a_complaint(tuned, decoder, tmp_path):
    page = write_report(tuned, tmp_path / "r.html", model=decoder, command=EVIL)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'u'}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    drawn = re.findall(r'<div id="(\w+)"[^>]*class="[^"]*js-plotly-plot', done.stdout)
    assert {"frontier", "history", "network", "worst0"} <= set(drawn)
    assert done.stdout.count('class="main-svg"') >= len(drawn)
