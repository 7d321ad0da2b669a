"""Settings: the JSON files that exporters leave beside a model, read without trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_settings(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one where there is no such file, or something else in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
