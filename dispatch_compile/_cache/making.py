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
from .._compile.compilation import foresee, specialize
from .._compile.config import BACKGROUND, NO_EVICTION, RAISE, CompileConfig
from .._compile.config import NATIVE as RUN_NATIVELY
from .._compile.failure import CannotCompile, cannot_compile
from .._compile.outcome import FROZEN, IN_BACKGROUND, IN_FORK, OTHER_SETTINGS, Aside, Eager, Failed
from .._compile.reading import CannotTell
from .._compile.specialization import NoCode, Specialization
from .._dispatch.active import suspended
from .._ir.protocol import Impl
from .._saved.artifacts import Artifact, Artifacts
from .._saved.origin import Origin, origin_of
from .._specialize.arguments import Arguments, of_zeros
from .._specialize.callee import Callee
from .._specialize.key import key_of
from .._specialize.stand_ins import Relearn, StepAside
from .._torch.inductor import NoCompiler
from .._trace.event import TraceEvent
from . import background
from .background import ThreadState
from .counters import OpCounters
from .orders import Orders
from .table import Table

_log = logging.getLogger("dispatch_compile")

# What becomes of a call for which code is to be made.
Made = Specialization | Aside | Eager | Failed

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

    @property
    def makes_nothing(self) -> bool:
        """Whether calls that need new code do without it."""
        return self.orders.frozen or self.config.on_new in (RUN_NATIVELY, RAISE)

    def make(self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None) -> Made:
        """Make code for a call, now or in the background. It is in the table afterwards, if it could be made.

        Raises:
            Relearn: the arguments are to be read otherwise.
        """
        if self.config.on_new == BACKGROUND:
            made: Made | None = background.ask(table, key, lambda: _Job.of(self, impl, table, key, arguments))
            return made or Eager(IN_BACKGROUND)
        return self.make_now(impl, table, key, arguments, event)

    def make_now(self, impl: Impl, table: Table, key: Hashable, arguments: Arguments, event: TraceEvent | None) -> Made:
        """The same on this thread, when no other is compiling; perhaps another has made it by then."""
        try:
            with compiling():
                known = table.find(key, arguments)
                if known is not None:
                    return known.outcome if isinstance(known, NoCode) else known
                kept_from = self.why_not_now(table)
                if kept_from is not None:
                    return kept_from
                if self.orders.frozen:  # while this waited for another compilation
                    return Eager(FROZEN)
                self._make_room(table)
                return self._specialize(impl, table, key, arguments, event)
        except StepAside as reason:
            aside = Aside(str(reason))
            table.add(key, NoCode.of(arguments, aside))
            return aside
        except CannotCompile as error:
            return Failed.of(error, self.config)
        except NoCompiler as error:
            return without_compiler(self.callee.name, error, self.config)

    def why_not_now(self, table: Table) -> Eager | Failed | None:
        """Why no code is to be made now, whatever the call; None if there is no reason."""
        if self.is_full(table):
            limit = self.config.max_specializations
            return Eager(f"there may be no more than {limit} specializations (max_specializations)")
        if compiler_was_interrupted():
            return Eager(IN_FORK)
        if table.postponed is not None and not table.postponed.is_over:
            return table.postponed.failure
        return None

    def foresee(self, impl: Impl, arguments: Arguments) -> Made:
        """What :meth:`make_now` would come to, without compiling.

        Raises:
            Relearn: the arguments are to be read otherwise.
        """
        try:
            with compiling():
                return foresee(self.callee.name, impl, self.callee.parameters, arguments, self.config)
        except StepAside as reason:
            return Aside(str(reason))
        except CannotCompile as error:
            return Failed.of(error, self.config)
        except NoCompiler as error:
            return without_compiler(self.callee.name, error, self.config)

    def is_full(self, table: Table) -> bool:
        """Whether a table has all the specializations that it may have."""
        return self.config.eviction == NO_EVICTION and table.size >= self.config.max_specializations

    def _make_room(self, table: Table) -> None:
        if self.config.eviction != NO_EVICTION:
            table.make_room(self.config.max_specializations)

    def saved(self, impl: Impl, key: Hashable, arguments: Arguments) -> Specialization | None:
        """The specialization that saved code gives; None if there is none for this call."""
        if self.artifacts.empty:
            return None
        with _loading, suspended():
            origin = self._origin(impl)
            if isinstance(origin, str):
                return None
            code = self.artifacts.find(origin, key, arguments)
        return None if code is None else Specialization.of(code, arguments, origin)

    def load(
        self,
        impl: Impl,
        table: Table,
        key: Hashable,
        arguments: Arguments,
        loaded: Specialization,
        event: TraceEvent | None,
    ) -> Specialization:
        """Put what :meth:`saved` found in the table, unless another thread has done so."""
        with _loading:
            found = table.find(key, arguments)
            if isinstance(found, Specialization):
                return found
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
        if not self.artifacts.keeps:
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
        if made.code.composition.asked and self._origin(impl) != origin:
            made = replace(made, origin="what the ops inside go by changed while it was compiled")
        difference = table.why_new(made)
        table.add(key, made)
        table.postponed = None
        self._keep(key, made)
        self.counters.compiles += 1
        _log.info(
            "compiled %s (%s) for %s in %.1f s%s",
            self.callee.name,
            impl.provider,
            made.code.symbolic_shapes,
            nanoseconds * 1e-9,
            f": {difference}" if difference else "",
        )
        if event is not None:
            event.difference = difference
        return made


def without_compiler(name: str, error: NoCompiler, config: CompileConfig) -> Failed:
    """What becomes of an op that cannot be compiled in this process, as nothing can."""
    return Failed(f"{name} cannot be compiled: {error}", config.on_failure == RAISE, cause=error)


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

    def __call__(self) -> Made | None:
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
            config = self.maker.config
            made = Failed.of(cannot_compile(self.maker.callee.name, impl, config, error), config)
            made = replace(made, cause=error)
        if isinstance(made, Failed):
            _log.info("in the background: %s", made.reason, exc_info=made.cause)
            return made.told()
        return made if isinstance(made, Eager) else None

    def _make(self, impl: Impl) -> Made:
        arguments = of_zeros(self.layouts, self.devices)
        if key_of(arguments) != self.key:
            return Eager(OTHER_SETTINGS)
        return self.maker.make_now(impl, self.table, self.key, arguments, None)
