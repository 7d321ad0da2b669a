"""The command line in this process and in one of its own, and what it tries by default."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]

PUBLISHED = ("RTN_G32ASYM", "GPTQ_G32ASYM", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", "GPTQ_G128ASYM", "AWQ_G32ASYM")
CONFIGS = (*PUBLISHED, "BEST_4BIT")
"""What is tried by default, in this order."""

FAMILY = tuple(f"{effort}_{bits}BIT" for bits in (4, 3, 2) for effort in ("FAST", "BALANCED", "BEST"))


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON: other programs cannot read it")


class Cli:
    """Runs the command line in this process."""

    def __call__(self, *arguments: object, fault: bool = False) -> Result:
        """Runs a command, which must not end by a fault of the program unless `fault` expects one."""
        from onnx_woq.cli import main

        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        surprise = result.exception
        assert surprise is None or isinstance(surprise, SystemExit), f"traceback instead of a message: {surprise!r}"
        assert fault or result.exit_code != 1, result.stderr
        return result

    def ok(self, *arguments: object) -> Result:
        result = self(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    def json(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        """What a command prints with --json; nothing else may be on stdout."""
        result = self(*arguments, "--json")
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout, parse_constant=_no_constant)


def spawning(workers: int = 2, **options: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), **options)


def python(code: str, *arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a Python of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=60, check=False, **options)


def command_line(*arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m onnx_woq.cli` in a process of its own."""
    command = [sys.executable, "-m", "onnx_woq.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=60, check=False, **options)
