"""The mode: which ops it catches, how it sees calls, and entering and leaving it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _hooks, _registry
from ._active import EVERY_OP, SELECTIVE, active
from ._cache import NativeCache
from ._callee import Callee, full_name
from ._config import CompileConfig
from ._environment import trace_asked_for
from ._explain import Explanation, explanation_of, explanation_of_function
from ._fork import freed_in_children
from ._intercept import kernel_of
from ._ir import Op
from ._opaque import opaque_overloads
from ._route import Route
from ._specialize.arguments import Parameters, activations_with_tokens, flatten
from ._torch_private import OpOverload, TorchDispatchMode, hide_from_dynamo
from ._trace import OpCall, Trace, TraceEvent

if TYPE_CHECKING:
    from ._native import Native


def current_mode() -> DispatchCompileMode | None:
    """The innermost mode entered on this thread."""
    return active.stack[-1] if active.stack else None


_modes: weakref.WeakSet[DispatchCompileMode] = weakref.WeakSet()


class DispatchCompileMode(TorchDispatchMode):
    """Inside it, IR ops run as compiled code of the implementation that their dispatch chooses.

    Scope is the ``with`` block and the thread. Calls are caught wherever they are made, also inside opaque custom
    ops at any depth; see ``dispatch_compile._hooks`` for how. Every other op, and every call that cannot be compiled
    rightly, behaves as if there were no mode. A mode may be entered again and again, also while it is entered, and
    on several threads. Of nested modes the innermost that selects the op decides.

    Make one mode and keep it: a new mode has a new cache unless it is given one.

    Args:
        ops: the IR ops to catch: IR op objects, ``OpOverload``s, ``OpOverloadPacket``s, namespace names,
            ``"ns::name"``; None for every IR op known, now and later.
        config: how to compile; :class:`CompileConfig` has the defaults.
        cache: where compiled code is kept; by default a new :class:`NativeCache`.
        trace: whether to record what is done with each call, in :attr:`trace`; or the :class:`Trace` to record it in.

    Attributes:
        config, cache: as given.
        trace: the :class:`Trace`, or None when tracing is off. With ``DISPATCH_COMPILE_TRACE=1`` in the environment, a
            mode that is given no trace has one that prints to stderr, and keeps nothing.
        interception: how calls are seen. ``"selective"``: those of the IR ops alone (and of custom ops while a mode
            traces), and every other op costs nothing. ``"every op"``: the mode is on torch's stack of modes as any
            other ``TorchDispatchMode`` is, and sees, and slows down, every op of the thread; so it is if its trace
            is to record all ops, and never otherwise. IR ops run compiled either way.

    Raises:
        ValueError, TypeError: an item of ``ops`` that is no IR op.
        ValueError: ``DISPATCH_COMPILE_TRACE`` has a value that means nothing.
    """

    def __init__(
        self,
        *,
        ops: Iterable[Any] | None = None,
        config: CompileConfig | None = None,
        cache: NativeCache | None = None,
        trace: bool | Trace = False,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, CompileConfig):
            raise TypeError(f"DispatchCompileMode: config must be a CompileConfig, not {config!r}")
        if cache is not None and not isinstance(cache, NativeCache):
            raise TypeError(f"DispatchCompileMode: cache must be a NativeCache, not {cache!r}")
        if not isinstance(trace, (bool, Trace)):
            raise TypeError(f"DispatchCompileMode: trace must be True, False or a Trace, not {trace!r}")
        self.config = config or CompileConfig()
        self.cache = cache if cache is not None else NativeCache()
        self.trace = trace if isinstance(trace, Trace) else Trace() if trace else trace_asked_for()
        self.interception = _interception_for(self.trace)
        # For the kernel, by the overload's name, and for natives by their number; None if it is not selected.
        self.routes: dict[Hashable, Route | None] = {}
        self._selects = _registry.selection(ops)
        self._polled: list[weakref.ref[Op]] = []
        self._caught: set[OpOverload] = set()
        self._sync_lock = freed_in_children(threading.Lock())
        weakref.finalize(self, _hooks.release, self._caught)
        _modes.add(self)
        self._sync()

    def __enter__(self) -> DispatchCompileMode:
        if self.trace is not None or self._outdated():
            self._sync()
        if self.interception == EVERY_OP:
            super().__enter__()
        active.push(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not active.stack or active.stack[-1] is not self:
            raise RuntimeError("DispatchCompileMode: modes must be left in the reverse order of entering")
        active.pop()
        if self.interception == EVERY_OP:
            super().__exit__(kind, error, traceback)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To torch: a mode that sees every op is no reason to run torch.compile'd functions eagerly."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """To torch, the same."""
        return True

    @contextmanager
    def on_torchs_stack(self) -> Iterator[None]:
        """Be on torch's stack of modes, without being entered."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See an op that is not caught further down; change nothing. Only with interception of every op."""
        kwargs = kwargs or {}
        if self.trace is None or _hooks.caught(func):
            return func(*args, **kwargs)
        call = self.trace.begin(OpCall, full_name(func), args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self.trace.end_raising(call, error)
            raise
        self.trace.end(call, result)
        return result

    def warmup(self, op: Any, *args: Any, tokens: Sequence[int] | None = None, **kwargs: Any) -> list[TraceEvent]:
        """Compile ahead what calls of an op will need, by making them.

        A call in a CUDA graph capture cannot compile, and a first call elsewhere takes the time that compiling takes;
        after this neither happens. Do it in the grad or inference mode of the calls to come.

        Args:
            op: the IR op object, ``OpOverload``, ``OpOverloadPacket`` or ``"ns::name"``.
            args, kwargs: arguments as the calls to come will have them; they are not changed.
            tokens: the token counts to warm up for. The activations are replaced by zeros of so many tokens. One
                count from 2 up serves all those from 2 up; 1 and 0 are compiled for on their own. None: the call as
                it is given.

        Returns:
            What became of each call; look at ``action`` and ``reason`` for those that do not run compiled.

        Raises:
            ValueError: the mode does not catch the op; ``tokens`` is given, and there are no activations, or they
                do not all have as many tokens.
        """
        overload = _registry.overload_of(op, "warmup")
        self._sync()
        route = self.routes.get(overload.name())
        if route is None:
            raise ValueError(f"warmup: the mode does not catch {overload}; look at its ops= or register the op first")
        arguments = flatten(route.callee.parameters, args, kwargs)
        calls = [(args, kwargs)] if tokens is None else [activations_with_tokens(arguments, n) for n in tokens]
        config = replace(self.config, background=False)  # the same code, but waited for
        watcher = DispatchCompileMode(ops=[overload], config=config, cache=self.cache, trace=True)
        assert watcher.trace is not None
        with watcher:
            for call_args, call_kwargs in calls:
                overload(*call_args, **call_kwargs)
        return watcher.trace.events

    def explain(self, op: Any, /, *args: Any, **kwargs: Any) -> Explanation:
        """What the mode would do with a call if it were made now on this thread, and why.

        Nothing runs or is compiled, counted, cached or traced; an implementation that is not compiled yet is captured,
        on fake tensors. The mode need not be entered. Other dispatch modes, which would see the call first, are taken
        to hand it on as it is.

        Args:
            op: the IR op object, ``OpOverload``, ``OpOverloadPacket`` or ``"ns::name"``.
            args, kwargs: the call's arguments.

        Raises:
            ValueError: no such op, or no IR op.
            TypeError, RuntimeError: arguments that the op does not take.
        """
        native = getattr(op, "dispatch_compile_native", None)
        if native is not None:
            return explanation_of_function(self, native, args, kwargs)
        overload = _registry.overload_of(op, "explain")
        self._sync()
        return explanation_of(self, overload, args, kwargs)

    def _outdated(self) -> bool:
        """Whether a source that does not say when its ops change has other ops than when they were last looked at."""
        return [ref() for ref in self._polled] != _registry.polled_ops()

    def _sync(self) -> None:
        """Catch the ops that are known now, and no longer those that are gone."""
        with self._sync_lock:
            ops = _registry.known_ops()
            selected = [
                (op, overload) for op in ops for overload in _registry.overloads(op) if self._selects(op, overload)
            ]
            routes: dict[Hashable, Route | None] = {
                overload.name(): self._route(op, overload) for op, overload in selected
            }
            wanted = {overload for _, overload in selected}
            if self.trace is not None:
                wanted |= opaque_overloads()
            gone, fresh = self._caught - wanted, wanted - self._caught
            _hooks.release(gone)  # first: an op may have come back under its name
            _hooks.acquire(fresh, kernel_of)
            self._caught -= gone
            self._caught |= fresh
            self._polled = [weakref.ref(op) for op in _registry.polled_ops()]
            self.routes = routes

    def route_of(self, native: Native) -> Route | None:
        """How the mode reads the calls of a function; None if it does not select it. Made at the first call."""
        if native.number not in self.routes:
            with self._sync_lock:
                selected = self._selects(native, None)
                self.routes[native.number] = Route(native, native.callee, self.config, self.cache) if selected else None
        return self.routes[native.number]

    def _route(self, op: Op, overload: OpOverload) -> Route:
        known = self.routes.get(overload.name())
        if known is not None and known.op() is op:
            return known
        automatic = getattr(op, "automatic", True)
        return Route(
            op, Callee.of(overload, Parameters.of(overload, op.activations, automatic)), self.config, self.cache
        )


hide_from_dynamo(DispatchCompileMode.__torch_dispatch__)


def _interception_for(trace: Trace | None) -> str:
    return EVERY_OP if trace is not None and trace.all_ops else SELECTIVE


def _ops_changed() -> None:
    for mode in list(_modes):
        mode._sync()


_registry.on_change(_ops_changed)
