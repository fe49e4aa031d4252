"""The calls of one op in a mode: which implementation, compiled or not, and what runs then."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from .._basics.errors import CompileError, first_line, warn
from .._basics.summary import summary_of, text_of
from .._cache.cache import NativeCache
from .._cache.making import FROZEN, Maker
from .._cache.orders import Orders
from .._cache.retry import Postponed
from .._cache.table import Guarded, Table
from .._compile.config import NATIVE as RUN_NATIVELY
from .._compile.config import RAISE, CompileConfig, not_in_providers
from .._compile.failure import CannotCompile, CannotCompileNow, WrongReference, free_memory_of
from .._compile.specialization import Specialization
from .._dispatch.active import bodies_watched
from .._ir.protocol import Impl, Op, eager_provider
from .._specialize.arguments import Arguments, Learned, flatten
from .._specialize.aside import why_aside, why_function_aside
from .._specialize.callee import Callee
from .._specialize.change import newly_dynamic, pattern_of, why_dynamic
from .._specialize.difference import components_of
from .._specialize.guards import MISS, GuardedCall
from .._specialize.key import key_of
from .._specialize.stand_ins import Relearn
from .._torch.dispatch import profiler
from .._trace.event import COMPILED, EAGER, PASSED, TraceEvent
from .profiler import in_profiler_range

_log = logging.getLogger("dispatch_compile")


def _no_impl() -> None:
    return None


class Route:
    """How a mode reads the calls of one op or function. It keeps neither the op nor an implementation alive.

    Attributes:
        last: the implementation that dispatch chose last, with its table (None: its provider is not to be compiled).
            The kernel takes its short cut by it.
    """

    def __init__(self, op: Op, callee: Callee, config: CompileConfig, cache: NativeCache, orders: Orders) -> None:
        self.op = weakref.ref(op)
        self.callee = callee
        self.config = config
        self.cache = cache
        self.orders = orders
        self.counters = cache.counters_of(callee.full_name)
        self._maker = Maker(callee, config, self.counters, cache.artifacts, orders)
        self.last: tuple[Callable[[], Any], Table | None] = (_no_impl, None)

    def run(self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], event: TraceEvent | None) -> Any:
        """Run a caught call, and say in ``event`` what was done and why."""
        op = self.op()
        if op is None:
            return self.callee.run(keyset, args, kwargs)
        impl = op.dispatch(*args, **kwargs)
        last, table = self.last
        if last() is not impl:
            table = self.cache.table(op, impl, self.config) if impl.provider in self.config.providers else None
            self.last = (weakref.ref(impl), table)
        call = _Call(self, keyset, args, kwargs, event, impl.provider, eager_provider(op, impl))
        if event is not None:
            event.provider = call.eager_provider
        if table is None:
            return call.pass_on(not_in_providers(impl.provider, self.config))
        for entry in table.guarded:
            try:
                result = self._guarded_call(entry, impl)(args, kwargs)
            except Exception as error:
                return self._run_after_error(call, entry.specialization.writes, error)
            if result is not MISS:
                return self._finish(call, entry.specialization, result)
        if self.makes_nothing and self.config.on_new != RAISE and table.misses(args, kwargs):
            return self._run_eagerly(call, FROZEN)
        return self._run_unseen(call, op, impl)

    def _run_unseen(self, call: _Call, op: Op, impl: Impl) -> Any:
        """A call that no exact guard admits: step aside, or find its specialization by key, or make it."""
        table = self.cache.table(op, impl, self.config)  # not the route's: the cache may have been cleared
        self.last = (weakref.ref(impl), table)
        while True:
            learned = table.learned
            arguments = flatten(self.callee.parameters, call.args, call.kwargs, learned)
            try:
                return self._run_with(call, impl, table, arguments)
            except Relearn as again:
                table.learn(again.more, again.why)
            if table.learned == learned:
                raise AssertionError(f"{self.callee.name}: nothing was learned of how its arguments are read")

    def _run_with(self, call: _Call, impl: Impl, table: Table, arguments: Arguments) -> Any:
        reason = (why_function_aside(arguments) if self.callee.is_function else None) or why_aside(arguments)
        if reason is not None:
            return call.pass_on(reason)
        key = key_of(arguments)
        found = table.find(key, arguments)
        if found is None:
            if self.makes_nothing:
                return self._run_frozen(call, impl, table, arguments)
            self._learn_what_changes(table, arguments, table.learned)
            if captures_cuda_graph(arguments):
                return self._run_eagerly(call, IN_CUDA_GRAPH)
            made = self._maker.make(impl, table, key, arguments, call.event)
            if isinstance(made, CannotCompile):
                return self._run_uncompilable(call, table, key, arguments, made)
            if isinstance(made, str):
                result = self._run_eagerly(call, made)
                if self._maker.is_full(table):
                    self._warn_of_full(impl, table, arguments)
                return result
            found = made
        reason = found.why_aside(arguments)
        if reason is not None:
            return call.pass_on(reason)
        entry = table.add_guard(key, found, arguments, self.callee.is_function)
        try:
            result = self._guarded_call(entry, impl)(call.args, call.kwargs)
        except Exception as error:
            return self._run_after_error(call, found.writes, error)
        if result is MISS:  # a priority has changed since it was found
            return self._run_eagerly(call, "the dispatch of the ops inside changed while it was compiled")
        return self._finish(call, found, result)

    def _learn_what_changes(self, table: Table, arguments: Arguments, learned: Learned) -> None:
        """Have what has changed since earlier calls read as dynamic.

        Raises:
            Relearn: there is such a thing.
        """
        automatic = self.callee.parameters.automatic
        names = newly_dynamic(arguments, table.patterns(), sizes=automatic, floats=not self.config.bitwise)
        if names - learned.dynamic:
            raise Relearn(Learned(dynamic=names), why_dynamic(arguments, names))

    @property
    def makes_nothing(self) -> bool:
        """Whether calls that need new code do without it."""
        return self.orders.frozen or self.config.on_new in (RUN_NATIVELY, RAISE)

    def _run_frozen(self, call: _Call, impl: Impl, table: Table, arguments: Arguments) -> Any:
        """A call that needs new code where none is made."""
        if self.config.on_new == RAISE:
            self._note_fallback(call, FROZEN)
            raise CompileError(self._what_to_warm_up(call, impl, table, arguments))
        missing = Specialization(None, components_of(arguments), pattern_of(arguments))
        table.note_missing(missing, arguments, self.callee.is_function)
        if FROZEN not in table.warned_of:
            _warn_once(table, FROZEN, f"{self._what_to_warm_up(call, impl, table, arguments)}. It runs eagerly")
        return self._run_eagerly(call, FROZEN)

    def _what_to_warm_up(self, call: _Call, impl: Impl, table: Table, arguments: Arguments) -> str:
        difference = table.difference(Specialization(None, components_of(arguments), pattern_of(arguments)))
        given = [text_of(summary_of(value)) for value in call.args[self.callee.parameters.hidden :]]
        given += [f"{name}={text_of(summary_of(value))}" for name, value in call.kwargs.items()]
        return (
            f"there is no code of the {impl.provider!r} implementation of {self.callee.name} for this call"
            f"{f' ({difference})' if difference else ''}, and the mode is to make none. Add to the warm-up: "
            f"mode.warmup({self.callee.name!r}, {', '.join(given)})"
        )

    @property
    def _range_name(self) -> str:
        return self.callee.name.replace("::", ".")

    def _guarded_call(self, entry: Guarded, impl: Impl) -> GuardedCall:
        """The call of a specialization; while a profiler is on, its code runs in a range that says what runs."""
        code = entry.specialization.code
        if code is None or not profiler._is_profiler_enabled:
            return entry.call
        name = f"dispatch_compile::{self._range_name} {COMPILED} {impl.provider} {code.symbolic_shapes}"
        return in_profiler_range(entry.call, name)

    def _finish(self, call: _Call, specialization: Specialization, result: Any) -> Any:
        """The end of a call whose specialization is known: ``result`` is what its guarded call gave."""
        if specialization.code is not None:
            self.counters.hits += 1
            if call.event is not None:
                new = call.event.compile_start is not None
                code = specialization.code
                call.event.compiled(call.provider, code.symbolic_shapes, new, code.composition)
            return result
        reason = specialization.failure or ""
        if specialization.fatal:
            self._note_fallback(call, reason)
            raise CompileError(reason)
        return self._run_eagerly(call, reason)

    def _run_eagerly(self, call: _Call, reason: str) -> Any:
        self._note_fallback(call, reason)
        if not profiler._is_profiler_enabled:
            return call.redispatch()
        with record_function(f"dispatch_compile::{self._range_name} {EAGER} {call.eager_provider}"):
            return call.redispatch()

    def _note_fallback(self, call: _Call, reason: str) -> None:
        self.counters.fell_back(reason)
        call.note(EAGER, reason)

    def run_after_error(
        self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, failed: GuardedCall
    ) -> Any:
        """Run a call for which ``failed``, in a short cut, raised."""
        table = self.last[1]
        entries = () if table is None else table.guarded
        written = any(entry.call is failed and entry.specialization.writes for entry in entries)
        return self._run_after_error(_Call(self, keyset, args, kwargs, None, "", ""), written, error)

    def _run_after_error(self, call: _Call, written: bool, error: Exception) -> Any:
        """Compiled code raised: let the op itself say whether that is an error, and which; unless the code may have
        written to arguments already."""
        if written:
            raise error
        free_memory_of(error)
        result = call.redispatch()
        reason = f"its compiled code raised {first_line(error)}"
        self._note_fallback(call, reason)
        warn(f"{self.callee.name}: {reason}; the op ran eagerly, without an error")
        return result

    def _run_uncompilable(
        self, call: _Call, table: Table, key: Hashable, arguments: Arguments, failure: CannotCompile
    ) -> Any:
        """The first call of a specialization that cannot be compiled."""
        reason = str(failure)
        fatal = self.config.on_failure == "raise" or isinstance(failure, WrongReference)
        # Before the op runs, which may change what its arguments are like.
        specialization = Specialization(
            None, components_of(arguments), pattern_of(arguments), failure=reason, fatal=fatal
        )
        result = call.redispatch()  # an error of the implementation itself comes out here, as in eager
        if isinstance(failure, CannotCompileNow):
            if table.postponed is None or table.postponed.is_over:
                table.postponed = Postponed.after(reason, table.postponed)
        elif table.find(key, arguments) is None:  # another thread may have failed at the same time
            table.add(key, specialization)
        self._note_fallback(call, reason)
        if fatal:
            raise CompileError(reason) from failure.__cause__
        _warn_once(table, reason, f"{reason}; it runs eagerly")
        return result

    def _warn_of_full(self, impl: Impl, table: Table, arguments: Arguments) -> None:
        _warn_once(
            table,
            "full",
            f"{table.size} specializations of the {impl.provider!r} implementation of {self.callee.name} are made, "
            f"and new ones run eagerly from now on. The latest call differs from the nearest of them: "
            f"{table.difference(Specialization(None, components_of(arguments), pattern_of(arguments)))}",
        )


@dataclass
class _Call:
    """A caught call, on the paths where an object more does not matter."""

    route: Route
    keyset: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    event: TraceEvent | None
    provider: str
    eager_provider: str

    def pass_on(self, reason: str) -> Any:
        """Run the call as if there were no mode."""
        self.route.counters.stepped_aside(reason)
        self.note(PASSED, reason)
        return self.redispatch()

    def redispatch(self) -> Any:
        with nullcontext() if self.event is None else bodies_watched():
            return self.route.callee.run(self.keyset, self.args, self.kwargs)

    def note(self, action: str, reason: str) -> None:
        if self.event is not None:
            self.event.not_compiled(action, reason)


def _warn_once(table: Table, reason: str, text: str) -> None:
    if reason not in table.warned_of:
        table.warned_of.add(reason)
        warn(text)


IN_CUDA_GRAPH = "not compiled yet, and a CUDA graph is being captured"


def captures_cuda_graph(arguments: Arguments) -> bool:
    """Whether the call is being recorded, so that nothing may be compiled or allocated beside it."""
    on_cuda = any(leaf.value.is_cuda for leaf in arguments.tensors)
    return on_cuda and torch.cuda.is_current_stream_capturing()
