"""The modes that each thread is in, and how to take them along to another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ._torch_private import torchs_modes

if TYPE_CHECKING:
    from ._mode import DispatchCompileMode

# How a mode sees calls.
SELECTIVE, EVERY_OP = "selective", "every op"

P = ParamSpec("P")
R = TypeVar("R")


class ActiveModes(threading.local):
    """The modes entered on this thread.

    Attributes:
        stack: the modes, innermost last.
        tracing: how many of them trace.
        untraced: the innermost, if none of them traces: all that the short cut in the kernel looks at.
    """

    def __init__(self) -> None:
        self.stack: tuple[DispatchCompileMode, ...] = ()
        self.tracing = 0
        self.untraced: DispatchCompileMode | None = None

    def push(self, mode: DispatchCompileMode) -> None:
        self.stack = (*self.stack, mode)
        self.tracing += mode.trace is not None
        self.untraced = None if self.tracing else mode

    def pop(self) -> None:
        self.tracing -= self.stack[-1].trace is not None
        self.stack = self.stack[:-1]
        self.untraced = self.stack[-1] if self.stack and not self.tracing else None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No mode: the compiler's own calls of IR ops are none of ours."""
        saved = self.stack, self.tracing, self.untraced
        self.stack, self.tracing, self.untraced = (), 0, None
        try:
            yield
        finally:
            self.stack, self.tracing, self.untraced = saved


active = ActiveModes()


@contextmanager
def bodies_watched() -> Iterator[None]:
    """Let the modes that are to see every op see those in the body of an op: torch takes a mode off its stack while
    that handles the op."""
    with ExitStack() as entered:
        for mode in active.stack:
            if mode.interception == EVERY_OP and not any(mode is other for other in torchs_modes()):
                entered.enter_context(mode.on_torchs_stack())
        yield


def inherit_modes(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn`` inside the modes that the calling thread is in now, on whichever thread it is then called.

    For work that a thread hands to another, which starts without any mode::

        with mode, ThreadPoolExecutor() as pool:
            pool.submit(dispatch_compile.inherit_modes(decode), batch)
    """
    modes = active.stack

    @functools.wraps(fn)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as entered:
            for mode in modes:
                entered.enter_context(mode)
            return fn(*args, **kwargs)

    return inside
