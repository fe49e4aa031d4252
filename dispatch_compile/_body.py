"""``compile_natives``: the mode around the body of a custom op, as a decorator or a ``with`` block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar, overload

from ._basics.checks import check_plain
from ._compile.config import CompileConfig
from ._mode import DispatchCompileMode, current_mode
from ._torch.dispatch import CustomOpDef, wrap_custom_op_kernels

F = TypeVar("F", bound=Callable[..., Any])


# What the ``with`` blocks of a thread or task have entered, innermost last: all bare ones share one object.
_entered: ContextVar[tuple[Any, ...]] = ContextVar("compile_natives", default=())


class CompileNatives:
    """Run the natives and IR ops in a function compiled: a decorator for the body of a custom op, or a ``with`` block.

    Use it where you own the custom op, but not the loop that calls it.

    >>> @torch.library.custom_op("docs::expert", mutates_args=())
    ... @dc.compile_natives(config=dc.CompileConfig(backend="eager"))
    ... def expert(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    ...     return dc.ops.silu_and_mul(x @ w)
    >>> y = expert(torch.ones(8, 64), torch.ones(64, 256))  # runs silu_and_mul compiled
    >>> with dc.compile_natives(mode=dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))) as mode:
    ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
    >>> mode.cache.stats().hits
    1

    - ``@compile_natives`` or ``with compile_natives:`` uses the mode that the caller is in. If there is none, it uses
      one default mode of the process, so that all such bodies share compiled code.
    - ``compile_natives(mode=...)`` uses that mode.
    - ``compile_natives(config=...)`` makes a mode with that configuration, once.

    Put it below ``torch.library.custom_op``, as here. It may also be above it: then it returns the custom op, and the
    kernels that are registered so far run in the mode.

    Args:
        fn: the function, or what ``torch.library.custom_op`` returned.
        mode: the mode to use.
        config: the configuration of a new mode.

    Returns:
        The decorated function; without ``fn``, the decorator, which is a context manager as well.

    Raises:
        TypeError: ``fn`` is not a function, or is one whose body runs after its call returned (``async def``, a
            generator); both ``mode`` and ``config`` are given; ``mode`` or ``config`` is of the wrong type.
        ValueError: a new mode is needed, and ``DISPATCH_COMPILE_TRACE`` is not 1, 0 or empty.
        RuntimeError: on leaving the ``with`` block where it was not entered.
    """

    def __init__(self, mode: DispatchCompileMode | None = None) -> None:
        self._mode = mode

    @overload
    def __call__(self, fn: F) -> F: ...

    @overload
    def __call__(
        self, fn: None = None, *, mode: DispatchCompileMode | None = None, config: CompileConfig | None = None
    ) -> CompileNatives: ...

    def __call__(
        self,
        fn: Any = None,
        *,
        mode: DispatchCompileMode | None = None,
        config: CompileConfig | None = None,
    ) -> Any:
        if mode is not None and config is not None:
            raise TypeError("compile_natives: give mode= or config=; a mode has a configuration already")
        if mode is not None and not isinstance(mode, DispatchCompileMode):
            raise TypeError(f"compile_natives: mode must be a DispatchCompileMode, not {mode!r}")
        if config is not None:
            mode = DispatchCompileMode(config=config)
        if fn is None:
            return CompileNatives(mode or self._mode)
        if mode is not None:
            return CompileNatives(mode)(fn)
        if isinstance(fn, CustomOpDef):
            wrap_custom_op_kernels(fn, self._wrapped)
            return fn
        check_plain(fn, "compile_natives")
        return self._wrapped(fn)

    def _wrapped(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        context = self._context

        @functools.wraps(fn)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with context():
                return fn(*args, **kwargs)

        # custom_op reads the types; text annotations only mean something where `fn` was written.
        inside.__signature__ = _resolved_signature(fn)  # type: ignore[attr-defined]
        return inside

    def _context(self) -> Any:
        if self._mode is not None:
            return self._mode
        return nullcontext() if current_mode() is not None else _default_mode()

    def __enter__(self) -> DispatchCompileMode:
        context = self._context()
        context.__enter__()
        _entered.set((*_entered.get(), context))
        mode = current_mode()
        assert mode is not None
        return mode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = _entered.get()
        if not entered:
            raise RuntimeError("compile_natives: left where it was not entered")
        *outer, context = entered
        _entered.set(tuple(outer))
        context.__exit__(kind, error, traceback)


@functools.cache
def _default_mode() -> DispatchCompileMode:
    return DispatchCompileMode()


def _resolved_signature(fn: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except Exception:  # an annotation that cannot be evaluated is for whoever needs it to complain about
        return inspect.signature(fn)


compile_natives = CompileNatives()
