"""The type of a progress callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""A function that long work calls with `(stage, steps done, steps in all)`, such as `("solve", 3, 24)`."""
