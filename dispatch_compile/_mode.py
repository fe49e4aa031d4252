"""The mode: for each caught call, is it an IR op of ours, may it run compiled here, and what runs then."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from . import _hooks, _registry
from ._cache import Counters, NativeCache, Table
from ._capture import first_line
from ._compilation import CannotCompile, Specialization, specialize
from ._config import CompileConfig
from ._errors import CompileError, DispatchCompileWarning
from ._ir import Impl, Op
from ._opaque import opaque_overloads
from ._specialization import MISS, Arguments, Parameters, flatten, key_of, why_aside
from ._torch_private import OpOverload, TorchDispatchMode, compile_lock, hide_from_dynamo
from ._trace import NATIVE, PASSED, Trace, TraceEvent, described

_log = logging.getLogger("dispatch_compile")


class _ThreadState(threading.local):
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


_thread = _ThreadState()


def current_mode() -> DispatchCompileMode | None:
    """The innermost mode entered on this thread."""
    return _thread.stack[-1] if _thread.stack else None


def _no_impl() -> None:
    return None


class _Route:
    """How a mode reads the calls of one overload. It keeps neither the op nor an implementation alive."""

    def __init__(self, op: Op, overload: OpOverload, counters: Counters) -> None:
        self.op = weakref.ref(op)
        self.overload = overload
        self.counters = counters
        self.parameters = Parameters.of(overload, op.activations)
        # The implementation that dispatch chose last, with its table (None: its provider is not to be compiled).
        self.last: tuple[Callable[[], Any], Table | None] = (_no_impl, None)


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
        trace: whether to record what is done with each call, in :attr:`trace`.

    Raises:
        ValueError, TypeError: an item of ``ops`` that is no IR op.
    """

    def __init__(
        self,
        *,
        ops: Iterable[Any] | None = None,
        config: CompileConfig | None = None,
        cache: NativeCache | None = None,
        trace: bool = False,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, CompileConfig):
            raise TypeError(f"DispatchCompileMode: config must be a CompileConfig, not {config!r}")
        if cache is not None and not isinstance(cache, NativeCache):
            raise TypeError(f"DispatchCompileMode: cache must be a NativeCache, not {cache!r}")
        self.config = config or CompileConfig()
        self.cache = cache if cache is not None else NativeCache()
        self.trace = Trace() if trace else None
        self._selects = _registry.selection(ops)
        self._routes: dict[int, _Route] = {}  # by id of the overload: hashing one runs Python
        self._seen: list[weakref.ref[Op]] = []
        self._caught: set[OpOverload] = set()
        self._sync_lock = threading.Lock()
        weakref.finalize(self, _hooks.release, self._caught)
        _modes.add(self)

    def __enter__(self) -> DispatchCompileMode:
        if self.trace is not None or [ref() for ref in self._seen] != _registry.known_ops():
            self._sync()
        _thread.push(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not _thread.stack or _thread.stack[-1] is not self:
            raise RuntimeError("DispatchCompileMode: modes must be left in the reverse order of entering")
        _thread.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Change nothing: calls are caught further down, where they also come from opaque ops' bodies."""
        return func(*args, **(kwargs or {}))

    def _sync(self) -> None:
        """Catch the ops that are known now, and no longer those that are gone."""
        with self._sync_lock:
            ops = _registry.known_ops()
            routes = {
                id(overload): self._route(op, overload)
                for op in ops
                for overload in _registry.overloads(op)
                if self._selects(op, overload)
            }
            wanted = {route.overload for route in routes.values()}
            if self.trace is not None:
                wanted |= opaque_overloads()
            gone, fresh = self._caught - wanted, wanted - self._caught
            _hooks.release(gone)  # first: an op may have come back under its name
            _hooks.acquire(fresh, _kernel)
            self._caught -= gone
            self._caught |= fresh
            self._seen = [weakref.ref(op) for op in ops]
            self._routes = routes

    def _route(self, op: Op, overload: OpOverload) -> _Route:
        known = self._routes.get(id(overload))
        return known if known is not None and known.op() is op else _Route(op, overload, self.cache.counters)

    def _run(
        self, route: _Route, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], event: TraceEvent | None
    ) -> Any:
        op = route.op()
        if op is None:
            return _hooks.redispatch(route.overload, keyset, args, kwargs)
        impl = op.dispatch(*args, **kwargs)
        last, table = route.last
        if last() is not impl:
            table = self.cache.table(op, impl, self.config) if impl.provider in self.config.providers else None
            route.last = (weakref.ref(impl), table)
        if event is not None:
            event.provider = impl.provider
        if table is not None:
            call = _Call(route, keyset, args, kwargs, event)
            for entry in table.guarded:
                try:
                    result = entry.call(args, kwargs)
                except Exception as error:
                    return self._run_after_error(call, error)
                if result is not MISS:
                    return self._finish(call, entry.specialization, result, new=False)
            return self._run_unseen(call, op, impl)
        if event is not None:
            event.not_compiled(PASSED, f"provider {impl.provider!r} is not in providers {self.config.providers}")
        return _hooks.redispatch(route.overload, keyset, args, kwargs)

    def _run_unseen(self, call: _Call, op: Op, impl: Impl) -> Any:
        """A call that no exact guard admits: step aside, or find its specialization by key, or make it."""
        arguments = flatten(call.route.parameters, call.args, call.kwargs)
        reason = why_aside(arguments)
        if reason is not None:
            self.cache.counters.asides += 1
            call.note(PASSED, reason)
            return call.redispatch()
        key = key_of(arguments)
        table = self.cache.table(op, impl, self.config)  # not the route's: the cache may have been cleared
        call.route.last = (weakref.ref(impl), table)
        failure = None
        with compile_lock():
            specialization = table.find(key, call.args, call.kwargs)
            new = specialization is None
            if specialization is None:
                if _captures_cuda_graph(arguments):
                    self.cache.counters.fallbacks += 1
                    call.note(NATIVE, "not compiled yet, and a CUDA graph is being captured")
                    return call.redispatch()
                try:
                    with _thread.suspended():
                        specialization = specialize(call.route.overload, impl, arguments, self.config)
                    self.cache.counters.compiles += specialization.code is not None
                    table.add(key, specialization)
                except CannotCompile as error:
                    failure = error
        if specialization is None:
            assert failure is not None
            return self._run_uncompilable(call, table, key, arguments, failure)
        entry = table.add_guard(specialization, arguments)
        try:
            result = entry.call(call.args, call.kwargs)
        except Exception as error:
            return self._run_after_error(call, error)
        return self._finish(call, specialization, result, new)

    def _finish(self, call: _Call, specialization: Specialization, result: Any, new: bool) -> Any:
        """The end of a call whose specialization is known: ``result`` is what its guarded call gave."""
        if specialization.code is not None:
            self.cache.counters.hits += 1
            if call.event is not None:
                call.event.compiled(specialization.code.symbolic_shapes, new)
            return result
        reason = specialization.failure or ""
        self.cache.counters.fallbacks += 1
        call.note(NATIVE, reason)
        if specialization.fatal:
            raise CompileError(reason)
        return call.redispatch()

    def _run_after_error(self, call: _Call, error: Exception) -> Any:
        """Compiled code raised: let the op itself say whether that is an error, and which."""
        result = call.redispatch()
        self.cache.counters.fallbacks += 1
        reason = f"its compiled code raised {first_line(error)}"
        call.note(NATIVE, reason)
        _warn(f"{call.route.overload.name()}: {reason}; the op ran natively, without an error")
        return result

    def _run_uncompilable(
        self, call: _Call, table: Table, key: Hashable, arguments: Arguments, failure: CannotCompile
    ) -> Any:
        """The first call of a specialization that cannot be compiled."""
        result = call.redispatch()  # an error of the implementation itself comes out here, as in eager
        specialization = Specialization(code=None, failure=str(failure), fatal=self.config.on_failure == "raise")
        table.add(key, specialization)
        table.add_guard(specialization, arguments)
        self.cache.counters.fallbacks += 1
        call.note(NATIVE, str(failure))
        if specialization.fatal:
            raise CompileError(str(failure)) from failure.__cause__
        if str(failure) not in table.failures_warned_of:
            table.failures_warned_of.add(str(failure))
            _warn(f"{failure}; it runs natively")
        return result


@dataclass
class _Call:
    """A caught call, on the paths where an object more does not matter."""

    route: _Route
    keyset: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    event: TraceEvent | None

    def redispatch(self) -> Any:
        return _hooks.redispatch(self.route.overload, self.keyset, self.args, self.kwargs)

    def note(self, action: str, reason: str) -> None:
        if self.event is not None:
            self.event.not_compiled(action, reason)


def _warn(text: str) -> None:
    _log.warning("%s", text)
    warnings.warn(text, DispatchCompileWarning, stacklevel=2)


def _captures_cuda_graph(arguments: Arguments) -> bool:
    on_cuda = any(leaf.value.is_cuda for leaf in arguments.tensors)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _kernel(overload: OpOverload) -> Callable[..., Any]:
    """The kernel that catches calls of ``overload`` in every thread of the process."""

    thread, key = _thread, id(overload)

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        mode = thread.untraced
        if mode is not None:
            route = mode._routes.get(key)
            if route is not None:
                op = route.op()
                last, table = route.last
                # `is`: the implementation that dispatch chooses now has the table that is at hand.
                if table is not None and op is not None and op.dispatch(*args, **kwargs) is last():
                    try:
                        for call in table.calls:
                            result = call(args, kwargs)
                            if result is not MISS:
                                route.counters.hits += 1
                                return result
                    except Exception:
                        pass  # the long way deals with it
        return _intercept(overload, keyset, args, kwargs)

    hide_from_dynamo(kernel)
    return kernel


def _intercept(overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole way of a caught call, of which the kernel takes a short cut."""
    if _thread.tracing:
        return _run_traced(overload, keyset, args, kwargs)
    for mode in reversed(_thread.stack):
        route = mode._routes.get(id(overload))
        if route is not None:
            return mode._run(route, keyset, args, kwargs, None)
    return _hooks.redispatch(overload, keyset, args, kwargs)


def _run_traced(overload: OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the kernel does, in front of the traces of every mode entered on this thread."""
    traces = list({id(mode.trace): mode.trace for mode in _thread.stack if mode.trace is not None}.values())
    for mode in reversed(_thread.stack):
        route = mode._routes.get(id(overload))
        if route is not None:
            event, *others = [trace.begin(overload, args, kwargs) for trace in traces]
            try:
                result = mode._run(route, keyset, args, kwargs, event)
                event.ended(result)
                return result
            except BaseException as error:
                event.raised(error)
                raise
            finally:
                for other in others:
                    other.ended_like(event)
    with ExitStack() as calls:
        opaque = [calls.enter_context(trace.opaque(overload, args, kwargs)) for trace in traces]
        result = _hooks.redispatch(overload, keyset, args, kwargs)
        for call in opaque:
            call.result = described(result)
        return result


def _ops_changed() -> None:
    for mode in list(_modes):
        mode._sync()


_registry.on_change(_ops_changed)
