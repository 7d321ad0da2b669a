"""What the benchmarks count and conclude; no times are tested."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from benchmarks import phases, records, report  # noqa: E402
from benchmarks.floor import needed  # noqa: E402
from benchmarks.measure import STEERING, ChildFailed, environment, median, medians, ratio, run  # noqa: E402
from benchmarks.phases import Sampler  # noqa: E402
from llama import SHAPES, write_llama  # noqa: E402


def test_the_floor_counts_what_the_formulas_say(tmp_path):
    s, samples, length = SHAPES["tiny"], 3, 10
    path = write_llama(tmp_path, s, dtype="float32")
    ids = tmp_path / "ids.npz"
    np.savez(ids, input_ids=np.random.default_rng(0).integers(0, s.vocab, (samples, length)))
    found = needed(path, "GPTQ_G32ASYM", {}, ids)
    d, f, kv, t = s.hidden, s.ff, s.kv_heads * s.head, samples * length
    # [K, N] of each tap: q k v, o, gate up, down; once more for the head
    layer = [(d, d + 2 * kv), (d, d), (d, 2 * f), (f, d)]
    groups = [*layer * s.layers, (d, s.vocab)]
    attention = 2 * (2 * length * length * d) * samples
    rotary = 2 * (s.head // 2) * t  # angles are a product as well
    linear = sum(2 * k * n * t for k, n in layer)
    assert found["taps"] == len(groups)
    assert found["tokens"] == t
    assert found["least"]["forward"] == s.layers * (linear + attention) + rotary  # the head's product is not needed
    assert found["least"]["gram"] == sum(k * k * t for k, _ in groups)
    assert found["least"]["factor"] == pytest.approx(sum(2 * k**3 / 3 for k, _ in groups))
    assert found["least"]["solve"] == sum(k * k * n for k, n in groups)
    assert found["usual"]["solve"] == 2 * found["least"]["solve"]
    # without the head, the last product needed is the one before the last tap
    body = needed(path, "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", {}, ids)
    assert found["least"]["forward"] - body["least"]["forward"] == 2 * f * d * t


def test_a_child_is_measured_and_its_environment_does_not_steer_blas(monkeypatch):
    for name in STEERING:
        monkeypatch.setenv(name, "Haswell")
    assert not set(STEERING) & set(environment())
    assert environment(3)["ONNX_WOQ_THREADS"] == "3"
    code = (
        "import os, time, json\n"
        "held = bytearray(80_000_000); held[::4096] = b'x' * len(held[::4096])\n"
        "end = time.process_time() + .3\n"
        "while time.process_time() < end: pass\n"
        "time.sleep(.2)\n"
        "print(json.dumps({'cores': len(os.sched_getaffinity(0)), 'set': [n for n in os.environ if 'CORETYPE' in n]}))"
    )
    used = run([sys.executable, "-c", code], one_core=True)
    assert used.said == {"cores": 1, "set": []}
    assert 0.3 <= used.cpu < used.wall
    assert 80e6 < used.private <= used.rss
    with pytest.raises(ChildFailed, match="no luck"):
        run([sys.executable, "-c", "raise SystemExit('no luck')"])
    start = time.monotonic()
    with pytest.raises(ChildFailed):
        run([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.5)
    assert time.monotonic() - start < 10


def test_ratios_are_of_pairs():
    rounds = [{"a": {"wall": a}, "b": {"wall": b, "rss MB": 5e6}} for a, b in ((1, 2), (10, 5), (3, 3))]
    assert ratio(rounds, "a.wall", "b.wall") == 1
    assert median(rounds, "a.wall") == 3
    assert medians(rounds, {"rss MB": "b.rss MB", "s": "b.wall"}) == {"rss MB": 5, "s": 3}


def test_goals_are_judged_in_the_right_direction():
    copy, decode = records.TARGETS["rtn-copy"], records.TARGETS["decode"]
    assert [copy.verdict(value).strip("*") for value in (1.5, 3, 3.1)] == ["stretch", "reached", "not reached"]
    assert [decode.verdict(value).strip("*") for value in (3, 2, 1.9)] == ["stretch", "reached", "not reached"]


def test_phases_follow_the_innermost_function_that_is_known(monkeypatch):
    rules = [(__file__, "^outer$", "outside"), (__file__, "^inner$", "inside")]
    monkeypatch.setattr(phases, "_RULES", [tuple(map(phases.re.compile, rule[:2])) + rule[2:] for rule in rules])

    def inner(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))

    def outer():
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            sum(range(1000))
        inner(0.6)

    idle = threading.Event()
    for _ in range(10):
        threading.Thread(target=idle.wait, daemon=True).start()
    with Sampler() as sampler:
        outer()
    idle.set()
    seconds = sampler.seconds()
    assert 0.3 < seconds["inside"] < 0.9
    assert 0.05 < seconds["outside"] < seconds["inside"]
    assert sum(seconds.values()) < 4  # the ten threads that wait for .8 seconds are not among them


def test_the_report_says_what_was_and_what_was_not_reached(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["bench.py", "gptq-floor", "--text", "/home/me/calib.txt"])
    memory = {"ours": {"timeline": [(0.0, 10**9, 10**8), (1.0, 2 * 10**9, 10**8)]}}
    floors = {"floor forward CPU s": 1.0}
    for record in (
        records.Record("machine", "", None, [{}], {"sgemm": 100.0}),
        records.Record("gptq-floor", "small", 9.0, [{}], floors, {"gram": 1.0, "solve": 2.0}, "old"),
        records.Record("gptq-floor", "small", 2.5, [{}], floors, {"gram": 1.0, "solve": 2.0}, "the Gram matrix"),
        records.Record("gptq-onc", "small", 1 / 50, [{}], {}),
        records.Record("memory-rtn", "large", 2.0, [memory], {}),
    ):
        records.add(record)
    report.write(tmp_path / "docs")
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "**2.5** | **not reached** | the Gram matrix |" in text
    assert "**9**" not in text
    assert "**1/50** | stretch |" in text
    assert "not measured" in text
    assert "`python tools/bench.py gptq-floor --text …/calib.txt`" in text
    assert len(json.loads((tmp_path / "results" / "gptq-floor.json").read_text())) == 2
    assert {file.name for file in (tmp_path / "docs").glob("*.png")} == {
        "benchmarks-ratios.png", "benchmarks-phases.png", "benchmarks-memory.png",
    }  # fmt: skip
