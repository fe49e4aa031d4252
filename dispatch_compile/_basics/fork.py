"""Locks in a process that forks.

A child has its parent's locks as they were, but of the threads only the one that forked. What another thread held is
never released there, and what it was doing stays half done.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

# Inductor locks files with it. It keeps other threads from doing so as soon as it hears of a fork, and those that
# register first hear of it last, so our waiting must be registered after it.
import filelock  # noqa: F401

from .._torch.inductor import compile_lock, compile_lock_if_imported, forget_inductors_threads

Lock = TypeVar("Lock")

# How long a fork waits for a compilation of ours. A child of a process that was compiling cannot compile: torch's
# compiler keeps what it is doing in globals.
SECONDS_TO_WAIT = 30.0

# In the child of a thread that ran code on several threads, GNU's OpenMP waits for these for ever, and Inductor's code
# for a CPU runs on several at any size. After this OpenMP starts new ones when it needs them.
_end_openmps_threads = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
_HARD = 2  # omp_pause_hard

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_forking = threading.local()  # has `lock`, and `held`: whether the forking thread got it
_compilations = 0
_interrupted = False


def freed_in_children(lock: Lock) -> Lock:
    """The same lock. A forked child finds it free; it must guard nothing that is of use only if it is complete."""
    _locks.add(lock)
    return lock


@contextmanager
def compiling() -> Iterator[None]:
    """Be the one thread that compiles. A thread that compiles already may do it again."""
    global _compilations
    with compile_lock():
        _compilations += 1
        try:
            yield
        finally:
            _compilations -= 1


def compiler_was_interrupted() -> bool:
    """Whether this process was forked while another thread compiled, so that it cannot compile itself."""
    return _interrupted


def _before_fork() -> None:
    if _end_openmps_threads is not None:
        _end_openmps_threads(_HARD)
    lock = _forking.lock = compile_lock_if_imported()
    _forking.held = False
    if lock is not None:
        _forking.held = lock.acquire(blocking=False) or (_compilations > 0 and lock.acquire(timeout=SECONDS_TO_WAIT))


def _after_fork_in_parent() -> None:
    if _forking.held:
        _forking.lock.release()


def _after_fork_in_child() -> None:
    global _interrupted, _compilations
    for lock in _locks:
        lock._at_fork_reinit()
    forget_inductors_threads()
    if _forking.held:
        _forking.lock.release()
    elif _forking.lock is not None:
        _forking.lock._at_fork_reinit()
        _interrupted, _compilations = True, 0


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
