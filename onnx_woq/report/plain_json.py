"""Plain JSON: results as values that JSON can hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Converts nested dictionaries, lists and tuples to values for JSON.

    NaN and infinite numbers become None, which JSON has no words for, keys and paths become text, tuples become lists.
    """
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
