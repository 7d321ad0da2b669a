"""Where things are: one test file for each module, few entries at the top, no circle of imports."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, UNIT = ROOT / "onnx_woq", ROOT / "tests" / "unit"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [path.parent for path in FILES if path.name == "__init__.py"]
DUNDERS = ("__init__", "__main__")
MOST_AT_THE_TOP = 16


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top, inside functions or for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join((*above, *filter(None, [node.module])))
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) | ({source} if inner - MODULES.keys() else set())
    return found & MODULES.keys()


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of a graph that are larger than one node, or that point at themselves."""

    @functools.cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        new = set(edges[start])
        while new:
            seen |= new
            new = {after for node in new for after in edges[node]} - seen
        return frozenset(seen)

    found = {frozenset(other for other in reached(node) if node in reached(other)) for node in edges}
    return [set(circle) for circle in found if circle]


def test_every_module_has_its_test_file_and_every_test_file_its_module():
    modules = {path.relative_to(PACKAGE) for path in FILES if path.stem not in DUNDERS}
    wanted = {path.with_name(f"test_{path.name}") for path in modules}
    present = {path.relative_to(UNIT) for path in UNIT.rglob("test_*.py")} - {Path(__file__).relative_to(UNIT)}
    assert sorted(map(str, wanted - present)) == [], "modules without a test file"
    assert sorted(map(str, present - wanted)) == [], "test files without a module"


def test_few_entries_at_the_top():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed"))
    assert len(entries) <= MOST_AT_THE_TOP, entries


@pytest.mark.parametrize("room", ROOMS, ids=module_name)
def test_a_room_says_what_it_holds_what_it_may_import_and_what_it_never_does(room):
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert [word for word in ("import", "never") if word not in text.lower()] == [], text or "no docstring"


def test_no_circle_of_imports():
    assert circles({name: imported(path) - {name} for name, path in MODULES.items()}) == []


def test_circles_are_found():
    line = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert circles(line) == []
    assert circles(line | {"c": {"b"}}) == [{"b", "c"}]
    assert circles({"a": {"a"}}) == [{"a"}]


def test_every_kind_of_import_is_seen(tmp_path, monkeypatch):
    package = tmp_path / "pkg" / "room"
    package.mkdir(parents=True)
    (package / "m.py").write_text(
        "import pkg.room.a\n"
        "from pkg.room import b, CONSTANT\n"
        "from . import c\n"
        "from ..other import d\n"
        "if TYPE_CHECKING:\n    from pkg.room.e import E\n"
        "def f():\n    from pkg.room.g import h\n"
    )
    names = ["pkg.room", *(f"pkg.room.{name}" for name in "abceg"), "pkg.other.d"]
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "MODULES", dict.fromkeys(names))
    assert imported(package / "m.py") == set(names)


FINDERS = {"find_linear_groups": "graph/find/linears.py", "find_embeddings": "graph/find/embeddings.py"}


@pytest.mark.parametrize("finder", FINDERS)
def test_one_module_looks_for_weights(finder):
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(one, ast.Name) and one.id == finder for one in ast.walk(ast.parse(path.read_text())))
    }
    assert readers == {"engine/plan.py"}
