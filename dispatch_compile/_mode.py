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
    """Inside it, calls of natives and IR ops run compiled, wherever they are made.

    Use it when

    - an opaque custom op (fused MoE, MLA attention) calls plain PyTorch, which ``torch.compile`` of the model cannot
      see;
    - many places call the same small ops, and are to share one compiled version, without a ``torch.compile`` around
      each;
    - every other op of the engine, and every other dispatch mode, must be left as it is, at the same cost.

    Enter it around the code that makes the calls; around a whole model will do:

    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True)  # by default: Inductor
    >>> with torch.inference_mode(), mode:
    ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
    ...     y = dc.ops.silu_and_mul(torch.ones(9, 256))
    >>> print(mode.trace)
    dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, new: [s0, 256]
    dispatch_compile::silu_and_mul(t: f32[9, 256])  ->  t: f32[9, 128]  # compiled native, reused: [s0, 256]

    Make one mode and keep it: a new mode has a new cache, unless you give it one.

    The mode covers the ``with`` block, on the thread and in the task that entered it. It catches calls at any depth of
    opaque custom ops. Every other op, and every call that cannot be compiled correctly, behaves as if there were no
    mode. You may enter a mode repeatedly, also while it is entered, and on several threads. Of nested modes, the
    innermost one that selects the op decides. :func:`enable` covers a whole process.

    Args:
        ops: the IR ops and natives to catch: IR op objects, ``OpOverload``s, ``OpOverloadPacket``s, functions decorated
            with :func:`native`, names of namespaces or modules, ``"ns::name"``. None catches all that are known, now
            and later. Ops that a caught implementation calls are fused with it even if they are not listed.
        config: how to compile; :class:`CompileConfig` has the defaults.
        cache: where compiled code is kept; by default a new :class:`NativeCache`.
        trace: True to record each call in :attr:`trace`, or the :class:`Trace` to record it in.

    Attributes:
        config, cache: as given.
        trace: the :class:`Trace`, or None when tracing is off. With ``DISPATCH_COMPILE_TRACE=1`` in the environment, a
            mode that is given no trace has one that prints to stderr and keeps nothing.
        interception: how the mode sees calls. ``"selective"``: only calls of the IR ops and natives (and of custom ops,
            while a mode traces); other ops cost what they cost without it. ``"every op"``: the mode is on torch's stack
            of modes, as other ``TorchDispatchMode``s are; it sees every op of the thread, and each costs microseconds
            more. A mode is ``"every op"`` only if its trace records all ops. IR ops run compiled in both.

    Raises:
        ValueError: an item of ``ops`` names no IR op; ``DISPATCH_COMPILE_TRACE`` is not 1, 0 or empty.
        TypeError: an argument, or an item of ``ops``, of the wrong type.
        RuntimeError: on leaving the mode where it was not entered.
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
        """Compile nothing from now on, on any thread: for a server after its warm-up, so that no request waits for a
        compiler.

        A call that has its code runs as before, at the same cost. A call that needs new code runs eagerly. It counts as
        a fallback with the reason ``frozen``, and the first such call of each op warns, and says what to add to the
        warm-up. With ``CompileConfig(on_new="raise")`` such calls still raise a :class:`CompileError`.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"), trace=True)
        >>> with mode:
        ...     events = mode.warmup(dc.ops.silu_and_mul, torch.ones(8, 256))
        ...     with mode.freeze():
        ...         y = dc.ops.silu_and_mul(torch.ones(9, 256))
        ...         y = dc.ops.silu_and_mul(torch.ones(9, 256).double())
        >>> print(mode.trace)
        dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, new: [s0, 256]
        dispatch_compile::silu_and_mul(t: f32[9, 256])  ->  t: f32[9, 128]  # compiled native, reused: [s0, 256]
        dispatch_compile::silu_and_mul(t: f64[9, 256])  ->  t: f64[9, 128]  # eager native, frozen

        A compilation that is running is finished, and its code is used. Compilations that wait in the background are
        not started; call :meth:`NativeCache.wait` first to have them, too. Code that another mode adds to the same
        cache is used.

        Returns:
            A context manager that ends the freeze: ``with mode.freeze(): ...``. Without ``with``, :meth:`thaw` ends it.
        """
        return Frozen(self._orders)

    def thaw(self) -> None:
        """Undo :meth:`freeze`: calls that need new code are compiled again. Harmless when the mode is not frozen.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        >>> frozen = mode.freeze()
        >>> mode.thaw()
        >>> [event.action for event in mode.warmup(dc.ops.silu_and_mul, torch.ones(8, 256))]
        ['compiled']
        """
        self._orders.frozen = False

    def warmup(
        self, op_or_fn: Selectable, /, *args: Any, tokens: Sequence[int] | None = None, **kwargs: Any
    ) -> list[TraceEvent]:
        """Compile ahead what later calls will need, by making them: before serving, and before a CUDA graph is
        captured.

        A call in a CUDA graph capture, or in a frozen mode, cannot compile. Elsewhere a first call takes as long as
        compiling takes. Warm up in the grad mode or inference mode of the later calls. Everything is compiled before
        this returns, whatever ``on_new`` is.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        >>> with torch.inference_mode():
        ...     for event in mode.warmup(dc.ops.silu_and_mul, torch.ones(8, 256), tokens=[1, 8192]):
        ...         print(event)
        dispatch_compile::silu_and_mul(t: f32[1, 256])  ->  t: f32[1, 128]  # compiled native, new: [1, 256]
        dispatch_compile::silu_and_mul(t: f32[8192, 256])  ->  t: f32[8192, 128]
            # compiled native, new: [s0, 256]; x's shape is [s0, 256], was [1, 256]

        Args:
            op_or_fn: an IR op object, ``OpOverload``, ``OpOverloadPacket`` or ``"ns::name"``. Or a function, a layer or
                a custom op: it runs, and all natives and IR ops that it calls, of those that this mode catches, are
                    compiled.
            args, kwargs: arguments like those of the later calls. They stay as they are, unless the function or op
                writes to them.
            tokens: the token counts to warm up for. The activations of an op, and those arguments of a function that
                have as many rows as there are tokens now, are replaced by zeros with that many rows. "Now" is dimension
                0 of the first tensor for a parameter whose name starts with ``x``, or else of the first tensor. Tensors
                in lists, tuples and dicts are replaced, too. An ``nn.Parameter`` never is; to keep another tensor, give
                it another number of rows. One count from 2 up serves all counts from 2 up; 1 and 0 each need their own.
                None makes the call with the arguments as they are.

        Returns:
            What became of each call. Where ``action`` is not ``"compiled"``, ``reason`` says why.

        Raises:
            RuntimeError: the mode is frozen.
            ValueError: the mode does not catch the op; ``tokens`` is empty, or has a negative count; ``tokens`` is
                given, and the op has no activations, their token counts differ, or a function has no argument with a
                dimension 0.
            TypeError: ``op_or_fn`` is neither an op nor callable; an op gets too many arguments; ``tokens`` is not a
                list of whole numbers.
            CompileError: with ``on_failure="raise"``, an implementation cannot be compiled.
            Exception: whatever the call itself raises.
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
        """Say what the mode would do with a call if this thread made it now, and why, without making it.

        Use it when the trace says that a call runs eagerly or steps aside, or to read the graph and the generated code.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        >>> explanation = mode.explain(dc.ops.silu_and_mul, torch.ones(8, 256))
        >>> explanation.action, explanation.new, explanation.specialization
        ('compiled', True, '[s0, 256]')
        >>> print(mode.explain(dc.ops.silu_and_mul, torch.ones(8, 256, device="meta")))
        dispatch_compile::silu_and_mul(t: f32[8, 256]...)
        would step aside: x is on the meta device
        implementation: native, since no priority is set

        Nothing is run, compiled, counted, cached or traced. An implementation that is not compiled yet is captured on
        fake tensors. The mode need not be entered. Other dispatch modes would see a real call first; they are assumed
        to pass it on unchanged.

        Args:
            op: an IR op object, ``OpOverload``, ``OpOverloadPacket`` or ``"ns::name"``, or a function decorated with
                :func:`native`.
            args, kwargs: the call's arguments.

        Raises:
            ValueError: there is no such op, it has several overloads, or it is no IR op.
            TypeError, RuntimeError: arguments that the op or function does not take.
            Exception: whatever a ``supports_args`` of the op raises.
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
