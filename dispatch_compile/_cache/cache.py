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
from .table import Table, lock

_log = logging.getLogger("dispatch_compile")


@dataclass(frozen=True)
class CacheStats:
    """What became of the calls that used a cache; :meth:`NativeCache.stats` returns one.

    Use it to check that a workload runs compiled: after the warm-up only ``hits`` should grow.

    >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
    >>> with mode:
    ...     for tokens in (2, 3, 4):
    ...         y = dc.ops.silu_and_mul(torch.ones(tokens, 256))
    >>> mode.cache.stats()
    CacheStats(compiles=1, hits=3, fallbacks=0, asides=0, loads=0)

    Attributes:
        compiles: specializations compiled.
        hits: calls that ran compiled, including the first call of each specialization.
        fallbacks: calls that ran eagerly, since there was no compiled code for them: it failed to compile, is still
            being compiled, the mode is frozen, ...
        asides: calls that stepped aside: for their arguments (subclasses, ...), the thread's state (autograd, ...), the
            provider chosen for them, or a side effect of the implementation (random numbers, ...).
        loads: specializations whose code was loaded instead of compiled.
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
    """Compiled code, shared by the modes that are given the same cache, and saved for the next process.

    A mode makes its own cache unless you pass one. Pass one to use several modes with one set of code, or to start
    with the code of an earlier process (:meth:`load`).

    >>> cache, config = dc.NativeCache(), dc.CompileConfig(backend="eager")
    >>> for _ in range(2):
    ...     with dc.DispatchCompileMode(config=config, cache=cache):
    ...         y = dc.ops.silu_and_mul(torch.ones(8, 256))
    >>> cache.stats()  # the second mode compiled nothing
    CacheStats(compiles=1, hits=2, fallbacks=0, asides=0, loads=0)
    >>> len(cache)  # implementations that have code in it
    1

    Code compiled under one configuration is never used under another. The cache does not keep an implementation alive:
    its code is freed with it. The code of an op that left its registry is freed at the next full garbage collection.

    The environment variable ``DISPATCH_COMPILE_CACHE_DIR`` names a folder for every cache of the process. Code that is
    found there is loaded instead of compiled, and code that is compiled is saved there. Code is only loaded if it was
    made of the same implementation, with the same settings, on the same kind of machine.
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
        with lock:
            entry = self._entries.get(impl)
            if entry is None:
                entry = self._entries[impl] = _Entry(op)
            return entry.tables.setdefault(config, Table())

    def existing_table(self, impl: Impl, config: CompileConfig) -> Table | None:
        """The specializations of an implementation under a configuration, if any were asked for; nothing is added."""
        with lock:
            entry = self._entries.get(impl)
            return None if entry is None else entry.tables.get(config)

    def clear(self) -> None:
        """Drop all compiled code, to free its memory; the next calls compile again, or load what was saved.

        The counts go on.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        >>> events = mode.warmup(dc.ops.silu_and_mul, torch.ones(8, 256))
        >>> mode.cache.clear()
        >>> len(mode.cache), mode.cache.stats().compiles
        (0, 1)
        """
        self._drop(lambda entry: True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compiled code to a file, from which the next process starts without compiling (:meth:`load`).

        Code that this cache loaded and has not used yet is written as well.

        >>> mode = dc.DispatchCompileMode()
        >>> with mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> mode.cache.save("natives.saved")
        >>> mode = dc.DispatchCompileMode(cache=dc.NativeCache.load("natives.saved"), trace=True)  # in the next process
        >>> with mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> print(mode.trace)
        dispatch_compile::silu_and_mul(t: f32[8, 256])  ->  t: f32[8, 128]  # compiled native, loaded: [s0, 256]

        Some code is left out, and a warning is logged: code of another backend than Inductor, for instance, and code of
        an implementation that reads something that two processes cannot compare.

        Args:
            path: the file; its folder must exist. An existing file is replaced in one step.

        Raises:
            OSError: the file cannot be written; an existing file is still there, unchanged.
        """
        with lock:
            entries = list(self._entries.items())
        artifacts = {artifact.identity: artifact for artifact in self.artifacts}
        for impl, entry in entries:
            for artifact in _artifacts_of(impl, entry):
                artifacts[artifact.identity] = artifact
        write(path, artifacts.values())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: bool = False) -> NativeCache:
        """Make a cache that starts with the code that :meth:`save` wrote to a file.

        The code runs with all rights of this process. So the file is refused if other users could have written it.

        >>> dc.NativeCache().save("natives.saved")
        >>> mode = dc.DispatchCompileMode(cache=dc.NativeCache.load("natives.saved"))

        Args:
            path: the file.
            trust: True skips the check of who could have written the file.

        Raises:
            OSError: the file cannot be read.
            ArtifactError: the file holds no saved code, is damaged, was written by a version with another format, or
                could have been written by other users.
        """
        cache = cls()
        cache.artifacts = Artifacts(read(path, trust=trust), folder_from_environment())
        return cache

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the code that calls asked for is compiled in the background; for
        ``CompileConfig(on_new="background")``.

        >>> mode = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager", on_new="background"), trace=True)
        >>> with mode:
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        ...     ready = mode.cache.wait()
        ...     y = dc.ops.silu_and_mul(torch.ones(8, 256))
        >>> [event.action for event in mode.trace.events]
        ['eager', 'compiled']

        All caches share one background thread, so this waits for the code of all of them. Do not call it in an
        implementation: it would wait for itself.

        Args:
            timeout: in seconds; None waits as long as it takes.

        Returns:
            True if all is compiled, False if the time ran out.
        """
        return background.wait(timeout)

    def drop_unregistered(self, known: Container[Op]) -> None:
        """Drop the code of ops that are not among the ``known`` ones."""
        self._drop(lambda entry: entry.op() not in known)

    def _drop(self, condition: Callable[[_Entry], bool]) -> None:
        with lock:
            for impl, entry in list(self._entries.items()):
                if condition(entry):
                    entry.drop()
                    del self._entries[impl]

    def counters_of(self, name: str) -> OpCounters:
        """The counts of one op or function in this cache, by its full name, made on first use."""
        with lock:
            return self._counters.setdefault(name, OpCounters())

    def stats(self) -> CacheStats:
        """Count what became of the calls that used this cache, over all ops since it was made: see :class:`CacheStats`.

        >>> dc.NativeCache().stats()
        CacheStats(compiles=0, hits=0, fallbacks=0, asides=0, loads=0)
        """
        with lock:
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
