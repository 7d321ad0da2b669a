"""What `tools/golden.py` takes for the same; nothing is quantized."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import golden  # noqa: E402
from golden import Record  # noqa: E402

PLACES = {"/tmp/a": "<a>", "/tmp/a/b": "<b>"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('"path": "/tmp/a/b/q.onnx", "other": "/tmp/a/q.onnx"', '"path": "<b>/q.onnx", "other": "<a>/q.onnx"'),
        ('{"seconds": 1.5e-05, "metric": 0.10}', '{"seconds": 0, "metric": 0.10}'),
        ('"seconds": 3}', '"seconds": 0}'),
        ('"command": "-c \\"a b\\" --x", "model": 1', '"command": "", "model": 1'),
        ("q.onnx in 12.3 s\n35.3 %", "q.onnx in 0 s\n35.3 %"),
        (
            "about 1.30 GB of memory: solving 4 MB, the rest 167 MB; 5 blocks",
            "about 0 MB of memory: solving 4 MB, the rest 0 MB; 5 blocks",
        ),
        ('<td class="number">1.2</td><td>1.2</td>', '<td class="number">0</td><td>1.2</td>'),
        (
            '<td class="short">command</td><td class="name"><code>a b</code></td><td><code>c</code>',
            '<td class="short">command</td><td class="name"><code></code></td><td><code>c</code>',
        ),
    ],
)
def test_what_differs_from_run_to_run_is_left_out(text, left):
    assert golden.normalised(text, PLACES) == left


def test_floats_stay_as_they_are_written():
    text = '{"metric": 1e-05, "loss": 0.00001, "pairs": [2.766871833607476]}'
    assert golden.normalised(text, PLACES) == text


def test_a_page_without_its_library_and_the_seconds_of_its_history():
    chart = json.dumps({"data": [{"y": [1.0]}, {"y": [2.0], "yaxis": "y2"}, {"y": [0.7], "yaxis": "y3"}]})
    page = f'<main><script id="history-data">{chart}</script><script id="frontier-data">{chart}</script></main>library'
    found = golden.page_content(page)
    assert "library" not in found
    assert found.count("0.7") == 1
    assert found.count("1.0") == found.count("2.0") == 2


def test_a_version_is_left_out_where_it_stands_alone():
    assert golden.without_version('"onnx-woq": "0.1.0", "numpy": "10.1.0", "onnx": "0.1.0.1"', "0.1.0") == (
        '"onnx-woq": "", "numpy": "10.1.0", "onnx": "0.1.0.1"'
    )


def test_a_model_without_its_version_keeps_the_rest():
    models = []
    for version, recipe in (("0.1.0", "a"), ("0.10.0", "a"), ("0.1.0", "b")):
        model = onnx.ModelProto(ir_version=8)
        onnx.helper.set_model_props(model, {"onnx_woq.version": version, "onnx_woq.recipe": recipe})
        models.append(golden.model_without_version(model.SerializeToString()))
    assert models[0] == models[1] != models[2]


def test_hashes_are_of_bytes():
    assert (
        golden.hash_of("é") == golden.hash_of("é".encode()) == hashlib.blake2b("é".encode(), digest_size=16).hexdigest()
    )


BEFORE = Record("1", {"a": "1", "b": "2"}, {"a": "10", "b": "20"})


@pytest.mark.parametrize(
    ("now", "found", "code"),
    [
        (BEFORE, {"a": "equal", "b": "equal"}, 0),
        (replace(BEFORE, results={"a": "1", "b": "3"}), {"a": "equal", "b": "different"}, 1),
        (replace(BEFORE, results={"a": "1"}), {"a": "equal", "b": "gone"}, 1),
        (replace(BEFORE, results=BEFORE.results | {"c": "3"}), {"a": "equal", "b": "equal", "c": "new"}, 1),
        (replace(BEFORE, broken=["b"]), {"a": "equal", "b": "broken"}, 1),
        (replace(BEFORE, help={"quantize": "other"}), {"a": "equal", "b": "equal"}, 0),
        (replace(BEFORE, version="2", results={"a": "8", "b": "9"}), {"a": "equal", "b": "equal"}, 0),
        (replace(BEFORE, version="2", unversioned={"a": "10", "b": "21"}), {"a": "equal", "b": "different"}, 1),
    ],
    ids=["same", "different", "gone", "new", "broken", "help", "version", "version and more"],
)
def test_verdicts(now, found, code):
    assert golden.verdicts(BEFORE, now) == found
    assert golden.exit_code(found) == code


def test_the_table_ends_with_what_is_not_equal():
    assert golden.table({"x": "different", "y": "equal"}).splitlines() == [
        "equal      y",
        "different  x",
        "1 of 2 are not equal",
    ]


def test_files_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = []
    for name, seconds, data in (("one", 1.5, b"x"), ("two", 2.5, b"x"), ("three", 1.5, b"y")):
        work = tmp_path / name
        (work / "made" / ".hidden").mkdir(parents=True)
        (work / "made" / "journal.jsonl").write_text(f'{{"path": "{work}/q", "seconds": {seconds}}}\n')
        (work / "made" / ".hidden" / "data").write_bytes(data)
        to = golden.Recorder(tmp_path / "tree", work, work)
        hashes.append(to.writes("made", work / "made"))
        assert to.record.results == {"made": hashes[-1]}
    assert hashes[0] == hashes[1] != hashes[2]
    assert to.writes("made", work / "made", but=".hidden") != hashes[2]
