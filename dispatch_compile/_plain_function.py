"""What can be wrapped in a ``with`` block: functions that are done when they return."""

from __future__ import annotations

import inspect
from typing import Any

_SUSPENDING = (
    (inspect.iscoroutinefunction, "an async function"),
    (inspect.isasyncgenfunction, "an async generator function"),
    (inspect.isgeneratorfunction, "a generator function"),
)


def check_plain(fn: Any, asked_by: str) -> None:
    """Refuse what would only begin inside of a ``with`` block around its call.

    Raises:
        TypeError: ``fn`` is such a function, a class, or no function at all; the message begins with ``asked_by``.
    """
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(f"{asked_by}: {fn!r} is not a function")
    for is_kind, kind in _SUSPENDING:
        if any(map(is_kind, (inspect.unwrap(fn), getattr(fn, "__call__", None)))):  # noqa: B004
            raise TypeError(
                f"{asked_by}: {fn!r} is {kind}, whose body runs after the call has returned; "
                f"write `with mode:` in its body, around the calls that are to be compiled"
            )
