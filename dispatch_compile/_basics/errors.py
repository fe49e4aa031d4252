"""Errors and warnings that callers of the package may want to catch by type."""

from __future__ import annotations

import logging
import warnings


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


_log = logging.getLogger("dispatch_compile")


class CompileError(RuntimeError):
    """An implementation could not be captured or compiled, and ``on_failure="raise"``; or what was given to
    :func:`register_native` has other results than its op."""


class DispatchCompileWarning(UserWarning):
    """A call runs slower than it could, or not as asked: said once per implementation and cause."""


def warn(text: str, stacklevel: int = 2) -> None:
    """Log and issue a :class:`DispatchCompileWarning`; ``stacklevel`` as for :func:`warnings.warn`."""
    _log.warning("%s", text)
    warnings.warn(text, DispatchCompileWarning, stacklevel=stacklevel)
