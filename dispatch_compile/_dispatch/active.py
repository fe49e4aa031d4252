"""The modes that a thread or task is in, the mode for the whole process, and taking modes to another thread.

What is entered belongs to the context (``contextvars``): threads start without it, and the tasks of an event loop,
which take turns on one thread, have each their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .._basics.checks import check_plain
from .._torch.dispatch import torchs_modes

if TYPE_CHECKING:
    from .._mode import DispatchCompileMode
    from .._trace.trace import Trace

# How a mode sees calls.
SELECTIVE, EVERY_OP = "selective", "every op"

P = ParamSpec("P")
R = TypeVar("R")


class Entry:
    """That a mode was entered. A context is in the modes of its innermost entry and of those outside of it.

    A context that was copied meanwhile, as that of a task that was started inside, shares the entry, and is out of the
    mode too when that is left.

    Attributes:
        mode: None once it is left.
        outside: the entry before it; None for what all contexts start from.
        untraced: the mode, if no mode of the context traces: all that the short cut in the kernel looks at.
        captures: told of the natives that are called where there is no mode since an implementation is captured.
    """

    __slots__ = ("captures", "mode", "outside", "untraced")

    def __init__(self, mode: DispatchCompileMode | None = None, outside: Entry | None = None) -> None:
        self.mode = mode
        self.outside = outside
        self.captures: Callable[[str], None] | None = None
        traced = outside is not None and outside.outside is not None and outside.untraced is None
        self.untraced: DispatchCompileMode | None = None if traced or mode is None or mode.trace is not None else mode

    def outside_has_changed(self) -> None:
        """Look again whether a mode of the context traces."""
        self.untraced = None if traces_of(_modes_of(self)) else self.mode


def _modes_of(entry: Entry | None) -> Sequence[DispatchCompileMode]:
    """The modes of a context, innermost first. The process's counts where there is no other."""
    modes: list[DispatchCompileMode] = []
    while entry is not None:
        if entry.mode is not None and (entry.outside is not None or not modes):
            modes.append(entry.mode)
        entry = entry.outside
    return modes


def traces_of(modes: Sequence[DispatchCompileMode]) -> Sequence[Trace]:
    """Their traces, each once, that of the outermost mode first."""
    return list(dict.fromkeys(mode.trace for mode in reversed(modes) if mode.trace is not None))


_everywhere = Entry()  # has the mode for the whole process
_nowhere = Entry()
_innermost: ContextVar[Entry] = ContextVar("dispatch_compile", default=_everywhere)

# The innermost entry, which may be one that was left in another context: then the long way finds the right one.
innermost_entry = _innermost.get


def _innermost_not_left() -> Entry:
    entry = _innermost.get()
    while entry.mode is None and entry.outside is not None:
        entry = entry.outside
        _innermost.set(entry)
    return entry


def active_modes() -> Sequence[DispatchCompileMode]:
    """The modes that the context is in now, innermost first."""
    return _modes_of(_innermost_not_left())


def enter(mode: DispatchCompileMode) -> None:
    """Be in a mode, inside of those that the context is in already."""
    _innermost.set(Entry(mode, _innermost_not_left()))


def leave(mode: DispatchCompileMode) -> None:
    """Be out of a mode, whatever was entered since.

    Raises:
        RuntimeError: the context is not in it.
    """
    inner, entry = list[Entry](), _innermost.get()
    while entry.outside is not None and entry.mode is not mode:
        inner.append(entry)
        entry = entry.outside
    if entry.outside is None:
        raise RuntimeError(
            "DispatchCompileMode: left where it was not entered; leave it on the thread and in the task that entered it"
        )
    entry.mode = entry.untraced = None
    for other in inner:
        other.outside_has_changed()
    _innermost_not_left()


def mode_everywhere() -> DispatchCompileMode | None:
    """The mode of every context that has entered none."""
    return _everywhere.mode


def set_mode_everywhere(mode: DispatchCompileMode | None) -> None:
    """Put every context that has entered no mode in this one."""
    _everywhere.mode = mode
    _everywhere.outside_has_changed()


@contextmanager
def suspended() -> Iterator[None]:
    """Be in no mode: calls of IR ops that the compiler makes are not to be caught."""
    token = _innermost.set(_nowhere)
    try:
        yield
    finally:
        _innermost.reset(token)


@contextmanager
def natives_told(listener: Callable[[str], None]) -> Iterator[None]:
    """No mode, and ``listener`` is called with the names of natives that are called, and so become part of a graph."""
    entry = Entry()
    entry.captures = listener
    token = _innermost.set(entry)
    try:
        yield
    finally:
        _innermost.reset(token)


def bodies_watched() -> AbstractContextManager[object]:
    """Let the modes that are to see every op see those in the body of an op: torch takes a mode off its stack while
    that handles the op."""
    watching = [mode for mode in active_modes() if mode.interception == EVERY_OP]
    if not watching:
        return _NOTHING
    entered = ExitStack()
    for mode in reversed(watching):
        if not any(mode is other for other in torchs_modes()):
            entered.enter_context(mode.on_torchs_stack())
    return entered


_NOTHING = nullcontext()


def inherit_modes(fn: Callable[P, R]) -> Callable[P, R]:
    """Take the modes that the caller is in along to another thread or task: new threads start without any.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
    >>> with mode, ThreadPoolExecutor() as pool:
    ...     y = pool.submit(dc.inherit_modes(dc.ops.silu_and_mul), torch.ones(8, 256)).result()
    >>> mode.cache.stats().hits
    1

    Args:
        fn: the function that the other thread is to call.

    Returns:
        A function that calls ``fn`` inside the modes that were entered when ``inherit_modes`` was called.

    Raises:
        TypeError: ``fn`` is not a function, or is one whose body runs after its call returned (``async def``, a
            generator).
    """
    check_plain(fn, "inherit_modes")
    modes = active_modes() if _innermost.get().outside is not None else ()  # the process's mode is there as well

    @functools.wraps(fn)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as entered:
            for mode in reversed(modes):
                entered.enter_context(mode)
            return fn(*args, **kwargs)

    return inside
