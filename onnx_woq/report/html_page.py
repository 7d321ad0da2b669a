"""The report of a run: one HTML page that needs no other file, or the same content as JSON.

The charts are plotly's, whose script is part of the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_woq.errors import OutputError
from onnx_woq.report.page_assets import SCRIPT, STYLE
from onnx_woq.report.summary import summary

if TYPE_CHECKING:
    from onnx_woq.engine.results import QuantizeReport
    from onnx_woq.tuning.results import TuneResult

SUFFIXES = (".html", ".json")


def check_report(path: Path) -> None:
    """Checks that a report can be written to `path`, so that a mistake is found before the work begins.

    Raises:
        OutputError: its name has another ending, it is a folder or in one that cannot be written to, or plotly, which a
            page needs, is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"--report {path}: name it .html for a page or .json for its content")
    if path.suffix.lower() == ".html" and find_spec("plotly") is None:
        raise OutputError("a report in HTML needs plotly: pip install 'onnx-woq[report]', or name it .json")
    if path.is_dir():
        raise OutputError(f"--report {path} is a folder: name a file in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"--report {path}: nothing can be written in {above}, name a file elsewhere")


def write_report(
    result: QuantizeReport | TuneResult, path: str | Path, *, model: str | Path | None = None, command: str = ""
) -> Path:
    """Writes the report of a run to `path`: a self-contained page (.html), or the same content as JSON (.json).

    Args:
        result: the result of `quantize` or `tune`; the models it names must still be on the disk.
        path: the file to write; an old one is replaced.
        model: the float model, if it is no longer where it was.
        command: the command that started the run, for people to read.

    Returns:
        The path.

    Raises:
        OutputError: the report cannot be written; no part of it is left then.
    """
    path = Path(path)
    check_report(path)
    found = summary(result, model, command)
    text = json.dumps(found, indent=1) if path.suffix.lower() == ".json" else page(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from error
    return path


def page(found: dict[str, Any]) -> str:
    """Returns the page for what `summary` returns.

    Its content security policy lets only its own two scripts run and fetches nothing. Names from a model or a command
    line are not to be trusted; they are escaped besides.
    """
    from plotly.offline import get_plotlyjs  # here, because plotly is optional and JSON does without

    from onnx_woq.report.page_sections import sections

    library = (
        get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    )  # line ends as the browser reads them before it hashes
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (library, SCRIPT))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    title = escape(f"{Path(found['model']).name}, quantized")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head><body><main>'
        + "\n".join(sections(found))
        + f"</main><script>{library}</script><script>{SCRIPT}</script></body></html>"
    )


def _digest(script: str) -> str:
    """Returns the SHA-256 of a script in base64, as a content security policy wants it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
