"""Docstrings read like English: functions begin with a verb, classes and modules with a noun."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_woq

PACKAGE = Path(onnx_woq.__file__).parent
ROOMS = ("core", "graph", "targets", "runtime", "engine", "tuning", "report", "cli")
"""Folders of the package whose docstrings are held to the rules, as are the modules beside them."""

RIDDLES = ("What", "Whether", "Where", "How", "When", "Who", "As", "Of", "The same")
"""Words that leave the reader to guess the subject when a docstring begins with them."""

FILES = sorted(PACKAGE.glob("*.py")) + [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST | None, int, str]]:
    """Yields the owner (None for a constant or an attribute), line and text of every docstring."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for number, statement in enumerate(body if isinstance(body, list) else ()):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                owned = number == 0 and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                yield node if owned else None, statement.lineno, value.value


def is_command(function: ast.FunctionDef) -> bool:
    """Tells whether a docstring is the help of a command, which speaks to whoever types it."""
    names = [node.attr for one in function.decorator_list for node in ast.walk(one) if isinstance(node, ast.Attribute)]
    return bool({"command", "group"} & set(names))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_docstring_begins_with_a_riddle(path: Path) -> None:
    found = [
        f"{named(path)}:{line}: {text.strip().splitlines()[0] if text.strip() else 'is empty'}"
        for _, line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if not text.strip() or re.match(rf"({'|'.join(RIDDLES)})\b", text.strip())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_functions_say_what_they_do_in_the_third_person(path: Path) -> None:
    found = [
        f"{named(path)}:{line}: {text.strip().splitlines()[0]}"
        for owner, line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(owner, ast.FunctionDef) and not is_command(owner) and not re.match(r"[A-Z][a-z]+s\b", text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=named)
def test_packages_say_what_they_may_import_and_never_do(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.search(r"\bimports?\b", text), text
    assert re.search(r"\bnever\b", text), text
