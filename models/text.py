"""The demo model's text, taken from what Python's own standard library ships.

    python models/text.py OUT_DIR      # writes OUT_DIR/calib.txt and OUT_DIR/dev.txt

Documents are the language reference topics behind `help()` and, for each top-level module or package, its docstrings
and longer comments. Sources are parsed, never imported. A document belongs to train, calib or dev by a hash of its
name, so a model trained under one Python version has not seen another version's calib and dev documents either.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PARTS = ("train", "calib", "dev")
HELD_OUT_SHARE = 0.10  # of document names, for calib and again for dev
HELD_OUT_CHARS = 20_000  # a longer calib or dev document is cut, so that no single package fills the part
MIN_BYTES = 100_000  # a shorter part means a stripped standard library
MIN_COMMENT = 60  # characters; shorter comments are notes on the code next to them, not prose
SKIPPED = {"site-packages", "dist-packages", "lib-dynload", "tests", "idle_test", "pydoc_data", "__pycache__"}
LOCAL = {"sitecustomize", "usercustomize"}  # an installation's own files
# Absent from some versions or packaged apart by some distributions: held-out text must not depend on them.
NEVER_HELD_OUT = {f"module/{name}" for name in ("distutils", "idlelib", "lib2to3", "test", "tkinter", "turtledemo")}


class MissingTextError(RuntimeError):
    """This Python does not ship enough of the standard library's sources."""


def _rank(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split(name: str) -> str:
    """Return the part a document belongs to, 'train', 'calib' or 'dev'; depends on its name alone."""
    if name in NEVER_HELD_OUT:
        return "train"
    share = _rank(name)
    return "dev" if share < HELD_OUT_SHARE else "calib" if share < 2 * HELD_OUT_SHARE else "train"


def documents(stdlib: Path | None = None) -> dict[str, str]:
    """Return every document's text by name, 'topic/NAME' or 'module/NAME', without repeated paragraphs.

    Topics quote each other and modules share boilerplate, so a paragraph is kept once only, with train before calib
    before dev: what training saw is never held out.

    Raises:
        MissingTextError: a part would have fewer than `MIN_BYTES` bytes.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    found = {**_topics(root), **_modules(root)}
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(found, key=lambda n: (PARTS.index(split(n)), n)):
        paragraphs = []
        for paragraph in found[name]:
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            kept[name] = "\n\n".join(paragraphs)
    for part, texts in parts(kept).items():
        size = sum(len(text.encode()) for text in texts)
        if size < MIN_BYTES:
            raise MissingTextError(f"only {size} bytes of {part} text: {_missing(root)}")
    return kept


def parts(found: dict[str, str]) -> dict[str, list[str]]:
    """Return the texts of each part, in a stable order that mixes topics and modules, long held-out ones cut."""
    texts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in sorted(found, key=_rank):
        part, text = split(name), found[name]
        if part != "train" and len(text) > HELD_OUT_CHARS:
            text = text[: text.rfind("\n\n", 0, HELD_OUT_CHARS)]
        texts[part].append(text)
    return texts


def _missing(root: Path) -> str:
    """Say which of the sources are absent below `root`."""
    absent = [] if _topics(root) else ["pydoc_data/topics.py"]
    count = sum(1 for _ in _sources(root))
    if count < 300:  # every complete standard library since 3.10 has over 500
        absent.append(f"most module sources (found {count} *.py files)")
    return f"{root} lacks {' and '.join(absent) or 'some documents'}"


def _topics(root: Path) -> dict[str, list[str]]:
    """Return the paragraphs of each language reference topic; empty where Python comes without them."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    values = [node.value for node in _parse(path).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    topics: dict[str, str] = next((ast.literal_eval(value) for value in values if isinstance(value, ast.Dict)), {})
    return {f"topic/{name}": _paragraphs(text) for name, text in topics.items()}


def _modules(root: Path) -> dict[str, list[str]]:
    """Return the paragraphs of each top-level module or package.

    A package is one document, and `_pyio` is part of `io`: text that moves inside a package or to its private twin
    in another Python version stays in the same part.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for path in _sources(root):
        top = path.relative_to(root).parts[0].removesuffix(".py")
        name = re.sub("^_(py)?", "", top) or top
        modules[f"module/{name}"] += _prose(path)
    return dict(modules)


def _sources(root: Path) -> Iterator[Path]:
    """Yield the standard library's own Python files, sorted."""
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if SKIPPED.isdisjoint(inner.parts) and inner.parts[0].removesuffix(".py") not in LOCAL:
            yield path


def _prose(path: Path) -> list[str]:
    """Return the paragraphs of a source file's docstrings and longer comments, in the order of the file."""
    try:
        tree = _parse(path)
        with tokenize.open(path) as file:
            lines = file.read().splitlines()
    except (OSError, SyntaxError, ValueError):  # a template, or a test of the parser itself
        return []
    found = list(_docstrings(tree))
    found += [(line, text) for line, text in _comments(lines) if len(text) >= MIN_COMMENT]
    return [paragraph for _, text in sorted(found) for paragraph in _paragraphs(text)]


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each docstring; walks statements only, a quarter of the time of `ast.walk`."""
    pending: list[ast.AST] = [tree]
    for node in pending:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, field, ())


def _comments(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each block of whole-line comments, without the leading '#'."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.lstrip().startswith("#"):
            block.append(re.sub(r"^\s*#+!? ?", "", line))
        elif block:
            yield number - len(block), "\n".join(block)
            block = []


def _paragraphs(text: str) -> list[str]:
    """Return the text's paragraphs, without trailing blanks, rules of punctuation and undecodable characters."""
    text = text.encode("utf-8", "ignore").decode().expandtabs()
    lines = (line.rstrip() for line in text.splitlines())
    kept = (line for line in lines if not re.fullmatch(r"\s*([^\w\s])\1{3,}", line))
    return [p.strip("\n") for p in re.split(r"\n{2,}", "\n".join(kept)) if re.search(r"\w", p)]


def _parse(path: Path) -> ast.Module:
    """Parse a source file; its warnings (old escapes) are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())


def main() -> None:
    """Write calib.txt and dev.txt."""
    parser = argparse.ArgumentParser(description="Write the demo model's calibration and evaluation text.")
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    try:
        texts = parts(documents())
    except MissingTextError as error:
        sys.exit(f"text.py: {error}")
    out_dir.mkdir(parents=True, exist_ok=True)
    for part in ("calib", "dev"):
        path = out_dir / f"{part}.txt"
        path.write_text("\n\n".join(texts[part]) + "\n", encoding="utf-8", newline="\n")
        print(f"{path}  {path.stat().st_size} bytes, {len(texts[part])} documents")


if __name__ == "__main__":
    main()
