"""Where specializations come from: each is loaded, or made once, by the call that needs it or in the background, or
not at all."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from .._basics.fork import compiler_was_interrupted, compiling, freed_in_children
from .._compile.compilation import specialize
from .._compile.config import BACKGROUND, NO_EVICTION, CompileConfig
from .._compile.failure import CannotCompile, CannotCompileNow, cannot_compile
from .._compile.reading import CannotTell
from .._compile.specialization import Specialization
from .._dispatch.active import suspended
from .._ir.protocol import Impl
from .._saved.artifacts import Artifact, Artifacts
from .._saved.origin import Origin, origin_of
from .._specialize.arguments import Arguments, of_zeros
from .._specialize.callee import Callee
from .._specialize.key import key_of
from .._specialize.stand_ins import Relearn
from .._torch.inductor import NoCompiler
from .._trace.event import TraceEvent
from . import background
from .background import ThreadState
from .counters import OpCounters
from .orders import Orders
from .table import Table

_log = logging.getLogger("dispatch_compile")

# A specialization, or the error for which it cannot be made, or the reason why it is not made now.
Made = Specialization | CannotCompile | str

FROZEN = "frozen"
IN_BACKGROUND = "is being compiled in the background"

# Not the compiler's lock: to have that one, Dynamo would have to be imported.
_loading = freed_in_children(threading.RLock())


@dataclass(frozen=True)
class Maker:
    """Makes the specializations of one op or function under one configuration."""

    callee: Callee
    config: CompileConfig
    counters: OpCounters
    artifacts: Artifacts
    orders: Orders

    def make(self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None) -> Made:
        """What a call gets whose specialization is not in the table. It is there afterwards, if it could be made."""
        if self.is_full(table):
            return self._full
        loaded = self.load(impl, table, key, arguments, event)
        if loaded is not None:
            return loaded
        if compiler_was_interrupted():
            return "the process was forked while another thread compiled"
        failed = _failed_lately(table)
        if failed is not None:
            return failed
        if self.config.on_new == BACKGROUND:
            failure = background.ask(table, key, lambda: _Job.of(self, impl, table, key, arguments))
            return failure or IN_BACKGROUND
        return self.make_now(impl, table, key, arguments, event)

    def make_now(self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None) -> Made:
        """The same on this thread, when no other is compiling; perhaps another has made it by then."""
        try:
            with compiling():
                made = table.find(key, arguments) or _failed_lately(table)
                if made is not None:
                    return made
                if self.is_full(table):
                    return self._full
                if self.orders.frozen:  # while this waited for another compilation
                    return FROZEN
                self._make_room(table)
                return self._specialize(impl, table, key, arguments, event)
        except CannotCompile as error:
            return error
        except NoCompiler as error:
            return without_compiler(self.callee.name, error)

    def is_full(self, table: Table) -> bool:
        """Whether a table has all the specializations that it may have."""
        return self.config.eviction == NO_EVICTION and table.size >= self.config.max_specializations

    @property
    def _full(self) -> str:
        return f"there may be no more than {self.config.max_specializations} specializations (max_specializations)"

    def _make_room(self, table: Table) -> None:
        if self.config.eviction != NO_EVICTION:
            table.make_room(self.config.max_specializations)

    def saved(self, impl: Impl, key: Hashable, arguments: Arguments) -> Specialization | None:
        """The specialization that saved code gives; None if there is none for this call."""
        if self.artifacts.empty:
            return None
        origin = self._origin(impl)
        if isinstance(origin, str):
            return None
        code = self.artifacts.find(origin, key, arguments)
        return None if code is None else Specialization.of(code, arguments, origin)

    def load(
        self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None
    ) -> Specialization | None:
        """The same, which is in the table afterwards."""
        with _loading:
            found = table.find(key, arguments)  # another thread may have loaded it
            if found is not None:
                return found
            with suspended():
                loaded = self.saved(impl, key, arguments)
            if loaded is None or loaded.code is None:
                return None
            self._make_room(table)
            table.add(key, loaded)
        self.counters.loads += 1
        _log.info("loaded %s (%s) for %s", self.callee.name, impl.provider, loaded.code.symbolic_shapes)
        if event is not None:
            event.loaded = True
        return loaded

    def _origin(self, impl: Impl) -> Origin | str:
        try:
            return origin_of(self.callee.name, impl, self.config)
        except CannotTell as reason:
            return str(reason)

    def _keep(self, key: Hashable, made: Specialization) -> None:
        """Put new code where other processes find it, if there is such a place."""
        if made.code is None or not self.artifacts.keeps:
            return
        try:
            self.artifacts.keep(Artifact.of(made.origin, key, made.code))
        except CannotTell as reason:
            _log.info("code of %s is not saved: %s", self.callee.name, reason)

    def _specialize(
        self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None
    ) -> Specialization:
        start = time.perf_counter_ns()
        try:
            with suspended():
                origin = self._origin(impl)  # before the implementation runs, which may change what it reads
                made = specialize(self.callee.name, impl, self.callee.parameters, arguments, self.config, origin)
        finally:
            nanoseconds = time.perf_counter_ns() - start
            if event is not None:
                event.compile_start, event.compile_nanoseconds = start, nanoseconds
        if made.code is not None and made.code.composition.asked and self._origin(impl) != origin:
            made = replace(made, origin="what the ops inside go by changed while it was compiled")
        difference = table.why_new(made)
        table.add(key, made)
        table.postponed = None
        self._keep(key, made)
        if made.code is not None:
            self.counters.compiles += 1
            shapes = made.code.symbolic_shapes
            suffix = f": {difference}" if difference else ""
            _log.info(
                "compiled %s (%s) for %s in %.1f s%s",
                self.callee.name,
                impl.provider,
                shapes,
                nanoseconds * 1e-9,
                suffix,
            )
            if event is not None:
                event.difference = difference
        return made


def without_compiler(name: str, error: NoCompiler) -> CannotCompile:
    """The error for an op that cannot be compiled in this process, as nothing can."""
    failure = CannotCompile(f"{name} cannot be compiled: {error}")
    failure.__cause__ = error
    return failure


def _failed_lately(table: Table) -> CannotCompileNow | None:
    """The failure for which nothing is tried again yet."""
    if table.postponed is None or table.postponed.is_over:
        return None
    return CannotCompileNow(table.postponed.failure)


@dataclass(frozen=True)
class _Job:
    """Making a specialization for a call that is over by then: no tensor of the call's is kept, nor is the
    implementation."""

    maker: Maker
    impl: weakref.ref[Impl]
    table: Table
    key: Hashable
    layouts: Arguments  # tensors on the meta device
    devices: list[torch.device]  # where they are to be
    state: ThreadState

    @staticmethod
    def of(maker: Maker, impl: Impl, table: Table, key: Hashable, arguments: Arguments) -> _Job:
        devices = [leaf.value.device for leaf in arguments.tensors]
        layouts = of_zeros(arguments, [torch.device("meta")] * len(devices))
        state = ThreadState.now(cuda=any(device.type == "cuda" for device in devices))
        return _Job(maker, weakref.ref(impl), table, key, layouts, devices, state)

    def __call__(self) -> CannotCompile | str | None:
        """Why there is no specialization, for the next call that needs it; None if there is one or nobody needs it."""
        impl = self.impl()
        if impl is None or self.table.dropped or self.maker.orders.frozen:
            return None
        try:
            made = self.state.run(lambda: self._make(impl))
        except Relearn as again:
            self.table.learn(again.more)  # the next call asks again
            return None
        except BaseException as error:  # whatever it is, it must not end the thread that other work waits for
            made = cannot_compile(self.maker.callee.name, impl, self.maker.config, error)
            made.__cause__ = error
        if isinstance(made, CannotCompile):
            # Its traceback refers to the implementation, which the table must not keep alive.
            _log.info("in the background: %s", made, exc_info=made)
            return type(made)(str(made))
        return made if isinstance(made, str) else None

    def _make(self, impl: Impl) -> Made:
        arguments = of_zeros(self.layouts, self.devices)
        if key_of(arguments) != self.key:
            return "not compiled in the background, where torch's settings are others than in the call"
        return self.maker.make_now(impl, self.table, self.key, arguments, None)
