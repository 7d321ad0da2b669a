"""The page's style and script need nothing from elsewhere, and know the classes that the page uses."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from onnx_woq.report import page_sections
from onnx_woq.report.page_assets import SCRIPT, STYLE

NODE = shutil.which("node")


@pytest.mark.parametrize("text", [STYLE, SCRIPT], ids=["style", "script"])
def test_nothing_is_fetched(text):
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|eval\(|innerHTML", text)


def test_braces_and_colours_are_whole():
    assert STYLE.count("{") == STYLE.count("}")
    used, defined = (set(re.findall(pattern, STYLE)) for pattern in (r"var\((--\w+)\)", r"(--\w+):"))
    assert used == defined
    for block in re.findall(r":root \{([^}]*)\}", STYLE)[1:]:
        assert set(re.findall(r"(--\w+):", block)) == defined, "every ground has all colours"


def test_the_style_knows_what_the_page_calls_its_parts():
    source = page_sections.__loader__.get_source(page_sections.__name__)
    classes = set(re.findall(r'class="([a-z]+)"', source)) - {"plot"}
    assert classes
    assert not [name for name in classes if f".{name}" not in STYLE]


@pytest.mark.skipif(NODE is None, reason="no node to read the script")
def test_the_script_can_be_read():
    subprocess.run([NODE, "--check", "-"], input=SCRIPT, text=True, check=True)
