"""The calls of one op or function in a mode: each is decided about, and what was decided is carried out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

from .._basics.errors import CompileError, first_line, warn
from .._basics.summary import summary_of, text_of
from .._cache.cache import NativeCache
from .._cache.making import Maker
from .._cache.orders import Orders
from .._cache.retry import Postponed
from .._cache.table import Guarded, Table
from .._compile.config import RAISE, CompileConfig
from .._compile.failure import free_memory_of
from .._compile.outcome import FROZEN, INSIDE_CHANGED, Aside, Eager, Failed
from .._compile.specialization import NoCode, Specialization
from .._dispatch.active import bodies_watched
from .._ir.protocol import Impl, Op, eager_provider
from .._specialize.arguments import NOTHING_LEARNED, Learned
from .._specialize.callee import Callee
from .._specialize.difference import components_of
from .._specialize.guards import MISS, GuardedCall
from .._specialize.stand_ins import Relearn
from .._torch.dispatch import profiler
from .._trace.event import ASIDE, COMPILED, EAGER, TraceEvent
from .decision import Decision, Load, Make, Read, Run, decide
from .profiler import in_profiler_range


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
        self.counters = cache.counters_of(callee.full_name)
        self.maker = Maker(callee, config, self.counters, cache.artifacts, orders)
        self.last: tuple[Callable[[], Any], Table | None] = (_no_impl, None)

    def run(self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], event: TraceEvent | None) -> Any:
        """Run a caught call, and say in ``event`` what was done and why."""
        op = self.op()
        if op is None:
            return self.callee.run(keyset, args, kwargs)
        impl = op.dispatch(*args, **kwargs)
        call = _Call(self, keyset, args, kwargs, event, impl, eager_provider(op, impl))
        if event is not None:
            event.provider = call.eager_provider
        if impl.provider not in self.config.providers:
            self.last = (weakref.ref(impl), None)
            return self._decide_and_run(call, Table())
        last, table = self.last
        if table is None or table.dropped or last() is not impl:
            table = self.cache.table(op, impl, self.config)
            self.last = (weakref.ref(impl), table)
        for entry in table.guarded:
            try:
                result = self._guarded_call(entry, impl)(args, kwargs)
            except Exception as error:
                return self._run_after_error(call, _writes(entry), error)
            if result is not MISS:
                return self._finish(call, entry.known, result)
        if self.maker.makes_nothing and self.config.on_new != RAISE and table.misses(args, kwargs):
            return self._run_eagerly(call, FROZEN)
        return self._decide_and_run(call, table)

    def _decide_and_run(self, call: _Call, table: Table) -> Any:
        while True:
            learned = table.learned
            decision = decide(self.maker, call.impl, table, call.args, call.kwargs, NOTHING_LEARNED)
            try:
                return self._carry_out(call, table, decision)
            except Relearn as again:
                table.learn(again.more, again.why)
            if table.learned == learned:
                raise AssertionError(f"{self.callee.name}: nothing was learned of how its arguments are read")

    def _carry_out(self, call: _Call, table: Table, decision: Decision) -> Any:
        """Do what was decided.

        Raises:
            Relearn: the arguments are to be read otherwise; nothing was done.
        """
        outcome, read = decision.outcome, decision.read
        if read is None:
            assert isinstance(outcome, Aside), "only what steps aside does so whatever its arguments are"
            return self._step_aside(call, outcome.reason)
        if decision.known is not None:
            table.add_guard(read.key, decision.known, read.arguments, self.callee.is_function)
            return self._finish_without_code(call, decision.known.outcome)
        if read.newly_dynamic:
            table.learn(Learned(dynamic=read.newly_dynamic), read.why_new)
        made: Specialization | Aside | Eager | Failed
        if isinstance(outcome, Make):
            made = self.maker.make(call.impl, table, read.key, read.arguments, call.event)
        elif isinstance(outcome, Load):
            loaded = outcome.specialization
            made = self.maker.load(call.impl, table, read.key, read.arguments, loaded, call.event)
        else:
            made = outcome.specialization if isinstance(outcome, Run) else outcome
        if isinstance(made, Specialization):
            return self._run_code(call, table, read, made)
        if isinstance(made, Failed):
            return self._run_failed(call, table, read, made)
        if isinstance(made, Eager):
            return self._run_without_code(call, table, read, made)
        return self._step_aside(call, made.reason)

    def _run_code(self, call: _Call, table: Table, read: Read, found: Specialization) -> Any:
        reason = found.why_aside(read.arguments)
        if reason is not None:
            return self._step_aside(call, reason)
        entry = table.add_guard(read.key, found, read.arguments, self.callee.is_function)
        try:
            result = self._guarded_call(entry, call.impl)(call.args, call.kwargs)
        except Exception as error:
            return self._run_after_error(call, _writes(entry), error)
        if result is MISS:  # a priority has changed since it was found
            return self._run_eagerly(call, INSIDE_CHANGED)
        return self._finish(call, found, result)

    def _guarded_call(self, entry: Guarded, impl: Impl) -> GuardedCall:
        """The call of a specialization; while a profiler is on, its code runs in a range that says what runs."""
        if not isinstance(entry.known, Specialization) or not profiler._is_profiler_enabled:
            return entry.call
        shapes = entry.known.code.symbolic_shapes
        return in_profiler_range(entry.call, f"{self._range_name} {COMPILED} {impl.provider} {shapes}")

    @property
    def _range_name(self) -> str:
        return f"dispatch_compile::{self.callee.name.replace('::', '.')}"

    def _finish(self, call: _Call, known: Specialization | NoCode, result: Any) -> Any:
        """The end of a call whose guarded call has returned ``result``."""
        if isinstance(known, NoCode):
            return self._finish_without_code(call, known.outcome)
        self.counters.hits += 1
        if call.event is not None:
            new = call.event.compile_start is not None
            code = known.code
            call.event.compiled(call.impl.provider, code.symbolic_shapes, new, code.composition)
        return result

    def _finish_without_code(self, call: _Call, outcome: Aside | Eager | Failed) -> Any:
        if isinstance(outcome, Aside):
            return self._step_aside(call, outcome.reason)
        if not outcome.raises:
            return self._run_eagerly(call, outcome.reason)
        self._note_fallback(call, outcome.reason)
        raise CompileError(outcome.reason)

    def _run_without_code(self, call: _Call, table: Table, read: Read, outcome: Eager) -> Any:
        """A call for which there is no code now."""
        if outcome.reason != FROZEN:
            result = self._run_eagerly(call, outcome.reason)
            if self.maker.is_full(table):
                self._warn_of_full(call, table, read)
            return result
        what_to_warm_up = self._what_to_warm_up(call, table, read)
        if outcome.raises:
            self._note_fallback(call, FROZEN)
            raise CompileError(what_to_warm_up)
        table.note_missing(read.arguments, self.callee.is_function)
        _warn_once(table, FROZEN, f"{what_to_warm_up}. It runs eagerly")
        return self._run_eagerly(call, FROZEN)

    def _what_to_warm_up(self, call: _Call, table: Table, read: Read) -> str:
        difference = table.difference(components_of(read.arguments))
        given = [text_of(summary_of(value)) for value in call.args[self.callee.parameters.hidden :]]
        given += [f"{name}={text_of(summary_of(value))}" for name, value in call.kwargs.items()]
        return (
            f"there is no code of the {call.impl.provider!r} implementation of {self.callee.name} for this call"
            f"{f' ({difference})' if difference else ''}, and the mode is to make none. Add to the warm-up: "
            f"mode.warmup({self.callee.name!r}, {', '.join(given)})"
        )

    def _warn_of_full(self, call: _Call, table: Table, read: Read) -> None:
        _warn_once(
            table,
            "full",
            f"{table.size} specializations of the {call.impl.provider!r} implementation of {self.callee.name} are "
            f"made, and new ones run eagerly from now on. The latest call differs from the nearest of them: "
            f"{table.difference(components_of(read.arguments))}",
        )

    def _run_failed(self, call: _Call, table: Table, read: Read, failure: Failed) -> Any:
        """A call whose code failed just now, or a moment ago."""
        known = NoCode.of(read.arguments, failure.told())  # before the op runs, which may change its arguments
        result = call.redispatch()  # an error of the implementation itself comes out here, as in eager
        if failure.for_now:
            if table.postponed is None or table.postponed.is_over:
                table.postponed = Postponed.after(failure.told(), table.postponed)
        elif table.find(read.key, read.arguments) is None:  # another thread may have failed at the same time
            table.add(read.key, known)
        self._note_fallback(call, failure.reason)
        if failure.raises:
            raise CompileError(failure.reason) from failure.cause
        _warn_once(table, failure.reason, f"{failure.reason}; it runs eagerly")
        return result

    def _step_aside(self, call: _Call, reason: str) -> Any:
        self.counters.stepped_aside(reason)
        call.note(ASIDE, reason)
        return self._run_op(call, ASIDE)

    def _run_eagerly(self, call: _Call, reason: str) -> Any:
        self._note_fallback(call, reason)
        return self._run_op(call, EAGER)

    def _run_op(self, call: _Call, action: str) -> Any:
        """Run the call as if there were no mode."""
        if not profiler._is_profiler_enabled:
            return call.redispatch()
        with record_function(f"{self._range_name} {action} {call.eager_provider}"):
            return call.redispatch()

    def _note_fallback(self, call: _Call, reason: str) -> None:
        self.counters.fell_back(reason)
        call.note(EAGER, reason)

    def run_after_error(
        self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, failed: GuardedCall
    ) -> Any:
        """Run a call for which ``failed``, in a short cut, raised."""
        last, table = self.last
        written = table is not None and any(entry.call is failed and _writes(entry) for entry in table.guarded)
        return self._run_after_error(_Call(self, keyset, args, kwargs, None, last(), ""), written, error)

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


@dataclass
class _Call:
    """A caught call, on the paths where an object more does not matter."""

    route: Route
    keyset: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    event: TraceEvent | None
    impl: Impl
    eager_provider: str

    def redispatch(self) -> Any:
        with nullcontext() if self.event is None else bodies_watched():
            return self.route.callee.run(self.keyset, self.args, self.kwargs)

    def note(self, action: str, reason: str) -> None:
        if self.event is not None:
            self.event.not_compiled(action, reason)


def _writes(entry: Guarded) -> bool:
    """Whether the code writes to arguments."""
    return isinstance(entry.known, Specialization) and bool(entry.known.code.written)


def _warn_once(table: Table, reason: str, text: str) -> None:
    if reason not in table.warned_of:
        table.warned_of.add(reason)
        warn(text)
