"""What the environment asks of every mode."""

from __future__ import annotations

import functools
import os
import sys
from typing import IO, cast

from .trace import Trace

TRACE = "DISPATCH_COMPILE_TRACE"


def trace_asked_for() -> Trace | None:
    """The trace of a mode that is given none: with ``DISPATCH_COMPILE_TRACE=1``, one that prints each call to stderr
    as it ends, and keeps nothing; without, None.

    Raises:
        ValueError: the variable has another value than 1, 0 or nothing.
    """
    value = os.environ.get(TRACE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{TRACE} must be 1 to trace to stderr, or 0 or nothing, not {value!r}")
    return _printed() if value == "1" else None


@functools.cache
def _printed() -> Trace:
    """One for all modes: a call inside several of them is printed once."""
    return Trace(stream=cast(IO[str], _Stderr()), max_events=0)


class _Stderr:
    """``sys.stderr`` as it is when something is written: modes outlive what pytest and others put in its place."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()
