"""Where calls are caught: a kernel at the BackendSelect dispatch key of the ops of interest, and of no others.

BackendSelect is the last key before the backend's kernel. torch gives every op a fallthrough there, which the
dispatcher skips without looking, and always has the key switched on. A kernel registered there for one op
- costs every other op nothing, and needs no mode on torch's stack, so also reaches into opaque ops' bodies;
- runs below autograd, functorch, functionalization, FakeTensor and every TorchDispatchMode: those have seen the
  call and what arrives is about to run for real;
- adds nothing to the thread's dispatch state, on which torch.compile guards.
It is process-wide, so it asks for the context's mode first and hands the call on when there is none.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torch.library import Library, get_kernel

from .._basics.fork import freed_in_children
from .._torch.dispatch import BELOW_BACKEND_SELECT, OpOverload, has_kernel


class _Hook:
    def __init__(self, overload: OpOverload, kernel: Callable[..., Any]) -> None:
        self.users = 0
        self.library = Library(overload.namespace, "IMPL")
        self.library.impl(overload.name().partition("::")[2], kernel, "BackendSelect", with_keyset=True)
        self.kernel = get_kernel(overload, "BackendSelect")


# By the overload's name: torch forgets its OpOverload objects when a library of an op by the same name is freed, and
# makes new ones.
_hooks: dict[str, _Hook] = {}
_lock = freed_in_children(threading.Lock())
# The kernels that were taken away last. torch frees a kernel with its registration, also while a call on another
# thread, which waits for the interpreter's lock, is on its way into it; it then runs whatever came to stand there.
_left: deque[object] = deque(maxlen=4096)
# Releases come from finalizers, which garbage collection may run anywhere, also inside acquire().
_releases: deque[tuple[OpOverload, ...]] = deque()


def redispatch(overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand a caught call on to the op's own kernel, as if it had not been caught."""
    return overload.redispatch(keyset & BELOW_BACKEND_SELECT, *args, **kwargs)


def caught(overload: OpOverload) -> bool:
    """Whether calls of the op are caught now."""
    return overload.name() in _hooks


def hookable(overload: OpOverload) -> bool:
    """Whether calls of the op can be caught: it has no BackendSelect kernel but ours."""
    return overload.name() in _hooks or not has_kernel(overload, "BackendSelect")


def acquire(overloads: Iterable[OpOverload], make_kernel: Callable[[OpOverload], Callable[..., Any]]) -> None:
    """Catch calls of these overloads from now on; a hook that exists is shared.

    The kernel is called as ``kernel(keyset, *args, **kwargs)``.
    """
    with _lock:
        for overload in overloads:
            name = overload.name()
            hook = _hooks.get(name)
            if hook is None:
                hook = _hooks[name] = _Hook(overload, make_kernel(overload))
            hook.users += 1
    _work_off_releases()


def release(overloads: Iterable[OpOverload]) -> None:
    """Undo one :func:`acquire`; the last one takes the kernel out of the dispatch table, now or, if this thread or
    another is just at it, when that is done."""
    _releases.append(tuple(overloads))
    _work_off_releases()


def _work_off_releases() -> None:
    while _releases and _lock.acquire(blocking=False):
        try:
            while _releases:
                for overload in _releases.popleft():
                    name = overload.name()
                    hook = _hooks[name]
                    hook.users -= 1
                    if not hook.users:
                        del _hooks[name]
                        _left.append(hook.kernel)
                        hook.library._destroy()
        finally:
            _lock.release()
