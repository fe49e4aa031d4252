"""A mode that is entered before the program has registered its ops, and finds them as they come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.library import Library

from .._call.route import Route
from .._dispatch.opaque import TORCH_NAMESPACES
from .._mode import DispatchCompileMode, current_mode


class EarlyMode(DispatchCompileMode):
    """A mode for a program that has yet to be imported.

    Modes look for ops when they are entered. This one goes on looking: for custom ops whenever a kernel is registered
    (:func:`entered_early`); for IR ops whenever one of these is called, because a library registers an IR op's kernel
    first, and lists the op afterwards.
    """

    @property
    def routes(self) -> dict[Hashable, Route | None]:
        if not self._sync_lock.locked() and self._outdated():  # _sync itself reads the routes
            self._sync()
        return self._routes

    @routes.setter
    def routes(self, routes: dict[Hashable, Route | None]) -> None:
        self._routes = routes


@contextmanager
def entered_early(mode: EarlyMode) -> Iterator[None]:
    """Inside the mode, with an eye on what is registered meanwhile; modes that are never left are left at the end."""
    with _registrations_told(mode._sync), mode:
        try:
            yield
        finally:
            while (inner := current_mode()) is not None and inner is not mode:
                inner.__exit__(None, None, None)


@contextmanager
def _registrations_told(listener: Callable[[], None]) -> Iterator[None]:
    """Call ``listener`` after each registration of a kernel in Python for an op that is not torch's own.

    torch has no callback for this. Ops whose kernels are not in Python are none that IR ops are called in.
    """
    register: Callable[..., None] = Library.impl

    @functools.wraps(register)
    def impl(library: Library, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        register(library, op_name, fn, dispatch_key, **options)
        if library.ns not in TORCH_NAMESPACES and dispatch_key != "BackendSelect":  # where this package's kernels go
            listener()

    Library.impl = impl  # type: ignore[method-assign, assignment]  # the only way to hear of them
    try:
        yield
    finally:
        Library.impl = register  # type: ignore[method-assign]
