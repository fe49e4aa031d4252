"""Where compiled code is kept: weakly by implementation, and under that by configuration and specialization.

Nothing reachable from a value refers to its key, so an implementation that nobody else holds is freed, and its
code with it.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import _background, _registry
from ._artifacts import Artifact, Artifacts, folder_from_environment, read, write
from ._compilation import Specialization
from ._config import CompileConfig
from ._counters import KINDS, CountersByOp, OpCounters, count_for
from ._difference import difference
from ._fork import freed_in_children
from ._origin import CannotSave
from ._postponed import Postponed
from ._specialize.arguments import NOTHING_LEARNED, Arguments, Learned
from ._specialize.change import Pattern
from ._specialize.guards import MISS, GuardedCall

_log = logging.getLogger("dispatch_compile")

# How many exact guards are kept in front of a table's keys. Beyond it the oldest goes, and comes back when needed.
_GUARDED_LIMIT = 64

# For all caches, so that a forked child has one lock to free. Re-entrant: garbage collection may strike inside.
_lock = freed_in_children(threading.RLock())


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made.

    Attributes:
        compiles: specializations compiled.
        hits: calls that ran compiled code, a specialization's first call included.
        fallbacks: calls that ran eagerly because there is no compiled code for them.
        asides: calls that passed because of their arguments (subclasses, ...), the thread's state (autograd, ...) or
            the provider chosen for them.
        loads: specializations whose code was saved before, and was loaded.
    """

    compiles: int
    hits: int
    fallbacks: int
    asides: int
    loads: int = 0


@dataclass(frozen=True, eq=False)
class Guarded:
    """An exact guard and the specialization that it leads to."""

    call: GuardedCall
    specialization: Specialization


class Table:
    """The specializations of one implementation under one configuration.

    Attributes:
        calls: what the hot path tries in turn: guarded calls of compiled code, the last one made first.
        guarded: the same with their specializations, and the guarded failures. Both are replaced whole, so that
            readers need no lock.
        missing: guards that tell calls for which there was no code in a mode that makes none. Forgotten when there is
            new code.
        warned_of: the reasons that were warned of.
        dropped: whether the cache has let go of it. It stays empty then; what is under way for it is not kept.
        postponed: the failure for which nothing is compiled for a while.
        learned: how the arguments of the next calls are to be read.
    """

    def __init__(self) -> None:
        self.calls: tuple[GuardedCall, ...] = ()
        self.guarded: tuple[Guarded, ...] = ()
        self.missing: tuple[GuardedCall, ...] = ()
        self.warned_of: set[str] = set()
        self.dropped = False
        self.postponed: Postponed | None = None
        self.learned = NOTHING_LEARNED
        self._why_dynamic: str | None = None
        self._by_key: dict[Hashable, list[Specialization]] = {}  # the latest used last, as far as is known

    @property
    def size(self) -> int:
        """How many specializations there are."""
        return sum(len(several) for several in list(self._by_key.values()))

    def specializations(self) -> list[tuple[Hashable, Specialization]]:
        """All of them, each with its key."""
        with _lock:
            return [(key, one) for key, several in self._by_key.items() for one in several]

    def patterns(self) -> list[Pattern]:
        """What there are specializations for."""
        return [one.pattern for _, one in self.specializations() if one.code is not None]

    def learn(self, more: Learned, why: str | None = None) -> None:
        """Read the arguments of the next calls otherwise; ``why``, for people, if something has become dynamic."""
        with _lock:
            self.learned |= more
            self._why_dynamic = None if more.fixed else why or self._why_dynamic

    def find(self, key: Hashable, arguments: Arguments) -> Specialization | None:
        """The specialization for a key whose guards on the dynamic sizes hold for these arguments."""
        with _lock:
            several = tuple(self._by_key.get(key, ()))
        return next((one for one in several if one.admits(arguments)), None)

    def add(self, key: Hashable, specialization: Specialization) -> None:
        """Keep a specialization under its key."""
        with _lock:
            if not self.dropped:
                self._by_key[key] = [*self._by_key.pop(key, ()), specialization]
            self.missing = ()

    def difference(self, made: Specialization) -> str | None:
        """In what a specialization differs from the nearest that there is; None if there is none."""
        others = [known for several in list(self._by_key.values()) for known in several]
        return difference(made.components, ((other.components, other.why_not()) for other in others))

    def why_new(self, made: Specialization) -> str | None:
        """Why a specialization is new, where there are others: what has become dynamic, or the difference."""
        why, self._why_dynamic = self._why_dynamic, None
        return why or self.difference(made)

    def add_guard(
        self, key: Hashable, specialization: Specialization, arguments: Arguments, of_function: bool
    ) -> Guarded:
        """Put an exact guard for such arguments in front of the others: the last call is the likeliest next."""
        entry = Guarded(specialization.guarded_call(arguments, of_function=of_function), specialization)
        with _lock:
            several = self._by_key.pop(key, None)
            if several is not None:
                self._by_key[key] = several
                if any(one is specialization for one in several):  # it may have been dropped meanwhile
                    self._guard_with((entry, *self.guarded[: _GUARDED_LIMIT - 1]))
        return entry

    def misses(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether it is known that there is no code for these arguments; if not, there may be none."""
        return any(guard(args, kwargs) is not MISS for guard in self.missing)

    def note_missing(self, missing: Specialization, arguments: Arguments, of_function: bool) -> None:
        """Put a guard for such arguments, for which there is no code, in front of :attr:`missing`."""
        guard = missing.guarded_call(arguments, of_function=of_function)
        with _lock:
            self.missing = (guard, *self.missing[: _GUARDED_LIMIT - 1])

    def make_room(self, limit: int) -> None:
        """Drop what was least recently used until one specialization more is within the limit.

        A call through a guard leaves no mark. So when it gets tight, the older half lose their guards: those that are
        called again get new ones, and are the latest used from then on.
        """
        with _lock:
            while self.size >= limit:
                del self._by_key[next(iter(self._by_key))]
            if self.size + 1 == limit:
                newer = list(self._by_key.values())[(len(self._by_key) + 1) // 2 :]
                kept = {id(specialization) for several in newer for specialization in several}
                self._guard_with(tuple(entry for entry in self.guarded if id(entry.specialization) in kept))

    def _guard_with(self, guarded: tuple[Guarded, ...]) -> None:
        self.guarded = guarded
        self.calls = tuple(guard.call for guard in guarded if guard.specialization.code is not None)

    def drop(self) -> None:
        """Let go of everything, for good."""
        with _lock:
            self.dropped = True
            self._by_key = {}
            self._guard_with(())


class _Entry:
    """What a cache holds for one implementation: the op that it belongs to, and its tables."""

    def __init__(self, op: Any) -> None:
        self.op = weakref.ref(op)
        self.tables: dict[CompileConfig, Table] = {}

    def drop(self) -> None:
        """Let go of the code. Modes remember tables, so these are emptied, not only forgotten."""
        for table in self.tables.values():
            table.drop()


class NativeCache:
    """Compiled code of native implementations, shared by the modes that are given the same cache.

    ``len(cache)`` is the number of implementations alive in it. Code compiled under one configuration is never
    used under another. Code is freed with its implementation, which the cache does not keep alive, and at the next
    full garbage collection after its op has left its registry.

    Code that another process compiled is loaded instead of being compiled again: from the file of :meth:`load`, and
    from the folder that the environment variable ``DISPATCH_COMPILE_CACHE_DIR`` names, where code that is compiled is
    kept as well. It must have been made of the same implementation with the same settings, on such a machine.
    """

    def __init__(self) -> None:
        self._counters: CountersByOp = {}
        count_for(self, self._counters)
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()
        self.artifacts = Artifacts(folder=folder_from_environment())
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def table(self, op: Any, impl: Any, config: CompileConfig) -> Table:
        """The specializations of an op's implementation under a configuration, made on first use."""
        with _lock:
            entry = self._entries.get(impl)
            if entry is None:
                entry = self._entries[impl] = _Entry(op)
            return entry.tables.setdefault(config, Table())

    def existing_table(self, impl: Any, config: CompileConfig) -> Table | None:
        """The specializations of an implementation under a configuration, if any were asked for; nothing is added."""
        with _lock:
            entry = self._entries.get(impl)
            return None if entry is None else entry.tables.get(config)

    def clear(self) -> None:
        """Drop all compiled code; the next calls compile again, or load what was saved. The counts go on."""
        self._drop(lambda entry: True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of the compiled code, with what was loaded and not used yet; :meth:`load` reads it.

        Code is left out, and a warning logged, if another process could not tell whether it may use it, or not run it.

        Raises:
            OSError: the file cannot be written; what was there is still there.
        """
        with _lock:
            entries = list(self._entries.items())
        artifacts = {artifact.identity: artifact for artifact in self.artifacts}
        for impl, entry in entries:
            for artifact in _artifacts_of(impl, entry):
                artifacts[artifact.identity] = artifact
        write(path, artifacts.values())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: bool = False) -> NativeCache:
        """A cache that has, instead of compiling it, the code in a file that :meth:`save` wrote.

        What is in the file runs with all rights of this process.

        Args:
            path: of the file.
            trust: load it even if other users could have written the file.

        Raises:
            OSError: the file cannot be read.
            ArtifactError: it holds no saved code, or is damaged, or other users could have written it.
        """
        cache = cls()
        cache.artifacts = Artifacts(read(path, trust=trust), folder_from_environment())
        return cache

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the code that calls so far need is compiled, where it is compiled in the background.

        There is one background for all caches. Do not call it inside of what is compiled.

        Args:
            timeout: in seconds; None waits as long as it takes.

        Returns:
            False if it took longer.
        """
        return _background.wait(timeout)

    def drop_unregistered(self, known: Container[Any]) -> None:
        """Drop the code of ops that are not among the ``known`` ones."""
        self._drop(lambda entry: entry.op() not in known)

    def _drop(self, condition: Callable[[_Entry], bool]) -> None:
        with _lock:
            for impl, entry in list(self._entries.items()):
                if condition(entry):
                    entry.drop()
                    del self._entries[impl]

    def counters_of(self, name: str) -> OpCounters:
        """The counts of one op or function in this cache, by its full name, made on first use."""
        with _lock:
            return self._counters.setdefault(name, OpCounters())

    def stats(self) -> CacheStats:
        """The counts of this cache, over all ops."""
        with _lock:
            counters = list(self._counters.values())
        return CacheStats(**{kind: sum(getattr(of_op, kind) for of_op in counters) for kind in KINDS})

    def __repr__(self) -> str:
        return f"NativeCache({len(self)} implementations, {self.stats()})"


def _artifacts_of(impl: Any, entry: _Entry) -> Iterator[Artifact]:
    for table in list(entry.tables.values()):
        for key, specialization in table.specializations():
            code = specialization.code
            if code is None:
                continue
            try:
                yield Artifact.of(specialization.origin, key, code)
            except CannotSave as reason:
                what = f"the {impl.provider!r} implementation of {entry.op()!r} for {code.symbolic_shapes}"
                _log.warning("code of %s is not saved: %s", what, reason)


_caches: weakref.WeakSet[NativeCache] = weakref.WeakSet()


def _drop_unregistered(phase: str, info: Mapping[str, int]) -> None:
    """Before a full garbage collection, let go of the code of ops that have left their registry.

    Nothing else tells: a registry may be a plain dict (vLLM's is), and torch keeps an op's Python kernels, with all
    that they refer to, for ever, so an implementation in them is never freed.
    """
    if phase == "start" and info["generation"] == 2:
        known = _registry.known_ops()
        for cache in list(_caches):
            cache.drop_unregistered(known)


gc.callbacks.append(_drop_unregistered)
