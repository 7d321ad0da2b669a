"""Documentation names files that exist, and has no name of before the move."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOTS = {"onnx_woq", "docs", "tests", "tools"}
TOP = {path.name for path in (ROOT / "onnx_woq").iterdir()}


def named_files(page: Path) -> set[str]:
    """Paths of code that a page names: from the root of the repository, or from a room of the package."""
    quoted = re.findall(r"`([\w/.*-]+)`", page.read_text(encoding="utf-8"))
    paths = {name for name in quoted if re.search(r"\.(py|md|txt|toml)$", name) or name.endswith("/")}
    return {name for name in paths if "/" in name and name.split("/")[0] in TOP | ROOTS}


def test_the_newcomers_table_is_there():
    table = named_files(ROOT / "docs/design.md")
    assert len([name for name in table if name.startswith("onnx_woq/") and name.endswith(".py")]) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    places = (ROOT, ROOT / "onnx_woq")
    assert not [name for name in named_files(page) if not any((place / name).exists() for place in places)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
