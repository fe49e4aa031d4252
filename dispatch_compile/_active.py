"""The modes that each thread is in, and how to take them along to another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._torch_private import torchs_modes

if TYPE_CHECKING:
    from ._mode import DispatchCompileMode
    from ._trace import Trace

# How a mode sees calls.
SELECTIVE, EVERY_OP = "selective", "every op"

P = ParamSpec("P")
R = TypeVar("R")


class ActiveModes(threading.local):
    """The modes entered on this thread.

    Attributes:
        stack: the modes, innermost last.
        traces: their traces, each once.
        untraced: the innermost mode, if none of them traces: all that the short cut in the kernel looks at.
    """

    def __init__(self) -> None:
        self.stack: tuple[DispatchCompileMode, ...] = ()
        self.traces: tuple[Trace, ...] = ()
        self.untraced: DispatchCompileMode | None = None
        self._outside: tuple[Any, ...] = ()  # what pop() goes back to

    def push(self, mode: DispatchCompileMode) -> None:
        self._outside = self.stack, self.traces, self.untraced, self._outside
        self.stack = (*self.stack, mode)
        if mode.trace is not None and not any(mode.trace is trace for trace in self.traces):
            self.traces = (*self.traces, mode.trace)
        self.untraced = None if self.traces else mode

    def pop(self) -> None:
        self.stack, self.traces, self.untraced, self._outside = self._outside

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No mode: the compiler's own calls of IR ops are none of ours."""
        suspended = self.stack, self.traces, self.untraced, self._outside
        self.stack, self.traces, self.untraced, self._outside = (), (), None, ()
        try:
            yield
        finally:
            self.stack, self.traces, self.untraced, self._outside = suspended


active = ActiveModes()


def bodies_watched() -> AbstractContextManager[Any]:
    """Let the modes that are to see every op see those in the body of an op: torch takes a mode off its stack while
    that handles the op."""
    if not any(mode.interception == EVERY_OP for mode in active.stack):
        return _NOTHING
    entered = ExitStack()
    for mode in active.stack:
        if mode.interception == EVERY_OP and not any(mode is other for other in torchs_modes()):
            entered.enter_context(mode.on_torchs_stack())
    return entered


_NOTHING = nullcontext()


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
