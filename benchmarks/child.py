"""Measuring in a process of its own, with a folder of its own for what Inductor and Triton keep on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds


def printed_by(module: str, arguments: list[str], cache: Path) -> Any:
    """The JSON that a module, run as a program, prints last.

    Raises:
        SubprocessError: it failed, or took too long.
        ValueError: it printed something else.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def reason(error: Exception) -> str:
    """Why :func:`printed_by` failed, in a line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines: list[str] = error.stderr.strip().splitlines()
        return lines[-1] if lines else "no message"
    return str(error)
