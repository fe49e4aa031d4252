"""The specializations of one implementation under one configuration, and the guards that lead to them."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from .._basics.fork import freed_in_children
from .._compile.outcome import FROZEN, Eager
from .._compile.specialization import NoCode, Specialization
from .._specialize.arguments import NOTHING_LEARNED, Arguments, Learned
from .._specialize.change import Pattern
from .._specialize.difference import Components, difference
from .._specialize.guards import MISS, GuardedCall
from .retry import Postponed

# How many exact guards are kept in front of a table's keys. Beyond it the oldest goes, and comes back when needed.
_GUARDED_LIMIT = 64

# For all caches, so that a forked child has one lock to free. Re-entrant: garbage collection may strike inside.
lock = freed_in_children(threading.RLock())


Known = Specialization | NoCode


@dataclass(frozen=True, eq=False)
class Guarded:
    """An exact guard and what is known of the calls that it admits."""

    call: GuardedCall
    known: Specialization | NoCode


class Table:
    """The specializations of one implementation under one configuration.

    Attributes:
        calls: what the hot path tries in turn: guarded calls of compiled code, the last one made first.
        guarded: the same with their specializations, and the guards of calls for which there is no code. Both are
            replaced whole, so that readers need no lock.
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
        self._by_key: dict[Hashable, list[Known]] = {}  # the latest used last, as far as is known

    @property
    def size(self) -> int:
        """How many specializations there are."""
        return sum(len(several) for several in list(self._by_key.values()))

    def specializations(self) -> list[tuple[Hashable, Specialization]]:
        """All of them, each with its key."""
        with lock:
            known = [(key, one) for key, several in self._by_key.items() for one in several]
        return [(key, one) for key, one in known if isinstance(one, Specialization)]

    def patterns(self) -> list[Pattern]:
        """What there are specializations for."""
        return [one.pattern for _, one in self.specializations()]

    def learn(self, more: Learned, why: str | None = None) -> None:
        """Read the arguments of the next calls otherwise; ``why``, for people, if something has become dynamic."""
        with lock:
            self.learned |= more
            self._why_dynamic = None if more.fixed else why or self._why_dynamic

    def find(self, key: Hashable, arguments: Arguments) -> Known | None:
        """What is known of calls with this key and such dynamic sizes."""
        with lock:
            several = tuple(self._by_key.get(key, ()))
        return next((one for one in several if one.admits(arguments)), None)

    def add(self, key: Hashable, known: Known) -> None:
        """Keep a specialization, or that there is no code, under its key."""
        with lock:
            if not self.dropped:
                self._by_key[key] = [*self._by_key.pop(key, ()), known]
            self.missing = ()

    def difference(self, components: Components) -> str | None:
        """How a call or specialization differs from the nearest known one; None if none is known."""
        others = [known for several in list(self._by_key.values()) for known in several]
        return difference(components, ((other.components, other.why_not()) for other in others))

    def why_new(self, made: Specialization) -> str | None:
        """Why a specialization is new, where there are others: what has become dynamic, or the difference."""
        why, self._why_dynamic = self._why_dynamic, None
        return why or self.difference(made.components)

    def add_guard(self, key: Hashable, known: Known, arguments: Arguments, of_function: bool) -> Guarded:
        """Put an exact guard for such arguments in front of the others: the last call is the likeliest next."""
        entry = Guarded(known.guarded_call(arguments, of_function=of_function), known)
        with lock:
            several = self._by_key.pop(key, None)
            if several is not None:
                self._by_key[key] = several
                if any(one is known for one in several):  # it may have been dropped meanwhile
                    self._guard_with((entry, *self.guarded[: _GUARDED_LIMIT - 1]))
        return entry

    def misses(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether it is known that there is no code for these arguments; if not, there may be none."""
        return any(guard(args, kwargs) is not MISS for guard in self.missing)

    def note_missing(self, arguments: Arguments, of_function: bool) -> None:
        """Put a guard for such arguments, for which there is no code, in front of :attr:`missing`."""
        guard = NoCode.of(arguments, Eager(FROZEN)).guarded_call(arguments, of_function=of_function)
        with lock:
            self.missing = (guard, *self.missing[: _GUARDED_LIMIT - 1])

    def make_room(self, limit: int) -> None:
        """Drop what was least recently used until one specialization more is within the limit.

        A call through a guard leaves no mark. So when it gets tight, the older half lose their guards: those that are
        called again get new ones, and are the latest used from then on.
        """
        with lock:
            while self.size >= limit:
                del self._by_key[next(iter(self._by_key))]
            if self.size + 1 == limit:
                newer = list(self._by_key.values())[(len(self._by_key) + 1) // 2 :]
                kept = {id(known) for several in newer for known in several}
                self._guard_with(tuple(entry for entry in self.guarded if id(entry.known) in kept))

    def _guard_with(self, guarded: tuple[Guarded, ...]) -> None:
        self.guarded = guarded
        self.calls = tuple(guard.call for guard in guarded if isinstance(guard.known, Specialization))

    def drop(self) -> None:
        """Let go of everything, for good."""
        with lock:
            self.dropped = True
            self._by_key = {}
            self._guard_with(())
