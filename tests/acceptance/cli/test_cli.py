"""The command line as the specification describes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_woq import Recipe, Spec, inspect
from tests.support import measure
from tests.support.commands import CONFIGS, FAMILY, PUBLISHED, ROOT, command_line
from tests.zoo import small as zoo

COMMANDS = ("quantize", "evaluate", "inspect", "configs")


def test_every_command_has_help(cli):
    listed = cli.ok("--help").stdout
    for command in COMMANDS:
        assert command in listed
        assert cli.ok(command, "--help").stdout.count("\n") > 4
    for option in ("--config", "--recipe", "--auto", "--calib", "--samples", "--seqlen", "--include", "--exclude",
                   "--bits", "--group-size", "--scheme", "--algorithm", "--accuracy-level", "--eval", "--tolerance",
                   "--higher-is-better", "--lower-is-better", "--json"):  # fmt: skip
        assert option in cli.ok("quantize", "--help").stdout, option


def test_configs_are_listed_in_tuning_order_one_per_line(cli):
    from onnx_woq import PRESETS

    assert tuple(PRESETS) == (*PUBLISHED, *FAMILY)
    lines = cli.ok("configs").stdout.splitlines()
    rows = [line for line in lines if line.strip()]
    assert [row.split()[0] for row in rows] == [*PUBLISHED, *FAMILY]
    assert all(len(row.split()) > 4 for row in rows), "each with what it means"


def test_configs_as_json(cli):
    listed = cli.json("configs")
    names = list(listed) if isinstance(listed, dict) else [entry["name"] for entry in listed]
    assert names == [*PUBLISHED, *FAMILY]


def test_a_process_of_its_own_prints_json_and_nothing_else(enc, xs, tmp_path):
    out = tmp_path / "q.onnx"
    done = command_line("quantize", enc, "-o", out, "--algorithm", "GPTQ", "--calib", xs, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["method"] == "gptq"
    assert Path(report["output"]) == out
    (plan,) = done.stderr.splitlines()
    assert "of memory" in plan, "nothing but what it will take, when not a terminal"
    assert len(report["taps"]) == 3
    assert all(group["error"] > 0 for group in report["taps"])


def test_tables_are_quiet_when_not_a_terminal(enc, xs, tmp_path):
    done = command_line("quantize", enc, "-o", tmp_path / "q.onnx", "--auto", "--calib", xs)
    assert done.returncode in (0, 3), done.stderr
    assert not re.search(r"[\r\x1b]", done.stdout + done.stderr), "control characters of a progress bar"
    assert "RTN_G32ASYM" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in CONFIGS if "GPTQ" not in name] + ["gptq_g128asym"])
def test_a_config_by_name(name, enc, xs, cli, tmp_path):
    report = cli.json("quantize", enc, "-o", tmp_path / "q.onnx", "--config", name, "--calib", xs)
    from onnx_woq import PRESETS

    assert Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx")) == PRESETS[name.upper()]
    assert report["bytes_after"] < report["bytes_before"]
    assert report["bytes_after"] == sum(p.stat().st_size for p in tmp_path.glob("q.onnx*"))


def test_algorithm_alone_is_fine(enc, xs, cli, tmp_path):
    for name in ("RTN", "GPTQ", "AWQ", "gptq"):
        cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--algorithm", name, "--calib", xs)
        assert measure.recipe_of(tmp_path / "q.onnx")["method"] == name.lower()


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_recipe_file(suffix, enc, xs, cli, tmp_path):
    recipe = Recipe(
        "gptq", Spec(3, 64, True), {"actorder": True, "percdamp": 0.05}, exclude=("^first$",), accuracy_level=0
    )
    file = tmp_path / f"r.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(recipe.to_dict()))
    else:
        file.write_text(
            'method = "gptq"\nexclude = ["^first$"]\naccuracy_level = 0\n'
            "[spec]\nbits = 3\ngroup_size = 64\nsymmetric = true\n[options]\nactorder = true\npercdamp = 0.05\n"
        )
    cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--recipe", file, "--calib", xs)
    assert Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx")) == recipe
    assert set(measure.low_bit(tmp_path / "q.onnx")) == {"left", "right", "y"}


def test_options_of_a_method(enc, xs, cli, tmp_path):
    options = ["--option", "actorder=true", "--option", "percdamp=0.02", "--option", "block_size=32"]
    cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--config", "GPTQ_G32ASYM", "--calib", xs, *options)
    written = measure.recipe_of(tmp_path / "q.onnx")["options"]
    assert written == {"actorder": True, "percdamp": 0.02, "block_size": 32}


def test_accuracy_level_flag(enc, cli, tmp_path):
    cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--accuracy-level", 0)
    assert {measure.attributes(n)["accuracy_level"] for n in measure.low_bit(tmp_path / "q.onnx").values()} == {0}


def test_samples_and_seqlen_limit_the_calibration(lm, cli, forwards, tmp_path, text):
    zoo.byte_tokenizer(tmp_path)
    common = (
        "quantize",
        lm,
        "-o",
        tmp_path / "q.onnx",
        "--algorithm",
        "GPTQ",
        "--calib",
        text,
        "--tokenizer",
        tmp_path,
    )
    cli.ok(*common, "--samples", 5, "--seqlen", 32)
    assert 5 <= len(forwards) <= 7
    first = {p.key: p.value for p in onnx.load(tmp_path / "q.onnx").metadata_props}
    cli.ok(*common, "--samples", 5, "--seqlen", 16)
    second = {p.key: p.value for p in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert first != second


def test_random_data_only_by_name(enc, cli, tmp_path):
    refused = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--algorithm", "GPTQ")
    assert refused.exit_code == 2
    assert "--calib" in refused.stderr
    assert not (tmp_path / "q.onnx").exists()
    for name in ("a", "b"):
        cli.ok(
            "quantize",
            enc,
            "-o",
            tmp_path / name / "q.onnx",
            "--algorithm",
            "GPTQ",
            "--calib",
            "random",
            "--samples",
            4,
            "--seqlen",
            16,
        )
    assert measure.listing(tmp_path / "a") == measure.listing(tmp_path / "b"), "random, but repeatable"


def test_output_folder_gets_what_optimum_needs(lm_folder, cli, tmp_path):
    (lm_folder / "chat_template.jinja").write_text("{{ x }}")
    (lm_folder / "notes.bin").write_bytes(bytes(1000))
    before = measure.listing(lm_folder)
    cli.ok("quantize", lm_folder / "model.onnx", "-o", tmp_path / "out" / "deep")
    out = tmp_path / "out" / "deep"
    names = {"config.json", "generation_config.json", "special_tokens_map.json"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names | {"model.onnx"} <= {p.name for p in out.iterdir()}
    assert not (out / "notes.bin").exists()
    for name in names:
        assert (out / name).read_bytes() == (lm_folder / name).read_bytes()
    assert np.isfinite(measure.run(out / "model.onnx", zoo.lm_feeds(zoo.token_ids(1)))["logits"]).all()
    assert measure.listing(lm_folder) == before


def test_output_folder_gets_no_weights_of_the_input(cli, tmp_path):
    zoo.language_model(tmp_path / "in" / "model.onnx", external="model.onnx_data")
    cli.ok("quantize", tmp_path / "in" / "model.onnx", "-o", tmp_path / "out")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert sum(sizes.values()) < 0.5 * sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert "model.onnx_data" not in sizes or len(sizes) == 2


def test_output_file_stands_alone(lm_folder, cli, tmp_path):
    (tmp_path / "out").mkdir()
    cli.ok("quantize", lm_folder / "model.onnx", "-o", tmp_path / "out" / "small.onnx")
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"small.onnx", "small.onnx.data"}


def test_an_existing_output_is_replaced_whole(lm, cli, tmp_path):
    cli.ok("quantize", lm, "-o", tmp_path / "q.onnx", "--bits", 8)
    cli.ok("quantize", lm, "-o", tmp_path / "q.onnx", "--bits", 2)
    once = tmp_path / "once"
    cli.ok("quantize", lm, "-o", once / "q.onnx", "--bits", 2)
    assert {p.name: measure.digest(p) for p in tmp_path.glob("q.onnx*")} == measure.listing(once)


def lm_metrics(model: Path, reference: Path, rows: list[np.ndarray]) -> dict[str, float]:
    """Mean KL over tokens, same-top-1 share and perplexities, by definition."""
    kl, top, nll, nll_ref = [], [], [], []
    for ids, feed in zip(rows, zoo.lm_feeds(rows), strict=True):
        p, q = (measure.log_softmax(measure.run(m, [feed])["logits"]) for m in (reference, model))
        kl.append((np.exp(p) * (p - q)).sum(-1))
        top.append(p.argmax(-1) == q.argmax(-1))
        nll.append(-q[np.arange(ids.size - 1), ids[0, 1:]])
        nll_ref.append(-p[np.arange(ids.size - 1), ids[0, 1:]])
    mean = lambda parts: float(np.concatenate(parts).mean())  # noqa: E731
    return {"kl": mean(kl), "top1": mean(top), "ppl": np.exp(mean(nll)), "ppl_ref": np.exp(mean(nll_ref))}


def test_evaluate_a_language_model(lm, cli, tmp_path):
    rows = zoo.token_ids(6, seed=9)
    dev = zoo.array_folder(tmp_path / "dev", "input_ids", rows)
    cli.ok("quantize", lm, "-o", tmp_path / "q.onnx", "--bits", 3)
    found = cli.json("evaluate", tmp_path / "q.onnx", "--reference", lm, "--data", dev, "--samples", 6)
    wanted = lm_metrics(tmp_path / "q.onnx", lm, rows)
    assert wanted["kl"] > 0.01
    for name, value in wanted.items():
        share = found[name] / 100 if name == "top1" and found[name] > 1 else found[name]
        assert share == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert found["kl_se"] > 0
    assert found["tokens"] == 6 * 24
    words = cli.ok("evaluate", tmp_path / "q.onnx", "--reference", lm, "--data", dev, "--samples", 6).stdout.lower()
    assert "kl" in words
    assert "perplexity" in words or "ppl" in words
    assert "%" in words


def test_three_bits_in_the_file_are_evaluated_and_inspected_like_any_others(cli, ids, tmp_path):
    """From opset 18 on they take 3 bits there, before 4; float16 scales take 16 bits less for each group."""
    sizes, found = [], []
    for opset, half in ((17, False), (18, False), (18, True)):
        source, out = (tmp_path / f"{name}{opset}{half}.onnx" for name in "mq")
        zoo.language_model(source, opset=opset)
        options = ["--bits", 3, "--group-size", 16, "--accuracy-level", 0, "--option", f"half_scales={half}".lower()]
        cli.ok("quantize", source, "-o", out, *options)
        assert measure.recipe_of(out)["half_scales"] is half
        cli.ok("inspect", out)
        found.append(cli.json("evaluate", out, "--reference", source, "--data", ids)["kl"])
        before, after = ({t.name: t for t in onnx.load(path).graph.initializer} for path in (source, out))
        new = [t for name, t in after.items() if name not in before and "uint8" not in name]
        rows = inspect(source, Recipe(spec=Spec(3, 16), half_scales=half)).groups
        stored = sum(onnx.numpy_helper.to_array(t).nbytes for t in new)
        assert stored == sum(row.bytes_after for row in rows)
        sizes.append(stored)
    weights = sum(row.k * row.n for row in rows)
    assert sizes[0] - sizes[1] == weights // 8
    assert sizes[1] - sizes[2] == 2 * weights // 16
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[1], rel=0.05)


def test_evaluate_the_float_model_against_itself(lm, ids, cli):
    found = cli.json("evaluate", lm, "--reference", lm, "--data", ids)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] in (1.0, 100.0)
    assert found["ppl"] == pytest.approx(found["ppl_ref"])


def test_evaluate_equal_outputs_is_still_json(enc, xs, cli):
    """The SQNR of equal outputs is infinite, which JSON cannot say."""
    found = cli.json("evaluate", enc, "--reference", enc, "--data", xs)
    assert found["cosine"] == pytest.approx(1)
    assert found["sqnr_db"] is None or found["sqnr_db"] > 100


def test_evaluate_another_model(enc, xs, cli, tmp_path):
    cli.ok("quantize", enc, "-o", tmp_path / "q.onnx", "--bits", 4)
    found = cli.json("evaluate", tmp_path / "q.onnx", "--reference", enc, "--data", xs, "--samples", 12)
    a, b = (measure.run(m, zoo.float_feeds(12))["y"] for m in (enc, tmp_path / "q.onnx"))
    cosine = float(np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))
    assert found["sqnr_db"] == pytest.approx(measure.sqnr(a, b), rel=0.02)
    assert found["cosine"] == pytest.approx(cosine, abs=5e-3)


def test_auto_writes_the_best_and_reports_every_trial(lm, ids, cli, tmp_path):
    found = cli.json("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--tolerance", 100)
    assert found["met"] is True
    assert [trial["name"] for trial in found["trials"]] == ["RTN_G32ASYM"], "the first that meets it ends the run"
    assert found["best"] == "RTN_G32ASYM"
    assert Path(found["path"]) == tmp_path / "q.onnx"
    assert Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx")).method == "rtn"


def test_auto_not_met_exits_3_with_the_best_written(lm, ids, cli, tmp_path):
    found = cli.json("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--tolerance", 0, code=3)
    assert found["met"] is False
    assert [trial["name"] for trial in found["trials"]] == list(CONFIGS)
    best = min(found["trials"], key=lambda trial: trial["metric"])
    assert found["best"] == best["name"]
    written = Recipe.from_dict(measure.recipe_of(tmp_path / "q.onnx"))
    assert written.method == best["recipe"]["method"]
    assert (written.spec.group_size, written.lm_head) == (
        best["recipe"]["spec"]["group_size"],
        best["recipe"]["lm_head"],
    )
    table = cli("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--tolerance", 0)
    assert table.exit_code == 3
    assert all(name in table.stdout for name in CONFIGS)


def test_auto_leaves_nothing_but_the_output(lm_folder, ids, cli, tmp_path, monkeypatch):
    """Journal, trial models and statistics live in a temporary folder of the run, and go with it."""
    import tempfile

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = measure.listing(lm_folder)
    cli("quantize", lm_folder / "model.onnx", "-o", tmp_path / "out", "--auto", "--calib", ids)
    assert measure.listing(lm_folder) == before
    assert list(place.iterdir()) == []
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".onnx", ".data", ".json"}


EVAL = """
import onnx
LOG = "calls.log"
def score(path):
    model = onnx.load(path, load_external_data=False)
    low = any(node.op_type == "MatMulNBits" for node in model.graph.node)
    with open(LOG, "a") as file:
        file.write(f"{low}\\n")
    return 20.0 if low else 10.0
"""


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--higher-is-better"], 0),
        (["--lower-is-better"], 3),
        (["--lower-is-better", "--tolerance", "0.5"], 3),
        (["--lower-is-better", "--tolerance", "1.5"], 0),
        (["--lower-is-better", "--tolerance", "1.5", "--criterion", "absolute"], 3),
        (["--lower-is-better", "--tolerance", "11", "--criterion", "absolute"], 0),
    ],
    ids=str,
)
def test_eval_module_function(flags, code, enc, xs, cli, tmp_path, monkeypatch):
    (tmp_path / "my_eval.py").write_text(EVAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = cli.json(
        "quantize", enc, "-o", "q.onnx", "--auto", "--calib", xs, "--eval", "my_eval:score", *flags, code=code
    )
    assert found["met"] is (code == 0)
    assert found["baseline"] == 10.0
    assert {trial["metric"] for trial in found["trials"]} == {20.0}
    assert (tmp_path / "calls.log").read_text().split().count("False") == 1, "the float model is evaluated once"


def test_eval_is_found_in_the_folder_where_the_command_is_run(enc, xs, tmp_path):
    """The installed script has its own folder on sys.path, not the user's."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "onnx-woq"
    script.write_text("import sys\nfrom onnx_woq.cli import main\nsys.exit(main())\n")
    (tmp_path / "my_eval.py").write_text(EVAL)
    command = [
        sys.executable,
        script,
        "quantize",
        enc,
        "-o",
        "q.onnx",
        "--auto",
        "--calib",
        xs,
        "--eval",
        "my_eval:score",
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("name", ["my_eval", "my_eval:no_such", "no_such_module:score", ":", "my_eval:LOG"])
def test_eval_that_is_not_there(name, enc, xs, cli, tmp_path, monkeypatch):
    (tmp_path / "my_eval.py").write_text(EVAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = cli("quantize", enc, "-o", tmp_path / "q.onnx", "--auto", "--calib", xs, "--eval", name)
    assert result.exit_code == 2
    assert "--eval" in result.stderr or "module:function" in result.stderr or name in result.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_max_trials_objective_timeout_and_workdir(lm, ids, cli, tmp_path):
    common = ("quantize", lm, "-o", tmp_path / "q.onnx", "--auto", "--calib", ids, "--tolerance")
    found = cli.json(*common, 0, "--max-trials", 2, code=3)
    assert len(found["trials"]) == 2
    found = cli.json(*common, 100, "--objective", "smallest", "--workdir", tmp_path / "w")
    assert found["best"] == "GPTQ_G128ASYM"
    assert len(found["trials"]) == len(CONFIGS)
    again = cli.json(*common, 100, "--objective", "best", "--workdir", tmp_path / "w")
    assert all(trial["resumed"] for trial in again["trials"])
    assert again["best"] == min(again["trials"], key=lambda trial: trial["metric"])["name"]
    found = cli.json(*common, 0, "--timeout", 0.001, code=3)
    assert found["stopped"] == "timeout"


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantize", "MODEL"],
        ["quantize", "MODEL", "-o", "OUT", "--auto", "--config", "RTN_G32ASYM"],
        ["quantize", "MODEL", "-o", "OUT", "--config", "RTN_G32ASYM", "--recipe", "RECIPE"],
        ["quantize", "MODEL", "-o", "OUT", "--bits", "four"],
        ["quantize", "MODEL", "-o", "OUT", "--scheme", "round"],
        ["quantize", "MODEL", "-o", "OUT", "--no-such-option"],
        ["quantize", "MODEL", "-o", "OUT", "--include", "("],
        ["evaluate", "MODEL"],
        ["evaluate", "MODEL", "--reference", "MODEL"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(arguments, enc, cli, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(Recipe().to_dict()))
    places = {"MODEL": enc, "OUT": tmp_path / "out", "RECIPE": tmp_path / "r.json"}
    result = cli(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
