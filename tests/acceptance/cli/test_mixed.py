"""Mixed precision on the command line: flags, tables, the picture."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from tests.support import measure

METRIC = """
def constant(path):
    return 1.0
"""


@pytest.fixture
def arguments(lm, ids, tmp_path):
    return ("quantize", lm, "-o", tmp_path / "out.onnx", "--calib", ids, "--algorithm", "rtn")


def test_a_target_gives_the_model_its_tables_and_its_picture(cli, arguments, tmp_path):
    picture = tmp_path / "frontier.png"
    result = cli.ok(*arguments, "--target-bpw", 4.25, "--points", 2, "--frontier", picture)
    assert result.exit_code == 0
    for row in ("layer0.k +1", "layer1.down", "logits", "bits per weight", "chosen", "RTN 4 bit g32 asym"):
        assert row in result.stdout, row
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000
    assert height > 600
    assert measure.recipe_of(tmp_path / "out.onnx")["overrides"]
    assert not list(tmp_path.glob(".*")), "the work folder of a finished run is removed"


def test_the_frontier_as_json(cli, arguments):
    found = cli.json(*arguments, "--objective", "pareto", "--points", 3)
    measured = [point for point in found["frontier"] if point["measured"] is not None]
    assert [point["kind"] for point in measured].count("mix") == 3
    assert sum(point["chosen"] for point in found["frontier"]) == 1
    assert found["best"] in [point["name"] for point in measured]
    assert all(layer["bits"] > 2 for layer in found["layers"])


def test_a_size_is_written_as_people_write_it(cli, arguments, tmp_path):
    cli.ok(*arguments, "--target-size", "0.2MB")
    size = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
    assert 0.97 * 200_000 <= size <= 200_000


def test_what_cannot_be_kept_is_written_with_exit_code_3(cli, arguments, tmp_path):
    result = cli(*arguments, "--max-kl", "1e-12", "--max-trials", 2)
    assert result.exit_code == 3
    assert "best so far" in result.stdout
    assert (tmp_path / "out.onnx").exists()


def test_auto_tries_the_predefined_configurations_beside_the_mixes(cli, arguments):
    found = cli.json(*arguments, "--auto", "--objective", "pareto", "--points", 1, "--tolerance", 5)
    names = [trial["name"] for trial in found["trials"]]
    assert names[0].startswith("mix ")
    assert any(name.startswith("BEST_4BIT") for name in names)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target-bpw", 4, "--max-kl", 0.1), ("--target-bpw", "--max-kl")),
        (("--target-size", "1MB", "--objective", "pareto"), ("--target-size", "--objective pareto")),
        (("--target-bpw", 4, "--bits", 4), ("--target-bpw", "--bits")),
        (("--target-bpw", 4, "--scheme", "sym"), ("--target-bpw", "--scheme")),
        (("--target-bpw", 4, "--objective", "smallest"), ("--target-bpw", "smallest")),
        (("--max-loss", 0.1), ("--max-loss", "--eval")),
        (("--max-kl", 0.1, "--eval", "my_metric:constant"), ("--max-kl", "--eval", "--max-loss")),
        (("--frontier", "x.png"), ("--frontier", "--target-bpw")),
        (("--points", 3), ("--points", "--objective pareto")),
        (("--target-bpw", 4, "--frontier", "x.gifx"), ("x.gifx", "png")),
        (("--target-bpw", 4, "--frontier", "missing/x.png"), ("missing", "create")),
        (("--target-bpw", 1), ("1 bits per weight", "to 32.000")),
        (("--target-size", "1KB"), ("1,000 bytes", "MB")),
    ],
    ids=str,
)
def test_contradictions_and_impossible_targets_are_named(flags, words, cli, arguments, tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments, *flags)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_without_matplotlib_the_picture_is_refused_before_the_work(cli, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    result = cli(*arguments, "--target-bpw", 4, "--frontier", "x.png")
    assert result.exit_code == 2
    assert "onnx-woq[plot]" in result.stderr


def test_a_loss_of_the_users_metric(cli, arguments, tmp_path, monkeypatch):
    (tmp_path / "metric_of_bits.py").write_text(
        "from pathlib import Path\n"
        "def size(path):\n"
        "    return sum(f.stat().st_size for f in Path(path).parent.glob(Path(path).name + '*')) / 1e5\n"
    )
    monkeypatch.chdir(tmp_path)
    found = cli.json(*arguments, "--eval", "metric_of_bits:size", "--max-loss", 4)
    chosen = next(point for point in found["frontier"] if point["chosen"])
    assert chosen["measured"] <= 4
    assert Path(found["path"]).exists()
