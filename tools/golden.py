"""Whether a change of the package changes anything that its users have: files, commands, journals, results.

    python tools/golden.py record OUT.json [--tree DIR]   # what the package in DIR (this checkout) does, as hashes
    python tools/golden.py compare REV                    # this checkout against a revision; exit code 1: they differ

Both run everything through the command line and the names that `onnx_woq` exports, on the shipped model and on two
small ones (`golden_cases.py`); `compare` also lets this checkout go on with what the revision has left unfinished.
Folders, seconds, memory and command lines are no part of a hash, nor is the package's version where it differs. A text
of `--help` that differs is reported and not counted. With `--keep DIR` before the action everything stays in DIR:
`diff -r DIR/before/texts DIR/now/texts` shows what has become of what commands say. Takes about two minutes of
processor time for each tree.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import golden_cases as cases
from golden_cases import ROOT, TUNINGS, UNFINISHED

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ONNX_WOQ_THREADS"), "1")
# What an editable installation offers must not stand in for modules that a tree lacks.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
ENTRY = f"{ALONE}; from onnx_woq.cli import main; main()"


def normalised(text: str, places: Mapping[str, str]) -> str:
    """`text` without what differs from run to run: folders (as `places` call them), seconds, memory, command lines."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    text = re.sub(r'("seconds": )[^,\s}]+', r"\g<1>0", text)
    text = re.sub(r'("command": )"(?:[^"\\]|\\.)*"', r'\g<1>""', text)
    text = re.sub(r"(>command</td><td[^>]*><code>).*?(?=</code>)", r"\g<1>", text)
    text = re.sub(r'<td class="number">\d+\.\d</td>', '<td class="number">0</td>', text)  # seconds of a trial
    text = re.sub(r"\b\d+\.\d s\b", "0 s", text)
    return re.sub(r"(about |the rest )[\d.]+ [MG]B", r"\g<1>0 MB", text)


def page_content(text: str) -> str:
    """The part of a report in HTML that is about the run: without plotly, and without seconds in the history."""

    def timeless(found: re.Match[str]) -> str:
        chart = json.loads(found[2])
        for trace in chart["data"]:
            if trace.get("yaxis") == "y3":
                trace["y"] = []
        return found[1] + json.dumps(chart)

    return re.sub(r'(id="history-data">)(.*?)(?=</script>)', timeless, text[: text.index("</main>")], flags=re.DOTALL)


def without_version(text: str, version: str) -> str:
    """`text` with the package's version left out."""
    return re.sub(rf"(?<![\w.]){re.escape(version)}(?![\w.])", "", text)


def model_without_version(content: bytes) -> bytes:
    """An .onnx file's content with its `onnx_woq.version` left empty."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    for entry in model.metadata_props:
        entry.value = "" if entry.key == "onnx_woq.version" else entry.value
    return bytes(model.SerializeToString(deterministic=True))


def hash_of(content: str | bytes) -> str:
    """A hash of a text or of bytes."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()


@dataclass
class Record:
    """What a tree does, by name.

    Attributes:
        version: of the package.
        results: hashes of what counts.
        unversioned: the same with the version left out.
        help: hashes of help texts.
        broken: what is wrong by itself, whatever another tree does.
    """

    version: str
    results: dict[str, str] = field(default_factory=dict)
    unversioned: dict[str, str] = field(default_factory=dict)
    help: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def verdicts(before: Record, now: Record) -> dict[str, str]:
    """Name -> "equal", "different", "gone" or "new" of all results, and "broken" of what is wrong by itself."""
    same = before.version == now.version
    old, new = (record.results if same else record.unversioned for record in (before, now))
    found = {name: "gone" if name not in new else "equal" if new[name] == old[name] else "different" for name in old}
    found |= {name: "new" for name in new if name not in old}
    return found | dict.fromkeys([*before.broken, *now.broken], "broken")


def table(found: Mapping[str, str]) -> str:
    """One line for each name, what is not equal at the end, and a sum."""
    rows = sorted(found.items(), key=lambda row: row[1] != "equal")
    other = sum(verdict != "equal" for verdict in found.values())
    return "\n".join([*(f"{verdict:<9}  {name}" for name, verdict in rows), f"{other} of {len(found)} are not equal"])


def exit_code(found: Mapping[str, str]) -> int:
    """0 if everything is equal, otherwise 1."""
    return int(any(verdict != "equal" for verdict in found.values()))


class Recorder:
    """Runs things in this process, whose package is that of a tree, and writes down what comes of them.

    Attributes:
        record: what has come of them.
        work: a folder of its own.
        places: folder -> what it is called in texts.
    """

    def __init__(self, tree: Path, work: Path, begun: Path) -> None:
        from importlib.metadata import version

        self.record, self.work = Record(version("onnx-woq")), work
        self.places = {str(work): "<work>", str(begun): "<work>", str(Path.cwd()): "<inputs>", str(tree): "<tree>"}

    def says(self, name: str, text: str) -> None:
        """Records a text, and leaves it for people."""
        text = normalised(text, self.places)
        self.record.results[name] = hash_of(text)
        self.record.unversioned[name] = hash_of(without_version(text, self.record.version))
        place = self.work / "texts" / (re.sub(r"[^\w]+", "-", name) + ".txt")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")

    def writes(self, name: str, folder: Path, but: str = "") -> str:
        """Records all files in `folder`, hidden ones too, without those below a folder `but`; gives their hash."""
        with_version, without = [], []
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and but not in path.parts):
            content = path.read_bytes()
            bare = model_without_version(content) if path.suffix == ".onnx" else content
            if path.suffix in (".json", ".jsonl", ".html") or path.name == "journal":
                text = content.decode()
                text = normalised(page_content(text) if path.suffix == ".html" else text, self.places)
                content, bare = text.encode(), without_version(text, self.record.version).encode()
            with_version.append(f"{path.relative_to(folder)} {hash_of(content)}")
            without.append(f"{path.relative_to(folder)} {hash_of(bare)}")
        self.record.unversioned[name] = hash_of("\n".join(without))
        self.record.results[name] = hash_of("\n".join(with_version))
        return self.record.results[name]

    def runs(self, name: str, *arguments: object, alone: bool = False) -> str:
        """Records what a command says, in this process or in one of its own; gives its standard output."""
        code, out, err = (called_alone if alone else called)([str(argument) for argument in arguments])
        self.says(name, f"exit code {code}\n{out}\n{err}")
        return out

    def must(self, right: bool, otherwise: str) -> None:
        """Records as broken what is not right."""
        self.record.broken += [] if right else [otherwise]

    def tries(self, step: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Runs one of the steps below; what it raises is printed and does not end the others."""
        try:
            step(self, *arguments, **options)
        except Exception as error:
            traceback.print_exc()
            self.must(False, f"{step.__name__} ended with {type(error).__name__}")


def called(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Calls the console entry in this process: exit code, standard output and error."""
    from onnx_woq.cli import main

    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["onnx-woq", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def called_alone(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Calls the console entry in a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", ENTRY, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def commands(to: Recorder) -> None:
    """Each command, in a process of its own and in this one; help; mistakes."""
    for command in cases.COMMANDS:
        code, text, err = called_alone([*filter(None, [command]), "--help"])
        to.record.help[f"onnx-woq {command}".strip()] = hash_of(text)
        to.must(code == 0, f"{command} --help: {err}")
    for kind, flags in (("json", ["--json"]), ("html", [])):
        out = to.work / kind / "q.onnx"
        made = ("-o", out, *cases.GPTQ, *cases.DATA, "--report", out.with_suffix(f".{kind}"), *flags)
        judged = ("--reference", "demo", "--data", "dev.txt", *cases.AMOUNT, *flags)
        alone = kind == "json"
        to.runs(f"configs {kind}", "configs", *flags, alone=alone)
        to.runs(f"inspect {kind}", "inspect", "demo/model.onnx", *flags, alone=alone)
        to.runs(f"quantize {kind}", "quantize", "demo/model.onnx", *made, alone=alone)
        to.writes(f"quantize {kind}: files", out.parent)
        to.runs(f"evaluate {kind}", "evaluate", out, *judged, alone=alone)
    for name, wrong in cases.MISTAKES.items():
        to.runs(f"mistake: {name}", "quantize", "demo", "-o", to.work / "mistake" / "q.onnx", *wrong)
    to.must(not (to.work / "mistake").exists(), "a mistake wrote something")


def quantized(to: Recorder) -> None:
    """One model for each preset, option and grid."""
    from onnx_woq import PRESETS

    def made(name: str, model: str, *flags: object) -> None:
        out = to.work / re.sub(r"\W+", "-", name)
        to.runs(name, "quantize", model, "-o", out / "q.onnx", *flags)
        to.writes(f"{name}: files", out)

    for preset in PRESETS:
        made(f"preset {preset}", "demo", "--config", preset, *cases.DATA)
    for name, flags in cases.OPTIONS.items():
        made(f"option {name}", "demo", *flags, *cases.DATA)
    to.runs("folder", "quantize", "demo", "-o", to.work / "folder", "--json")
    to.writes("folder: files", to.work / "folder")
    for model in ("encoder", "tied"):
        to.runs(f"{model}: inspect", "inspect", f"{model}.onnx", "--embedding-bits", 4, "--json")
        made(f"{model} GPTQ", f"{model}.onnx", *cases.GPTQ, "--calib", f"{model}-data", "--embedding-bits", 4)
        for bits, scheme, group in cases.GRIDS:
            grid = ("--bits", bits, "--scheme", scheme, "--group-size", group, "--embedding-bits", bits)
            made(f"{model} {bits} bits {scheme} {group}", f"{model}.onnx", *grid)


def tuned(to: Recorder, folder: Path, title: str, *, resuming: bool = False) -> None:
    """Tuning runs and mixes in `folder`, their reports and journals; `resuming`, all trials are in these already."""
    for name, (work, flags) in TUNINGS.items():
        out = ("-o", folder / name, "--workdir", folder / work, "--report", folder / name / "report.html", "--json")
        said = to.runs(f"{title} {name}", "quantize", "demo", *out, *flags, *cases.DATA)
        again = [trial["name"] for trial in json.loads(said)["trials"] if not trial["resumed"]]
        to.must(not (resuming and again), f"{title} {name}: {', '.join(again)} tried again")
        to.writes(f"{title} {name}: files", folder / name)
    for work in sorted({work for work, _ in TUNINGS.values()}):
        to.writes(f"{title}, {work}: journal and models", folder / work)


def python(to: Recorder) -> None:
    """What the names of the package do in Python."""
    import numpy as np
    from metric import size  # type: ignore[import-not-found]  # written by `make_inputs`

    from onnx_woq import PRESETS, Recipe, Spec, evaluate, inspect, quantize, tune

    out, model = to.work / "python", "encoder.onnx"
    feeds = [dict(np.load(path)) for path in sorted(Path("encoder-data").iterdir())]
    recipe = Recipe("awq", Spec(bits=3, group_size=64), options={"folding": True}, overrides={"y": Spec(8, 16)})
    found: dict[str, Any] = {
        "PRESETS": {name: preset.to_dict() | {"hash": preset.fingerprint()} for name, preset in PRESETS.items()},
        "quantize": quantize(model, out / "q.onnx", recipe, feeds).to_dict(),
        "inspect": inspect(model, recipe).to_dict(),
        "evaluate": vars(evaluate(out / "q.onnx", model, feeds)),
        "tune": tune(
            model, size, feeds, configs=[recipe, "RTN_G32ASYM", Recipe("gptq")], higher_is_better=False, tolerance=0.5,
            objective="best", output=out / "t.onnx", workdir=out / "work",
        ).to_dict(),
    }  # fmt: skip
    for name, value in found.items():
        to.says(f"python {name}", json.dumps(value, indent=1, default=str))
    to.writes("python: files", out)


def begin(work: Path, name: str) -> None:
    """Begins a run that is killed on the way."""
    from onnx_woq import Recipe, quantize

    def stop(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("solve", cases.KILLED_AT):
            os.kill(os.getpid(), signal.SIGKILL)

    out = work / "begun" / name / "q.onnx"
    quantize("demo", out, Recipe("gptq", **UNFINISHED[name]), "calib.txt", samples=8, seqlen=64, progress=stop)


def resumed(to: Recorder, begun: Path, name: str) -> None:
    """What comes of going on with a run that was killed and lies in `begun`."""
    fields = UNFINISHED[name]
    flags = [f"--option={field}={json.dumps(value)}" for field, value in fields.items()]
    made = ("quantize", "demo", *cases.GPTQ, *flags, *cases.DATA)
    whole, again, other = (to.work / "resumed" / name / how for how in ("whole", "by command", "in Python"))
    places = [again, other]
    for place in places:
        shutil.copytree(begun / "begun" / name, place)
    to.runs(f"resume {name}", *made, "-o", again / "q.onnx", "--resume")
    solved = _resumed_in_python(other, fields)
    to.must(0 < solved < cases.TAPS, f"resume {name}: {solved} of {cases.TAPS} taps are solved again")
    to.says(f"resume {name}: solves", str(solved))
    if begun == to.work:
        to.runs(f"resume {name}, whole", *made, "-o", whole / "q.onnx")
        places.append(whole)
    files = {to.writes(f"resume {name}, {place.name}: files", place) for place in places}
    to.must(len(files) == 1, f"resume {name}: not what an uninterrupted run writes")


def tuned_again(to: Recorder, begun: Path) -> None:
    """What comes of going on with work folders of tuning in `begun`, which are finished."""
    for work in {work for work, _ in TUNINGS.values()}:
        shutil.copytree(begun / "tuned" / work, to.work / "resumed" / "tuned" / work)
    tuned(to, to.work / "resumed" / "tuned", "resume tune", resuming=True)


def _resumed_in_python(folder: Path, fields: Mapping[str, Any]) -> int:
    """Goes on with a run that was killed; gives how many taps are solved."""
    from onnx_woq import Recipe, quantize

    stages: list[str] = []
    more = {"samples": 8, "seqlen": 64, "resume": True, "progress": lambda stage, *_: stages.append(stage)}
    quantize("demo", folder / "q.onnx", Recipe("gptq", **fields), "calib.txt", **more)  # type: ignore[arg-type]
    return stages.count("solve")


def session(tree: Path, work: Path, begun: Path) -> None:
    """Records a tree, or how it goes on with what another one has begun; runs in a process of its own."""
    to = Recorder(tree, work, begun)
    if begun == work:
        to.tries(commands)
        to.tries(quantized)
        to.tries(tuned, work / "tuned", "tune")
        metric = ("quantize", "encoder.onnx", "-o", work / "metric.onnx", "--calib", "encoder-data", *cases.BY_METRIC)
        to.runs("tune by a metric", *metric)
        to.tries(python)
        for name in UNFINISHED:
            to.writes(f"killed {name}: files", work / "begun" / name, but="states")  # these run ahead, by chance
    for name in UNFINISHED:
        to.tries(resumed, begun, name)
    to.tries(tuned_again, begun)
    homes = {str(Path(module.__file__ or "")) for name, module in sys.modules.items() if name.startswith("onnx_woq")}
    to.must(all(tree in Path(home).parents for home in homes), f"a module is not from {tree}")
    (work / "record.json").write_text(json.dumps(asdict(to.record)))


def child(tree: Path, inputs: Path, *arguments: object) -> int:
    """Runs this file's hidden commands with the package of a tree; gives the exit code."""
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(tree)}
    code = f"{ALONE}; sys.path.insert(0, {str(Path(__file__).parent)!r}); import golden; golden.main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=inputs, check=False).returncode


def recorded(tree: Path, inputs: Path, work: Path, begun: Path | None = None) -> Record:
    """What the package in `tree` does; with `begun`, only how it goes on with what that work folder has."""
    work.mkdir()
    for name in UNFINISHED if begun is None else ():
        code = child(tree, inputs, "begin", work, name)
        if code != -signal.SIGKILL:
            raise SystemExit(f"{name} was to be killed and ended with {code}")
    if code := child(tree, inputs, "session", tree, work, begun or work):
        raise SystemExit(f"recording {tree} ended with {code}")
    return Record(**json.loads((work / "record.json").read_text()))


@contextmanager
def checked_out(revision: str, place: Path) -> Iterator[Path]:
    """A work tree of a revision."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def compare(revision: str, folder: Path) -> int:
    """Records a revision and this checkout, prints the table, and gives the exit code."""
    inputs = folder / "inputs"
    cases.make_inputs(inputs)
    with checked_out(revision, folder / "tree") as tree:
        before = recorded(tree, inputs, folder / "before")
    now = recorded(ROOT, inputs, folder / "now")
    found = verdicts(before, now)
    if before.version == now.version:  # another one refuses to go on
        across = recorded(ROOT, inputs, folder / "across", folder / "before")
        alone = Record(now.version, {name: now.results.get(name, "") for name in across.results})
        found |= {f"begun by {revision}, {name}": verdict for name, verdict in verdicts(alone, across).items()}
    print(table(found))
    for name in sorted(before.help | now.help):
        if before.help.get(name) != now.help.get(name):
            print(f"not counted: the help of `{name}` differs")
    return exit_code(found)


def main() -> None:
    """Reads the command line."""
    if sys.argv[1:2] in (["begin"], ["session"]):
        arguments = sys.argv[2:]
        begin(Path(arguments[0]), arguments[1]) if sys.argv[1] == "begin" else session(*map(Path, arguments))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="do the work in this new folder, and leave it")
    actions = parser.add_subparsers(dest="action", required=True)
    record = actions.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("--tree", type=Path, default=ROOT)
    actions.add_parser("compare").add_argument("revision")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if given.action == "compare":
            sys.exit(compare(given.revision, folder))
        cases.make_inputs(folder / "inputs")
        found = recorded(given.tree.resolve(), folder / "inputs", folder / "now")
        given.out.write_text(json.dumps(asdict(found), indent=1) + "\n")
        sys.exit("\n".join(found.broken) or 0)


if __name__ == "__main__":
    main()
