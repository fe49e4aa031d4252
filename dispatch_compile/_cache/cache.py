"""Where compiled code is kept: weakly by implementation, and under that by configuration and specialization.

Nothing reachable from a value refers to its key, so an implementation that nobody else holds is freed, and its
code with it.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from .._compile.config import CompileConfig
from .._compile.reading import CannotTell
from .._ir import registry
from .._ir.protocol import Impl, Op
from .._saved.artifacts import Artifact, Artifacts, folder_from_environment, read, write
from . import background
from .counters import KINDS, CountersByOp, OpCounters, count_for
from .table import Table, _lock

_log = logging.getLogger("dispatch_compile")


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made.

    Attributes:
        compiles: specializations compiled.
        hits: calls that ran compiled code, a specialization's first call included.
        fallbacks: calls that ran eagerly because there is no compiled code for them.
        asides: calls that stepped aside, because of their arguments (subclasses, ...), the thread's state (autograd,
            ...), the provider chosen for them, or what the implementation does beside computing.
        loads: specializations whose code was saved before, and was loaded.
    """

    compiles: int
    hits: int
    fallbacks: int
    asides: int
    loads: int = 0


class _Entry:
    """What a cache holds for one implementation: the op that it belongs to, and its tables."""

    def __init__(self, op: Op) -> None:
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
        self._entries: weakref.WeakKeyDictionary[Impl, _Entry] = weakref.WeakKeyDictionary()
        self.artifacts = Artifacts(folder=folder_from_environment())
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def table(self, op: Op, impl: Impl, config: CompileConfig) -> Table:
        """The specializations of an op's implementation under a configuration, made on first use."""
        with _lock:
            entry = self._entries.get(impl)
            if entry is None:
                entry = self._entries[impl] = _Entry(op)
            return entry.tables.setdefault(config, Table())

    def existing_table(self, impl: Impl, config: CompileConfig) -> Table | None:
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
        return background.wait(timeout)

    def drop_unregistered(self, known: Container[Op]) -> None:
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


def _artifacts_of(impl: Impl, entry: _Entry) -> Iterator[Artifact]:
    for table in list(entry.tables.values()):
        for key, specialization in table.specializations():
            code = specialization.code
            try:
                yield Artifact.of(specialization.origin, key, code)
            except CannotTell as reason:
                what = f"the {impl.provider!r} implementation of {entry.op()!r} for {code.symbolic_shapes}"
                _log.warning("code of %s is not saved: %s", what, reason)


_caches: weakref.WeakSet[NativeCache] = weakref.WeakSet()


def _drop_unregistered(phase: str, info: Mapping[str, int]) -> None:
    """Before a full garbage collection, let go of the code of ops that have left their registry.

    Nothing else tells: a registry may be a plain dict (vLLM's is), and torch keeps an op's Python kernels, with all
    that they refer to, for ever, so an implementation in them is never freed.
    """
    if phase == "start" and info["generation"] == 2:
        known = registry.known_ops()
        for cache in list(_caches):
            cache.drop_unregistered(known)


gc.callbacks.append(_drop_unregistered)
