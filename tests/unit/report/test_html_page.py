"""A report says what the result says, needs no network, trusts no name, and draws without a complaint in a browser."""

from __future__ import annotations

import html
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
from onnx_woq.report import charts
from onnx_woq.report.html_page import page
from onnx_woq.report.layer_names import layer_positions, short_names
from onnx_woq.report.summary import layers_of, summary
from tests.zoo import architectures as arch

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


@pytest.fixture(scope="module")
def mixed(decoder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return tune(decoder, None, data, objective="pareto", points=3, output=folder / "out.onnx")


def decoder_bytes(path: Path) -> int:
    return path.stat().st_size


def test_json_says_what_the_result_says(tuned, decoder, tmp_path):
    found = json.loads(write_report(tuned, tmp_path / "r.json", model=decoder, command="onnx-woq …").read_text())
    assert found["tuning"]["best"] == tuned.best.name
    assert [t["metric"] for t in found["tuning"]["trials"]] == [t.metric for t in tuned.trials]
    assert found["bytes_after"] == tuned.best.bytes
    assert found["command"] == "onnx-woq …"
    assert found["recipe"] == json.loads(json.dumps(tuned.best.recipe.to_dict()))
    assert json.dumps(found, allow_nan=False)


def test_layers_are_those_of_the_written_model(decoder, data, tmp_path):
    recipe = Recipe("gptq", Spec(4, 32), overrides={"down": Spec(8, 32)}, exclude=("layer2.o",))
    report = quantize(decoder, tmp_path / "q.onnx", recipe, data)
    rows = layers_of(report.output)
    assert [(r["name"], r["bits"], r["error"]) for r in rows] == [(t.name, t.spec.bits, t.error) for t in report.groups]
    found = summary(report)
    assert [row for row in found["layers"] if row["bits"] is not None] == json.loads(json.dumps(rows))
    (left,) = [row for row in found["layers"] if row["bits"] is None]
    assert (left["name"], left["layer"]) == ("layer2.o", 2)
    assert left["bytes"] == 4 * left["k"] * left["n"]
    assert {row["layer"] for row in found["layers"]} == {0, 1, 2, None}
    by_layer = [[row["kind"] for row in found["layers"] if row["layer"] == layer] for layer in (0, 1, 2)]
    assert by_layer[0] == by_layer[1] == by_layer[2]


def test_what_stays_float_and_embeddings_are_those_of_the_result(data, tmp_path):
    path = arch.decoder(tmp_path / "m.onnx", layers=2, tied=True)
    grid = {"bits": 4, "group_size": 32, "symmetric": False}
    recipe = Recipe.from_dict({"method": "rtn", "spec": grid, "embedding": grid, "exclude": ["down"]})
    report = quantize(path, tmp_path / "q.onnx", recipe)
    found = summary(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert found["skipped"] == plain["skipped"]
    assert found["embeddings"] == plain["embeddings"]
    assert "down" in page(found)


def test_a_layer_is_the_number_that_repeats():
    names = [f"/layers.{i}/mlp/fc{j}/MatMul" for i in range(4) for j in (1, 2)] + ["lm_head", "pooler.0"]
    assert layer_positions(names)[:4] == [
        (0, "/layers.#/mlp/fc1/MatMul"),
        (0, "/layers.#/mlp/fc2/MatMul"),
        (1, "/layers.#/mlp/fc1/MatMul"),
        (1, "/layers.#/mlp/fc2/MatMul"),
    ]
    assert layer_positions(names)[-2:] == [(None, "lm_head"), (None, "pooler.0")]
    assert layer_positions([]) == []


def test_names_that_say_nothing_are_told_apart_by_shape():
    shapes = [(64, 192), (64, 64), (64, 256), (256, 64)] * 5
    found = layer_positions([f"MatMul_{7 * i}" for i in range(20)], shapes)
    assert [layer for layer, _ in found] == [i // 4 for i in range(20)]
    assert [kind for _, kind in found[:4]] == [kind for _, kind in found[-4:]]
    assert len({kind for _, kind in found}) == 4


def test_labels_are_short_and_no_two_alike():
    kinds = [f"/{side}/layers.#/{block}/fc/MatMul" for side in ("enc", "dec") for block in ("attn", "mlp")]
    assert short_names(["/model/layers.#/mlp/up/MatMul_output_0", "logits"]) == ["mlp/up", "logits"]
    odd = [*kinds, "/", "", "#", *("x" * 90 + end for end in "ab"), "a/b", "a.b"]
    assert len(set(short_names(odd))) == len(odd)
    assert max(map(len, short_names(odd))) < 40


@pytest.mark.parametrize(
    "names",
    [
        [f"l{i}.{kind}" for i in range(30) for kind in ("q", "k", "v", "o", "up", "down")] + ["head"],
        [f"encoder{'x' * i}" for i in range(400)],
        [f"{side}.{i}.o" for side in ("a.fc", "b.fc") for i in range(3)],
        ["a", "b", "c", "d"],
    ],
    ids=["layers", "all different", "same ends", "four"],
)
def test_every_weight_has_a_cell_of_its_own(names):
    rows = [
        {"name": n, "sites": [n], "k": 8, "n": 8, "bytes": 8, "bits": 4, "group_size": 32, "symmetric": False}
        | {"error": (i + 1) / 1000, "weight_error": None, "layer": layer, "kind": kind}
        for i, (n, (layer, kind)) in enumerate(zip(names, layer_positions(names), strict=True))
    ]
    (heat,) = charts.network(rows).data
    shown = [value for line in heat.z for value in line if value is not None]
    assert sorted(shown) == pytest.approx([100 * row["error"] ** 0.5 for row in rows])
    assert [text for line in heat.text for text in line if text] == ["4"] * len(rows)
    assert len(heat.y) <= 30


def test_the_frontier_shows_trials_predictions_the_choice_and_the_float_model(mixed, decoder):
    found = summary(mixed)
    assert found["tuning"]["frontier"] == json.loads(json.dumps([point.to_dict() for point in mixed.frontier]))
    drawn = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in charts.frontier(found).data}
    measured = {(t.bytes / 1e6, t.metric) for t in mixed.trials}
    assert {point for name in ("within", "outside", "undecided") for point in drawn.get(name, ())} == measured
    assert drawn[f"chosen: {mixed.best.name}"] == [(mixed.best.bytes / 1e6, mixed.best.metric)]
    assert drawn["float model"] == [(decoder_bytes(decoder) / 1e6, 0)]
    assert len(drawn["predicted mixes"]) > 5
    assert mixed.target in page(found)


def test_histories_show_what_each_trial_took(tuned):
    points, sizes, seconds = charts.history(summary(tuned)).data
    assert list(points.y) == [trial.metric for trial in tuned.trials]
    assert list(sizes.y) == [trial.bytes / 1e6 for trial in tuned.trials]
    assert list(seconds.y) == [trial.seconds for trial in tuned.trials]


def test_a_run_without_a_model_has_a_report(decoder, data, tmp_path):
    def broken(path: Path) -> float:
        if path != decoder:
            raise ValueError("no")
        return 1.0

    failed = tune(decoder, broken, data, configs=["RTN_G32ASYM"])
    assert failed.best is None
    assert "No configuration gave a model" in write_report(failed, tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def evil(data, tmp_path_factory) -> str:
    """A page about a model whose every name means harm."""
    folder = tmp_path_factory.mktemp("evil")
    path = arch.decoder(folder / "m.onnx", layers=2, tied=True)
    proto = onnx.load(path)
    harmful = lambda name: f"{name}{EVIL}%{{x}}<b>" if name.startswith(("layer", "embedding")) else name  # noqa: E731
    for node in proto.graph.node:
        node.name = f"{node.name}{EVIL}"
        node.input[:], node.output[:] = map(harmful, node.input), map(harmful, node.output)
    for tensor in proto.graph.initializer:
        tensor.name = harmful(tensor.name)
    onnx.save(proto, path)
    two = [{k: v for k, v in feed.items() if ".2." not in k} for feed in data]
    configs = {f"gptq{EVIL}": Recipe("gptq", exclude=("layer1.o",)), "rtn": Recipe("rtn")}
    result = tune(path, None, two, configs=configs, objective="best", output=folder / "q.onnx")
    return write_report(result, folder / "r.html", command=EVIL).read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_trusts_no_name(evil):
    own = evil.split("<script>")[0] + evil.split("</script>")[-1]
    assert "layer0" in own
    assert EVIL not in evil
    assert "<img" not in own
    assert "<b>" not in re.sub(r"<p><b>|<div class=\"fact\"><b>", "", own)
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=["'](?!data:)""", evil)
    assert "default-src 'none'" in own


def test_what_cannot_be_written_is_refused_before_the_work(decoder, tmp_path):
    arguments = ["quantize", str(decoder), "-o", str(tmp_path / "q.onnx"), "--report"]
    (tmp_path / "file").touch()
    (tmp_path / "r.json").mkdir()
    for name, message in (("r.pdf", ".html"), (".", "name it"), ("file/r.json", "file"), ("r.json", "folder")):
        done = CliRunner().invoke(main, [*arguments, str(tmp_path / name)])
        assert done.exit_code == 2
        assert message in done.output
    assert not (tmp_path / "q.onnx").exists()


def test_without_plotly_the_way_to_it_is_named(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("onnx_woq.report.html_page.find_spec", lambda _: None)
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


def opened(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The document as a browser leaves it, and what it said on its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'u'}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def drawn_in(document: str) -> set[str]:
    """The charts that plotly has drawn."""
    tags = re.findall(r'<div [^>]*class="plot[^>]*>', document)
    return {re.search(r'id="(\w+)"', tag)[1] for tag in tags if "js-plotly-plot" in tag}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
def test_a_browser_draws_every_chart_without_a_complaint(tuned, mixed, tmp_path):
    for number, result in enumerate((tuned, mixed)):
        document, said = opened(write_report(result, tmp_path / f"{number}.html", command=EVIL), tmp_path)
        assert not said
        assert drawn_in(document) == {"frontier", "history", "network", *(f"worst{i}" for i in range(6))}
        assert document.count('class="main-svg"') >= 9


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
def test_names_that_mean_harm_do_nothing_in_a_browser(evil, tmp_path):
    (tmp_path / "r.html").write_text(evil, encoding="utf-8")
    document, said = opened(tmp_path / "r.html", tmp_path)
    assert not said
    assert len(drawn_in(document)) == 9
    assert "<img src" not in document.split("</main>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
def test_the_policy_of_the_page_stops_what_escaping_would_let_through(tuned, tmp_path):
    text = write_report(tuned, tmp_path / "r.html").read_text(encoding="utf-8")
    hurt = "<script>document.title = 'hurt'</script>"
    for policy, title in ((True, "m.onnx, quantized"), (False, "hurt")):
        page = tmp_path / f"{policy}.html"
        kept = text if policy else re.sub("<meta http-equiv[^>]*>", "", text)
        page.write_text(kept.replace("<h1>", f"{hurt}<h1>", 1), encoding="utf-8")
        document, said = opened(page, tmp_path)
        assert f"<title>{title}</title>" in document
        assert bool(said) == policy, "what is stopped is complained about"


def test_names_in_charts_are_shown_as_they_are():
    name = "<a href='https://x'>q</a>"
    row = {"name": name, "sites": [name], "k": 8, "n": 8, "bytes": 8, "bits": 4, "group_size": 32, "symmetric": True}
    figure = charts.network([row | {"error": 0.1, "weight_error": None, "layer": None, "kind": name}])
    assert not [text for text in (*figure.layout.yaxis.ticktext, *figure.data[0].customdata[0]) if "<a" in text]
    assert html.unescape(figure.data[0].customdata[0][0]).startswith(name)
