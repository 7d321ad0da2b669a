"""Bad input: a named error that says what to do, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_woq import OnnxWoqError, Recipe, Spec, evaluate, inspect, quantize, tune
from onnx_woq.errors import AlreadyQuantized, DataError, ModelError, NothingToQuantize, OutputError, RecipeError
from tests.support import measure
from tests.support.commands import ROOT
from tests.zoo import small as zoo

RTN, GPTQ = Recipe("rtn"), Recipe("gptq")


class Refusal:
    """Holds a call against the rule: the named error, its message, and an untouched folder."""

    def __init__(self, folder: Path, cli: Callable[..., object]) -> None:
        self.folder, self.cli = folder, cli

    def __call__(
        self,
        kind: type[OnnxWoqError],
        words: str | Iterable[str],
        model: Path,
        *flags: object,
        recipe: Recipe = RTN,
        data: object = None,
        output: Path | None = None,
        python: bool = True,
    ) -> str:
        words = [words] if isinstance(words, str) else list(words)
        before = measure.listing(self.folder)
        for out in [output] if output else [self.folder / "out" / "q.onnx", self.folder / "folder"]:
            if python:
                with pytest.raises(kind) as caught:
                    quantize(model, out, recipe, data)
                self.check(str(caught.value), words, before)
            result = self.cli("quantize", model, "-o", out, *flags)
            assert result.exit_code == 2, result.output
            assert result.stdout == "", "errors belong on stderr"
            self.check(result.stderr, words, before)
        return result.stderr

    def check(self, message: str, words: list[str], before: dict[str, str]) -> None:
        assert "Traceback" not in message
        flat = " ".join(message.replace("│", " ").split())
        for word in words:
            assert re.search(word, flat, re.IGNORECASE), f"{word!r} is not in {flat!r}"
        assert measure.listing(self.folder) == before, "something was written or lost"


@pytest.fixture
def refused(tmp_path: Path, cli: Callable[..., object]) -> Refusal:
    return Refusal(tmp_path, cli)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is no model\n" * 50,
        b"PK\x03\x04" + bytes(500),
        bytes(1000),
        b"\x08\x07",
        b'{"format": "json"}',
        b"\xff" * 99,
    ],
    ids=["empty", "text", "zip", "zeros", "header only", "json", "ones"],
)
def test_not_onnx(content, refused, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    refused(ModelError, r"m\.onnx", tmp_path / "m.onnx")


def test_an_onnx_file_without_a_graph_or_opset(refused, tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx.ModelProto(ir_version=8, producer_name="x").SerializeToString())
    refused(ModelError, r"m\.onnx", tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_truncated(share, refused, lm, tmp_path):
    content = lm.read_bytes()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * share)])
    refused(ModelError, r"m\.onnx", tmp_path / "m.onnx")


def test_no_such_file(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(ModelError, r"no_such\.onnx", tmp_path / "no_such.onnx")
    refused(ModelError, "empty", tmp_path / "empty")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A model whose weights are in weights.bin beside it."""
    return zoo.language_model(tmp_path / "m.onnx", external="weights.bin")


def test_missing_external_data(refused, split, tmp_path):
    (tmp_path / "weights.bin").unlink()
    refused(ModelError, r"weights\.bin", split)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_short_external_data(size, refused, split, tmp_path):
    content = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(content[:size])
    refused(ModelError, r"weights\.bin", split)


def relocated(model: Path, location: str, **more: str) -> Path:
    """The same model with every external tensor at `location`."""
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            elif entry.key in more:
                entry.value = more[entry.key]
    model.write_bytes(proto.SerializeToString())
    return model


@pytest.mark.parametrize("kind", ["up", "absolute", "down and up", "symlink"])
def test_external_data_outside_the_folder(kind, refused, tmp_path):
    """Even if it is there and would fit: a model from elsewhere must not read other people's files."""
    model = zoo.language_model(tmp_path / "in" / "m.onnx", external="weights.bin")
    (tmp_path / "in" / "sub").mkdir()
    secret = (tmp_path / "in" / "weights.bin").rename(tmp_path / "weights.bin")
    location = {
        "up": "../weights.bin",
        "absolute": str(secret),
        "down and up": "sub/../../weights.bin",
        "symlink": "link/weights.bin",
    }
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    refused(ModelError, ["outside|folder"], relocated(model, location[kind]))


@pytest.mark.parametrize(
    "more",
    [{"offset": "-4096"}, {"offset": "99999999"}, {"length": "99999999"}, {"length": "8"}, {"offset": "x"}],
    ids=str,
)
def test_external_data_of_impossible_extent(more, refused, split):
    refused(ModelError, ".", relocated(split, "weights.bin", **more))


def test_already_quantized(refused, lm, cli, tmp_path):
    quantize(lm, tmp_path / "m.onnx")
    refused(AlreadyQuantized, ["already quantized", "float"], tmp_path / "m.onnx")
    before = measure.listing(tmp_path)
    with pytest.raises(AlreadyQuantized):
        tune(tmp_path / "m.onnx", lambda _: 1.0, zoo.lm_feeds(zoo.token_ids(3)))
    assert measure.listing(tmp_path) == before


def test_no_eligible_matmul(refused, tmp_path):
    refused(NothingToQuantize, "MatMul", zoo.no_weights(tmp_path / "m.onnx"))


def test_nothing_of_the_name_that_is_included(refused, enc):
    refused(NothingToQuantize, "include", enc, "--include", "no such", recipe=Recipe(include=("no such",)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_without_a_tokenizer(suffix, refused, tmp_path):
    model = zoo.language_model(tmp_path / "m.onnx")
    file = tmp_path / f"calib.{suffix}"
    file.write_text('{"text": "hello world"}\n' * 200)
    refused(
        DataError, ["tokenizer", "--tokenizer"], model, "--algorithm", "GPTQ", "--calib", file, recipe=GPTQ, data=file
    )
    (tmp_path / "tok").mkdir()
    message = refused(
        DataError, "tok", model, "--algorithm", "GPTQ", "--calib", file, "--tokenizer", tmp_path / "tok", python=False
    )
    assert "tok" in message


def test_text_for_a_model_without_token_inputs(refused, enc, tmp_path):
    zoo.byte_tokenizer(tmp_path)
    shutil.copy(enc, tmp_path / "m.onnx")
    file = tmp_path / "calib.txt"
    file.write_text("hello world\n" * 200)
    refused(
        DataError,
        r"\bx\b|input_ids",
        tmp_path / "m.onnx",
        "--algorithm",
        "GPTQ",
        "--calib",
        file,
        recipe=GPTQ,
        data=file,
    )


@pytest.mark.parametrize(
    "config", [{"tokenizer.json": "{"}, {"tokenizer.json": "{}"}, {"tokenizer_config.json": "{"}], ids=str
)
def test_a_broken_tokenizer(config, refused, tmp_path):
    model = zoo.language_model(tmp_path / "m.onnx")
    (tmp_path / "t").mkdir()
    for name, content in config.items():
        (tmp_path / "t" / name).write_text(content)
    file = tmp_path / "calib.txt"
    file.write_text("hello world\n" * 200)
    refused(
        DataError,
        "tokenizer",
        model,
        "--algorithm",
        "GPTQ",
        "--calib",
        file,
        "--tokenizer",
        tmp_path / "t",
        python=False,
    )


def test_a_tokenizer_of_another_model(refused, tmp_path):
    """Ids beyond the vocabulary must be found before the runtime finds them."""
    net = zoo.Net()
    h = net.op("Gather", net.const("table", zoo.mixing(1, 50, 32)), "input_ids", out="h")
    net.matmul(h, zoo.weight(2, 32, 50), "logits")
    model = net.save(tmp_path / "m.onnx", {"input_ids": (zoo.I64, ["b", "s"])}, {"logits": (zoo.F32, ["b", "s", 50])})
    zoo.byte_tokenizer(tmp_path)
    file = tmp_path / "calib.txt"
    file.write_text("hello world\n" * 200)
    refused(DataError, "vocabulary|token|id", model, "--algorithm", "GPTQ", "--calib", file, recipe=GPTQ, data=file)


WRONG_FEEDS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "wrong name": ({"inputs": np.ones((4, 8), np.int64)}, "input_ids"),
    "float ids": ({"input_ids": np.full((4, 8), 0.5, np.float32)}, "input_ids"),
    "text ids": ({"input_ids": np.array([["a", "b"]] * 4)}, "input_ids"),
    "too many axes": ({"input_ids": np.ones((4, 8, 2, 3), np.int64)}, "input_ids"),
    "ids beyond the vocabulary": ({"input_ids": np.full((4, 8), 10_000, np.int64)}, "input_ids|vocabulary|256"),
    "negative ids": ({"input_ids": np.full((4, 8), -300, np.int64)}, "input_ids|vocabulary|256"),
    "mask of another length": (
        {"input_ids": np.ones((4, 8), np.int64), "attention_mask": np.ones((4, 7), np.int64)},
        "attention_mask|input_ids",
    ),
    "empty": ({"input_ids": np.ones((0, 8), np.int64)}, "sample|empty"),
    "no tokens": ({"input_ids": np.ones((4, 0), np.int64)}, "input_ids|empty|token|sample"),
}


@pytest.mark.parametrize("case", WRONG_FEEDS)
def test_wrong_inputs_of_a_language_model(case, refused, tmp_path):
    arrays, words = WRONG_FEEDS[case]
    model = zoo.language_model(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **arrays)
    rows = max(len(a) for a in arrays.values())
    data = [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(rows)]
    refused(DataError, words, model, "--algorithm", "GPTQ", "--calib", tmp_path / "d.npz", recipe=GPTQ, data=data)


@pytest.mark.parametrize("shape", [(4, 8, 63), (4, 64, 8), (64,), (4, 8, 64, 1, 1)], ids=str)
def test_wrong_shapes_of_a_float_input(shape, refused, tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones(shape, np.float32))
    data = [{"x": np.ones(shape, np.float32)}]
    refused(
        DataError,
        [r"\bx\b", "64"],
        model,
        "--algorithm",
        "AWQ",
        "--calib",
        tmp_path / "d.npz",
        recipe=Recipe("awq"),
        data=data,
    )


@pytest.mark.parametrize("data", [[], (), iter(()), [None], [object()], 7, [{}], [()]], ids=measure.stable_id)
def test_data_that_is_none(data, enc, tmp_path):
    before = measure.listing(tmp_path)
    with pytest.raises(DataError):
        quantize(enc, tmp_path / "q.onnx", GPTQ, data)
    assert measure.listing(tmp_path) == before


@pytest.mark.parametrize("name", ["d.npz", "d.npy", "d.txt", "d.jsonl", "folder", "d.csv", "d.nothing"])
def test_calibration_files_that_hold_nothing(name, refused, lm_folder, tmp_path):
    """Empty, not what the suffix says, or not there at all."""
    for content in (None, b"", b"\x93garbage"):
        if name == "folder":
            (tmp_path / name).mkdir(exist_ok=True)
        elif content is not None and name != "d.nothing":
            (tmp_path / name).write_bytes(content)
        elif content and name.endswith((".txt", ".jsonl")):
            continue
        place = tmp_path / name
        refused(
            DataError,
            re.escape(name),
            lm_folder / "model.onnx",
            "--algorithm",
            "GPTQ",
            "--calib",
            place,
            recipe=GPTQ,
            data=place,
        )


def test_pickles_are_not_opened(refused, enc, tmp_path):
    shutil.copy(enc, tmp_path / "m.onnx")
    np.save(tmp_path / "d.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    refused(
        DataError,
        r"d\.npy",
        tmp_path / "m.onnx",
        "--algorithm",
        "GPTQ",
        "--calib",
        tmp_path / "d.npy",
        recipe=GPTQ,
        data=tmp_path / "d.npy",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("algorithm", ["RTN", "GPTQ"])
def test_weights_that_are_not_finite(value, algorithm, refused, tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx")
    proto = onnx.load(model)
    for i, tensor in enumerate(proto.graph.initializer):
        if tensor.name == "W_right":
            w = numpy_helper.to_array(tensor).copy()
            w[3, 5] = value
            proto.graph.initializer[i].CopyFrom(numpy_helper.from_array(w, tensor.name))
    onnx.save(proto, model)
    np.savez(tmp_path / "d.npz", x=np.ones((4, 8, 64), np.float32))
    data = [{"x": np.ones((1, 8, 64), np.float32)}] * 4
    refused(
        ModelError,
        "W_right",
        model,
        "--algorithm",
        algorithm,
        "--calib",
        tmp_path / "d.npz",
        recipe=Recipe(algorithm.lower()),
        data=data,
    )


def test_activations_that_are_not_finite(refused, tmp_path):
    model = zoo.broken_activations(tmp_path / "m.onnx")
    data = zoo.float_feeds(4, width=48)
    np.savez(tmp_path / "d.npz", x=np.concatenate([feed["x"] for feed in data]))
    for algorithm in ("GPTQ", "AWQ"):
        recipe = Recipe(algorithm.lower())
        refused(
            OnnxWoqError,
            "root",
            model,
            "--algorithm",
            algorithm,
            "--calib",
            tmp_path / "d.npz",
            recipe=recipe,
            data=data,
        )


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_calibration_inputs_that_are_not_finite(value, refused, tmp_path):
    model = zoo.encoder(tmp_path / "m.onnx")
    x = np.ones((4, 8, 64), np.float32)
    x[2, 3, 4] = value
    np.savez(tmp_path / "d.npz", x=x)
    refused(
        OnnxWoqError,
        r"\bx\b",
        model,
        "--algorithm",
        "GPTQ",
        "--calib",
        tmp_path / "d.npz",
        recipe=GPTQ,
        data=[{"x": row[None]} for row in x],
    )


@pytest.mark.parametrize(
    ("options", "flags", "words"),
    [
        ({"bits": 0}, ["--bits", 0], ["bits", "1 to 8|1.*8"]),
        ({"bits": 9}, ["--bits", 9], ["bits", "1 to 8|1.*8"]),
        ({"bits": -4}, ["--bits", -4], ["bits", "1 to 8|1.*8"]),
        ({"group_size": 0}, ["--group-size", 0], ["group.size", "16"]),
        ({"group_size": -2}, ["--group-size", -2], ["group.size", "16"]),
    ],
    ids=str,
)
def test_grids_out_of_range(options, flags, words, refused, enc):
    with pytest.raises(RecipeError) as caught:
        Spec(**options)
    for word in words:
        assert re.search(word, str(caught.value))
    refused(RecipeError, words, enc, *flags, python=False)


@pytest.mark.parametrize("size", [7, 20, 33])
def test_grids_that_a_target_cannot_hold(size, refused, enc):
    """The message names a size and a target that can; nothing is wrong with the spec itself."""
    recipe = Recipe("rtn", Spec(group_size=size))
    words = ["group.size", str(size), "16", "--target qdq"]
    refused(RecipeError, words, enc, "--group-size", size, recipe=recipe)
    with pytest.raises(RecipeError, match="--target qdq"):
        inspect(enc, recipe)


@pytest.mark.parametrize(
    "options", [{"bits": 4.0}, {"bits": "4"}, {"bits": True}, {"group_size": 32.5}, {"symmetric": "no"}], ids=str
)
def test_grids_of_the_wrong_type(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        Spec(**options)


@pytest.mark.parametrize(
    ("name", "near"),
    [("RTN_G32", "RTN_G32ASYM"), ("GPTQ_G64ASYM", "GPTQ_G32ASYM"), ("awq", "AWQ_G32ASYM"), ("zzz", "AWQ_G32ASYM")],
)
def test_unknown_config(name, near, refused, enc, tmp_path):
    with pytest.raises(RecipeError, match=near):
        quantize(enc, tmp_path / "q.onnx", name)
    refused(RecipeError, [re.escape(name), near], enc, "--config", name, python=False)


@pytest.mark.parametrize(
    ("recipe", "near"),
    [
        ('{"metod": "gptq"}', "method"),
        ('{"method": "gptqq"}', "gptq"),
        ('{"method": "gptq", "options": {"actordre": true}}', "actorder"),
        ('{"method": "rtn", "options": {"actorder": true}}', "enable_mse_search"),
        ('{"method": "gptq", "options": {"actorder": "yes"}}', "actorder"),
        ('{"method": "gptq", "options": {"percdamp": -1}}', "percdamp"),
        ('{"method": "gptq", "options": {"block_size": 0}}', "block_size"),
        ('{"spec": {"bit": 4}}', "bits"),
        ('{"spec": {"bits": 44}}', "1 to 8"),
        ('{"spec": 4}', "spec"),
        ('{"options": []}', "options"),
        ('{"overrides": {"down": {"group": 32}}}', "group_size"),
        ('{"include": ["("]}', "include"),
        ('{"include": 3}', "include"),
        ('{"exclude": [3]}', "exclude"),
        ('{"accuracy_level": 7}', "accuracy_level"),
        ('{"nsamples": 0}', "nsamples"),
        ('{"lm_head": "yes"}', "lm_head"),
        ("[1, 2]", "recipe"),
        ("{", r"r\.json"),
        ("", r"r\.json"),
    ],
)
def test_recipes_that_make_no_sense(recipe, near, refused, enc, tmp_path):
    (tmp_path / "r.json").write_text(recipe)
    refused(RecipeError, near, enc, "--recipe", tmp_path / "r.json", python=False)


def test_recipe_files_that_are_no_recipe(refused, enc, tmp_path):
    (tmp_path / "r.toml").write_text("method = \n")
    refused(RecipeError, r"r\.toml", enc, "--recipe", tmp_path / "r.toml", python=False)
    (tmp_path / "r.yaml").write_text("method: rtn\n")
    refused(RecipeError, r"r\.yaml", enc, "--recipe", tmp_path / "r.yaml", python=False)
    refused(RecipeError, r"no\.json", enc, "--recipe", tmp_path / "no.json", python=False)


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("actordre=true", "actorder"),
        ("actorder", "="),
        ("actorder=7", "actorder"),
        ("percdamp=high", "percdamp"),
        ("=", "actorder"),
    ],
)
def test_unknown_options_on_the_command_line(option, near, refused, enc):
    refused(RecipeError, near, enc, "--config", "GPTQ_G32ASYM", "--option", option, "--calib", "random", python=False)


def test_unknown_words_for_choices(refused, enc):
    refused(RecipeError, "GPTQ", enc, "--algorithm", "GTPQ", python=False)
    refused(RecipeError, "asym", enc, "--scheme", "asymm", python=False)
    refused(RecipeError, "accuracy.level|0.*4", enc, "--accuracy-level", 9, python=False)


@pytest.mark.parametrize("how", ["same path", "symlink", "hard link", "folder", "other spelling", "link to the folder"])
def test_output_equal_to_input(how, cli, tmp_path):
    model = zoo.language_model(tmp_path / "m" / "model.onnx", external="model.onnx.data")
    (tmp_path / "other").mkdir()
    (tmp_path / "s.onnx").symlink_to(model)
    os.link(model, tmp_path / "h.onnx")
    (tmp_path / "l").symlink_to(tmp_path / "m")
    place = {
        "same path": model,
        "symlink": tmp_path / "s.onnx",
        "hard link": tmp_path / "h.onnx",
        "folder": tmp_path / "m",
        "other spelling": tmp_path / "other" / ".." / "m" / "model.onnx",
        "link to the folder": tmp_path / "l",
    }
    before = measure.listing(tmp_path)
    with pytest.raises(OutputError, match="input"):
        quantize(model, place[how])
    for flags in ([], ["--auto", "--calib", "random"]):
        result = cli("quantize", model, "-o", place[how], *flags)
        assert result.exit_code == 2
        assert "input" in result.stderr
    assert measure.listing(tmp_path) == before


@pytest.mark.parametrize("through", ["file", "symlink"])
def test_the_output_data_file_never_lands_on_the_data_being_read(through, tmp_path):
    """The input reads q.onnx.data; q.onnx beside it would write its own weights there."""
    model = zoo.language_model(tmp_path / "m.onnx", external="q.onnx.data")
    if through == "symlink":
        (tmp_path / "q.onnx.data").rename(tmp_path / "blob")
        (tmp_path / "q.onnx.data").symlink_to(tmp_path / "blob")
    data = zoo.lm_feeds(zoo.token_ids(2))
    if through == "file":
        logits, before = measure.run(model, data)["logits"], measure.listing(tmp_path)
    else:
        logits, before = None, measure.listing(tmp_path)
    try:
        quantize(model, tmp_path / "q.onnx")
    except OnnxWoqError:
        assert measure.listing(tmp_path) == before
    else:
        assert measure.listing(tmp_path).items() >= before.items()
        assert logits is None or np.array_equal(measure.run(model, data)["logits"], logits)


@pytest.mark.parametrize("where", ["/proc/no/such/q.onnx", "a file/q.onnx", "/dev/full/q.onnx", "folder.onnx"])
def test_unwritable_places(where, lm, cli, tmp_path):
    (tmp_path / "a file").write_text("")
    (tmp_path / "folder.onnx" / "lm.onnx").mkdir(parents=True)
    place = Path(where) if where.startswith("/") else tmp_path / where
    before = measure.listing(tmp_path)
    with pytest.raises(OutputError):
        quantize(lm, place)
    for flags in ([], ["--auto", "--calib", "random"]):
        result = cli("quantize", lm, "-o", place, *flags)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert str(Path(where).name) in result.stderr or "output" in result.stderr
    assert measure.listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(lm, cli, tmp_path):
    (tmp_path / "ro").mkdir(mode=0o500)
    for place in (tmp_path / "ro" / "q.onnx", tmp_path / "ro" / "deep"):
        with pytest.raises(OutputError, match="writ"):
            quantize(lm, place)
        assert cli("quantize", lm, "-o", place).exit_code == 2
    assert list((tmp_path / "ro").iterdir()) == []


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from onnx_woq.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [2_000, 30_000])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_full_disk_leaves_what_was_there(limit, existing, lm_folder, tmp_path):
    """No file may grow beyond the limit: the write fails on the way."""
    out = tmp_path / "out"
    if existing:
        quantize(lm_folder / "model.onnx", out, Recipe(spec=Spec(8, 32)))
    (lm_folder / "vocab.txt").write_text("x" * 2_500)
    before = measure.listing(tmp_path)
    command = [sys.executable, "-c", FULL, str(limit), "quantize", str(lm_folder / "model.onnx"), "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out" in done.stderr
    assert done.stdout == ""
    assert measure.listing(tmp_path) == before


def test_no_space_left_while_replacing(lm, tmp_path, monkeypatch):
    """The very last step fails: the old output is still whole, and what is finished is kept for --resume."""
    quantize(lm, tmp_path / "q.onnx")
    before = measure.listing(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "rename", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            try:
                quantize(lm, tmp_path / "q.onnx", Recipe(spec=Spec(8, 32)))
            except OutputError as error:
                assert "space" in str(error)  # noqa: PT017 - either outcome is right as long as nothing is lost
                assert "--resume" in str(error)  # noqa: PT017
                now = measure.listing(tmp_path)
                assert {name: now[name] for name in now if "partial" not in name} == before
            else:
                measure.session(tmp_path / "q.onnx")
        quantize(lm, tmp_path / "q.onnx", Recipe(spec=Spec(8, 32)), resume=True)
        measure.session(tmp_path / "q.onnx")
        quantize(lm, tmp_path / "q.onnx")
        assert measure.listing(tmp_path) == before


@pytest.mark.parametrize("mode", ["config", "auto", "evaluate"])
@pytest.mark.parametrize("form", ["folder", "txt"])
def test_more_samples_than_there_are(mode, form, lm_folder, cli, tmp_path):
    model = lm_folder / "model.onnx"
    data = tmp_path / "data"
    if form == "txt":
        data = tmp_path / "d.txt"
        data.write_text("abcdefgh" * 20)  # 160 tokens: 5 samples of 32
    else:
        zoo.array_folder(data, "input_ids", zoo.token_ids(5))
    before = measure.listing(tmp_path)
    common = ["--samples", 50, "--seqlen", 32]
    commands = {
        "config": ["quantize", model, "-o", tmp_path / "q.onnx", "--config", "GPTQ_G32ASYM", "--calib", data],
        "auto": ["quantize", model, "-o", tmp_path / "q.onnx", "--auto", "--calib", data],
        "evaluate": ["evaluate", model, "--reference", model, "--data", data],
    }
    result = cli(*commands[mode], *common)
    assert result.exit_code == 2
    assert "sample" in result.stderr
    assert re.search(r"\b[45]\b", result.stderr), "says how many there are"
    assert measure.listing(tmp_path) == before


def test_more_samples_than_there_are_in_python(lm, lm_data):
    with pytest.raises(DataError, match="sample"):
        evaluate(lm, lm, lm_data[:3], samples=10)
    with pytest.raises(DataError, match="sample"):
        tune(lm, lambda _: 1.0, lm_data[:3], samples=10)


@pytest.mark.parametrize(
    "flags",
    [
        ["--samples", 0],
        ["--samples", -1],
        ["--seqlen", 0],
        ["--tolerance", "nan", "--auto"],
        ["--max-trials", 0, "--auto"],
    ],
    ids=str,
)
def test_numbers_out_of_range(flags, refused, enc, tmp_path):
    shutil.copy(enc, tmp_path / "m.onnx")
    refused(
        RecipeError,
        flags[0].strip("-").replace("-", "."),
        tmp_path / "m.onnx",
        *flags,
        "--calib",
        "random",
        python=False,
    )


def test_evaluate_on_models_that_do_not_fit(lm, enc, cli, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.concatenate(zoo.token_ids(8)))
    (tmp_path / "bad.onnx").write_bytes(b"no")
    for model, reference in (
        (enc, lm),
        (tmp_path / "bad.onnx", lm),
        (lm, tmp_path / "bad.onnx"),
        (lm, tmp_path / "none.onnx"),
    ):
        result = cli("evaluate", model, "--reference", reference, "--data", tmp_path / "d.npz")
        assert result.exit_code == 2
        assert result.stderr
        assert result.stdout == ""


def test_inspect_refuses_the_same_models(cli, split, tmp_path):
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "bad.onnx").write_bytes(b"no")
    for model in (split, tmp_path / "bad.onnx", tmp_path / "none.onnx"):
        result = cli("inspect", model)
        assert result.exit_code == 2
        assert model.name in result.stderr or "weights.bin" in result.stderr
        assert result.stdout == ""


def test_a_failed_tune_leaves_nothing_behind(lm, lm_data, tmp_path):
    """Wrong data is found before the work folder is made, and no trial runs."""
    calls: list[Path] = []
    before = measure.listing(tmp_path)
    with pytest.raises(DataError):
        tune(
            lm,
            lambda p: calls.append(p) or 1.0,
            [{"wrong": np.ones(3)}],
            workdir=tmp_path / "w",
            output=tmp_path / "q.onnx",
        )
    assert not calls
    assert measure.listing(tmp_path) == before
