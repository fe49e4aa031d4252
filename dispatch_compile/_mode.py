"""The mode: which ops it catches, how it sees calls, and entering and leaving it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._basics.checks import check_whole
from ._basics.fork import freed_in_children
from ._cache.cache import NativeCache
from ._cache.orders import Frozen, Orders
from ._call.explain import Explanation, explanation_of, explanation_of_function
from ._call.kernel import kernel_of
from ._call.route import Route
from ._compile.config import COMPILE, CompileConfig
from ._dispatch import hooks
from ._dispatch.active import EVERY_OP, SELECTIVE, active_modes, enter, leave
from ._dispatch.opaque import opaque_overloads
from ._ir import registry
from ._ir.protocol import Op, overloads
from ._ir.selection import Selectable, overload_of, selection
from ._specialize.arguments import Parameters, activations_with_tokens, flatten
from ._specialize.callee import Callee, full_name
from ._torch.dispatch import (
    OpOverload,
    OpOverloadPacket,
    QuietMode,
    hide_from_dynamo,
    pop_mode,
    push_mode,
    torchs_modes,
)
from ._trace.environment import trace_asked_for
from ._trace.event import OpCall, TraceEvent
from ._trace.trace import Trace
from ._warmup import arguments_with_tokens

if TYPE_CHECKING:
    from ._native import Native


def current_mode() -> DispatchCompileMode | None:
    """The innermost mode that this thread or task has entered, or else that of the process."""
    return next(iter(active_modes()), None)


_modes: weakref.WeakSet[DispatchCompileMode] = weakref.WeakSet()


class DispatchCompileMode(QuietMode):
    """Inside it, IR ops run as compiled code of the implementation that their dispatch chooses.

    Scope is the ``with`` block, and the thread or the task of an event loop that entered it. Calls are caught wherever
    they are made, also inside opaque custom ops at any depth; see ``dispatch_compile._hooks`` for how. Every other op,
    and every call that cannot be compiled rightly, behaves as if there were no mode. A mode may be entered again and
    again, also while it is entered, and on several threads. Of nested modes the innermost that selects the op decides.

    Make one mode and keep it: a new mode has a new cache unless it is given one.

    Args:
        ops: the IR ops to catch: IR op objects, ``OpOverload``s, ``OpOverloadPacket``s, namespace names,
            ``"ns::name"``; None for every IR op known, now and later. What their implementations call is fused whether
            it is among them or not.
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
        ops: Iterable[Selectable] | None = None,
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
        self._orders = Orders()
        # For the kernel, by the overload's name, and for natives by their number; None if it is not selected.
        self.routes: dict[Hashable, Route | None] = {}
        self._selects = selection(ops)
        self._polled: list[weakref.ref[Op]] = []
        self._caught: set[OpOverload] = set()
        self._sync_lock = freed_in_children(threading.Lock())
        weakref.finalize(self, hooks.release, self._caught)
        _modes.add(self)
        self._sync()

    def __enter__(self) -> DispatchCompileMode:
        self.look_for_ops()
        if self.interception == EVERY_OP:
            super().__enter__()
        enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        leave(self)
        if self.interception == EVERY_OP:
            self._leave_torchs_stack()

    @contextmanager
    def on_torchs_stack(self) -> Iterator[None]:
        """Be on torch's stack of modes, without being entered."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _leave_torchs_stack(self) -> None:
        """Be off torch's stack of modes, whatever was put on it since: torch takes off what is on top."""
        if not any(self is mode for mode in torchs_modes()):
            raise RuntimeError(
                "DispatchCompileMode: a mode whose trace records every op must be left on the thread that entered it, "
                "and not in the body of an op"
            )
        inner = []
        while (mode := torchs_modes()[-1]) is not self:
            pop_mode(mode)
            inner.append(mode)
        pop_mode(self)
        for mode in reversed(inner):
            push_mode(mode)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See an op that is not caught further down; change nothing. Only with interception of every op.

        torch's stack belongs to the thread, so ops of tasks that are not in the mode come this way as well.
        """
        kwargs = kwargs or {}
        if self.trace is None or hooks.caught(func) or self not in active_modes():
            return func(*args, **kwargs)
        call = self.trace.begin(OpCall, full_name(func), args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self.trace.end_raising(call, error)
            raise
        self.trace.end(call, result)
        return result

    def freeze(self) -> Frozen:
        """From now on make nothing: on no thread is anything captured, compiled or loaded for a call in this mode.

        A call that needs new code runs natively. It is counted under the reason ``frozen``, and a warning says, once
        for each op, what to add to the warm-up. With ``CompileConfig(on_new="raise")`` such calls raise as before.
        Calls that have their code are served as before, at the same cost.

        What is being compiled at this moment is finished, and used then. What waits in the background is not begun;
        wait for it first with :meth:`NativeCache.wait`. What another mode on the same cache makes is there for this
        one, too.

        Returns:
            A context that takes it back at its end: ``with mode.freeze(): ...``. Without ``with``, :meth:`thaw` does.
        """
        return Frozen(self._orders)

    def thaw(self) -> None:
        """Undo :meth:`freeze`. Harmless when the mode is not frozen."""
        self._orders.frozen = False

    def warmup(
        self, op_or_fn: Selectable, /, *args: Any, tokens: Sequence[int] | None = None, **kwargs: Any
    ) -> list[TraceEvent]:
        """Compile ahead what calls to come will need, by making them.

        A call in a CUDA graph capture, or in a frozen mode, cannot compile, and a first call elsewhere takes the time
        that compiling takes; after this none of it happens. Do it in the grad or inference mode of the calls to come.
        What they need is compiled now, whatever ``on_new`` is.

        Args:
            op_or_fn: the IR op object, ``OpOverload``, ``OpOverloadPacket`` or ``"ns::name"``. Or a function, a layer,
                a custom op: it is run, and what it calls of the mode's IR ops is compiled.
            args, kwargs: arguments as the calls to come will have them. They are not changed, unless a function
                changes them.
            tokens: the token counts to warm up for. Tensors are replaced by zeros of so many tokens: an op's
                activations, and a function's arguments with as many rows as there are tokens now. That is dimension 0
                of the first tensor for a parameter whose name starts with ``x``, or if there is none, of the first
                tensor. Lists, tuples and dicts are looked into. An ``nn.Parameter`` is never replaced; for another
                tensor to stay, give it another number of rows. One count from 2 up serves all those from 2 up; 1 and
                0 are compiled for on their own. None: the call as it is given.

        Returns:
            What became of each call of an IR op; look at ``action`` and ``reason`` for those that do not run compiled.

        Raises:
            RuntimeError: the mode is frozen.
            ValueError: the mode does not catch the op; ``tokens`` is given, and there are no activations, or they
                do not all have as many tokens; no argument of a function has a dimension 0; a negative count.
            TypeError: neither an op nor something that can be called; too many arguments; ``tokens`` is no list of
                whole numbers.
        """
        if self._orders.frozen:
            raise RuntimeError("warmup: the mode is frozen, so that nothing is compiled; thaw() it first")
        if tokens is not None:
            tokens = _checked_tokens(tokens)
        config = replace(self.config, on_new=COMPILE)  # the same code, but waited for
        overload = self._caught_overload(op_or_fn, args)
        fn: Callable[..., Any]
        if overload is None:
            assert callable(op_or_fn), "what names no op is a function"
            fn = op_or_fn
            watcher = DispatchCompileMode(config=config, cache=self.cache, trace=True)
            watcher._selects = self._selects
        else:
            fn = overload
            watcher = DispatchCompileMode(ops=[overload], config=config, cache=self.cache, trace=True)
        assert watcher.trace is not None

        def call(count: int | None) -> None:
            call_args, call_kwargs = self._with_tokens(fn, overload, args, kwargs, count)
            fn(*call_args, **call_kwargs)

        with watcher:
            for count in [None] if tokens is None else tokens:
                call(count)
            # What is not declared as an activation becomes dynamic when it changes.
            if tokens and set(tokens) == {tokens[0]} and tokens[0] > 1 and any(map(_is_static, watcher.trace.events)):
                call(2 * tokens[0])
        return watcher.trace.events

    def _with_tokens(
        self,
        fn: Callable[..., Any],
        overload: OpOverload | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tokens: int | None,
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments of a call to warm up for so many tokens, or as it is given."""
        if tokens is None:
            return args, kwargs
        if overload is None:
            return arguments_with_tokens(fn, args, kwargs, tokens)
        route = self.routes[overload.name()]
        assert route is not None, "only natives have none"
        parameters = route.callee.parameters
        return activations_with_tokens(parameters, flatten(parameters, args, kwargs), tokens)

    def _caught_overload(self, op_or_fn: Selectable, args: tuple[Any, ...]) -> OpOverload | None:
        """The overload of the IR op that is to be warmed up; None for a function.

        Raises:
            ValueError: the mode does not catch the op.
            TypeError: neither one nor the other, or too many arguments.
        """
        names_op = isinstance(op_or_fn, (str, OpOverload, OpOverloadPacket)) or hasattr(op_or_fn, "torch_op")
        if not names_op:
            if not callable(op_or_fn):
                raise TypeError(
                    f"warmup: op must be an OpOverload (torch.ops.ns.name.default), 'ns::name' or a function, "
                    f"not {op_or_fn!r}"
                )
            return None
        overload = overload_of(op_or_fn, "warmup")
        self._sync()
        route = self.routes.get(overload.name())
        if route is not None:
            known = route.callee.parameters.names
            if len(args) > len(known):
                raise TypeError(f"warmup: {overload} takes {len(known)} arguments {known}, but {len(args)} were given")
            return overload
        raise ValueError(f"warmup: the mode does not catch {overload}; look at its ops= or register the op first")

    def explain(self, op: Selectable, /, *args: Any, **kwargs: Any) -> Explanation:
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
        overload = overload_of(op, "explain")
        self._sync()
        return explanation_of(self, overload, args, kwargs)

    def look_for_ops(self) -> None:
        """Catch the ops of sources that do not say when these change, if they have changed."""
        if self.trace is not None or self._outdated():
            self._sync()

    def _outdated(self) -> bool:
        """Whether a source that does not say when its ops change has other ops than when they were last looked at."""
        return [ref() for ref in self._polled] != registry.polled_ops()

    def _sync(self) -> None:
        """Catch the ops that are known now, and no longer those that are gone."""
        with self._sync_lock:
            ops = registry.known_ops()
            selected = [(op, overload) for op in ops for overload in overloads(op) if self._selects(op, overload)]
            routes: dict[Hashable, Route | None] = {
                overload.name(): self._route(op, overload) for op, overload in selected
            }
            wanted = {overload for _, overload in selected}
            if self.trace is not None:
                wanted |= opaque_overloads()
            gone, fresh = self._caught - wanted, wanted - self._caught
            hooks.release(gone)  # first: an op may have come back under its name
            hooks.acquire(fresh, kernel_of)
            self._caught -= gone
            self._caught |= fresh
            if self._outdated():
                registry.dispatch_changed()
            self._polled = [weakref.ref(op) for op in registry.polled_ops()]
            self.routes = routes

    def route_of(self, native: Native) -> Route | None:
        """How the mode reads the calls of a function; None if it does not select it. Made at the first call."""
        routes = self.routes  # another thread may replace them
        if native.number not in routes:
            with self._sync_lock:
                routes = self.routes
                if native.number not in routes:
                    selected = self._selects(native, None)
                    made = Route(native, native.callee, self.config, self.cache, self._orders) if selected else None
                    routes[native.number] = made
        return routes[native.number]

    def _route(self, op: Op, overload: OpOverload) -> Route:
        known = self.routes.get(overload.name())
        if known is not None and known.op() is op:
            return known
        automatic = getattr(op, "automatic", True)
        callee = Callee.of(overload, Parameters.of(overload, op.activations, automatic))
        return Route(op, callee, self.config, self.cache, self._orders)


hide_from_dynamo(DispatchCompileMode.__torch_dispatch__)


def _checked_tokens(tokens: Any) -> list[int]:
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise TypeError(f"warmup: tokens is a list of token counts; write tokens=[{tokens!r}]")
    counts = list(tokens)
    if not counts:
        raise ValueError("warmup: tokens must name one count or more")
    for count in counts:
        check_whole("warmup", "a token count", count, least=0)
    return counts


def _interception_for(trace: Trace | None) -> str:
    return EVERY_OP if trace is not None and trace.all_ops else SELECTIVE


def _is_static(event: TraceEvent) -> bool:
    """Whether a call runs compiled code of no dynamic size."""
    return event.specialization is not None and "s0" not in event.specialization


def _ops_changed() -> None:
    for mode in list(_modes):
        mode._sync()


registry.on_change(_ops_changed)
