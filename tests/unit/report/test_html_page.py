"""A report says what the result says, needs no network, trusts no name, and draws without a complaint in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from onnx_woq import Recipe, tune, write_report
from onnx_woq.cli import main
from onnx_woq.errors import OutputError
from tests.zoo import architectures as arch

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>console.error('run')</script><img src=x onerror=console.error(1)>"


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
@pytest.mark.slow
def test_a_browser_draws_every_chart_without_a_complaint(tuned, mixed, tmp_path):
    for number, result in enumerate((tuned, mixed)):
        document, said = opened(write_report(result, tmp_path / f"{number}.html", command=EVIL), tmp_path)
        assert not said
        assert drawn_in(document) == {"frontier", "history", "network", *(f"worst{i}" for i in range(6))}
        assert document.count('class="main-svg"') >= 9


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
@pytest.mark.slow
def test_names_that_mean_harm_do_nothing_in_a_browser(evil, tmp_path):
    (tmp_path / "r.html").write_text(evil, encoding="utf-8")
    document, said = opened(tmp_path / "r.html", tmp_path)
    assert not said
    assert len(drawn_in(document)) == 9
    assert "<img src" not in document.split("</main>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome to open the page in")
@pytest.mark.slow
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
