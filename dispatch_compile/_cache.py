"""Where compiled code is kept: weakly by implementation, and under that by configuration and specialization.

Nothing reachable from a value refers to its key, so an implementation that nobody else holds is freed, and its
code with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ._compilation import Specialization
from ._config import CompileConfig
from ._specialization import Arguments

# How many exact guards are kept in front of a table's keys. Beyond it the oldest goes, and comes back when needed.
_GUARDED_LIMIT = 64


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made.

    Attributes:
        compiles: specializations compiled.
        hits: calls that ran compiled code, a specialization's first call included.
        fallbacks: calls that ran natively because their specialization could not be compiled.
        asides: calls that passed because of their arguments or the thread's state (autograd, subclasses, ...).
    """

    compiles: int
    hits: int
    fallbacks: int
    asides: int


class Counters:
    """The mutable counts behind :class:`CacheStats`."""

    def __init__(self) -> None:
        self.compiles = self.hits = self.fallbacks = self.asides = 0


@dataclass(frozen=True, eq=False)
class Guarded:
    """An exact guard and what it leads to: ``call(args, kwargs)`` gives the result, or MISS."""

    call: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
    specialization: Specialization


class Table:
    """The specializations of one implementation under one configuration.

    Readers take ``guarded`` as it is, without a lock; writers hold the compilation lock and replace it whole.
    """

    def __init__(self) -> None:
        self.guarded: tuple[Guarded, ...] = ()
        self._by_key: dict[Hashable, list[Specialization]] = {}

    def find(self, key: Hashable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Specialization | None:
        """The specialization for a key whose guards on the dynamic sizes hold for these arguments."""
        for specialization in self._by_key.get(key, ()):
            if specialization.admits(args, kwargs):
                return specialization
        return None

    def add(self, key: Hashable, specialization: Specialization) -> None:
        """Keep a specialization under its key."""
        self._by_key.setdefault(key, []).append(specialization)

    def add_guard(self, specialization: Specialization, arguments: Arguments) -> Guarded:
        """Put an exact guard for such arguments in front of the others: the last call is the likeliest next."""
        entry = Guarded(specialization.guarded_call(arguments), specialization)
        self.guarded = (entry, *self.guarded[: _GUARDED_LIMIT - 1])
        return entry


class NativeCache:
    """Compiled code of native implementations, shared by the modes that are given the same cache.

    ``len(cache)`` is the number of implementations alive in it. Code compiled under one configuration is never
    used under another. Code is freed when its implementation is: the cache does not keep implementations alive.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self._tables: weakref.WeakKeyDictionary[Any, dict[CompileConfig, Table]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables)

    def table(self, impl: Any, config: CompileConfig) -> Table:
        """The specializations of an implementation under a configuration, made on first use."""
        with self._lock:
            return self._tables.setdefault(impl, {}).setdefault(config, Table())

    def forget(self, impl: Any) -> None:
        """Drop what was compiled of one implementation."""
        with self._lock:
            self._tables.pop(impl, None)

    def clear(self) -> None:
        """Drop all compiled code; the next calls compile again. The counts go on."""
        with self._lock:
            for tables in self._tables.values():
                for table in tables.values():
                    table.__init__()  # type: ignore[misc]  # modes hold tables, so they are emptied in place
            self._tables.clear()

    def stats(self) -> CacheStats:
        """The counts of this cache."""
        return CacheStats(**{field.name: getattr(self.counters, field.name) for field in fields(CacheStats)})

    def __repr__(self) -> str:
        return f"NativeCache({len(self)} implementations, {self.stats()})"
