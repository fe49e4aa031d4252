"""Work on a thread of its own, so that no call waits for it."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from .._basics.fork import freed_in_children

T = TypeVar("T")

# How long the interpreter, when it exits, waits for the work at hand to be broken off. Ending a thread in the middle
# of torch's C++ code ends the process with "terminate called without an active exception".
SECONDS_TO_STOP = 10.0

_PENDING = object()


@dataclass(frozen=True)
class ThreadState:
    """What of a thread's own state compiled code depends on, for work that another thread does in its place.

    Attributes:
        context: context variables; Inductor keeps its settings in some.
        cuda_device: the current device; None for work that has nothing to do with CUDA.
    """

    context: Context
    inference_mode: bool
    grad_enabled: bool
    num_threads: int
    cuda_device: int | None

    @staticmethod
    def now(cuda: bool) -> ThreadState:
        return ThreadState(
            copy_context(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.cuda.current_device() if cuda else None,
        )

    def run(self, work: Callable[[], T]) -> T:
        """Do the work in this state, and on a CUDA stream that no caller uses."""
        return self.context.run(self._run, work)

    def _run(self, work: Callable[[], T]) -> T:
        if torch.get_num_threads() != self.num_threads:  # to set it sets it for threads to come, too
            torch.set_num_threads(self.num_threads)
        with torch.inference_mode(self.inference_mode), torch.set_grad_enabled(self.grad_enabled), self._on_stream():
            return work()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.cuda_device is None else torch.cuda.stream(_stream(self.cuda_device))


@functools.cache
def _stream(cuda_device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(cuda_device)


class _Worker(threading.Thread):
    """
    Attributes:
        tasks: what is to be done, one after another.
        outcomes: what became of it by owner and key: pending, or a result that nobody has taken yet.
    """

    def __init__(self) -> None:
        super().__init__(name="dispatch_compile", daemon=True)
        self.tasks: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.outcomes: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

    def run(self) -> None:
        while True:
            self.tasks.get()()

    def do(self, owner: object, key: Hashable, work: Callable[[], object]) -> None:
        result = work()
        with _lock:
            outcomes = self.outcomes[owner]
            if result is None:
                del outcomes[key]
            else:
                outcomes[key] = result


_worker: _Worker | None = None
_lock = freed_in_children(threading.RLock())  # garbage collection may strike inside


def ask(owner: object, key: Hashable, prepare: Callable[[], Callable[[], object]]) -> Any:
    """Have work done, once at a time for a key of an owner.

    Args:
        owner: what the result is for; results nobody takes go with it.
        key: what the work is for.
        prepare: makes the work, which must not raise; called now, if there is any to be done.

    Returns:
        What the work asked for last has given, once; else None.
    """
    global _worker
    with _lock:
        if _worker is None:
            _worker = _Worker()
            _worker.start()
        outcomes = _worker.outcomes.setdefault(owner, {})
        if key not in outcomes:
            work = prepare()
            outcomes[key] = _PENDING
            _worker.tasks.put(functools.partial(_worker.do, owner, key, work))
        return None if outcomes[key] is _PENDING else outcomes.pop(key)


def failure(owner: object, key: Hashable) -> Any:
    """What :func:`ask` will give, if it is known already; it is left there."""
    worker = _worker
    if worker is None:
        return None
    with _lock:
        outcome = worker.outcomes.get(owner, {}).get(key)
    return None if outcome is _PENDING else outcome


def wait(timeout: float | None = None) -> bool:
    """Wait until everything asked for so far is done; False if that takes longer than ``timeout`` seconds."""
    worker = _worker
    if worker is None:
        return True
    done = threading.Event()
    worker.tasks.put(done.set)
    return done.wait(timeout)


def _stop() -> None:
    """Forget what is to be done, and break off what is being done."""
    worker = _worker
    if worker is None or worker.ident is None:
        return
    with suppress(Empty):
        while True:
            worker.tasks.get_nowait()
    worker.tasks.put(sys.exit)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while worker.is_alive() and time.monotonic() < deadline:
        # Once may not do: an exception that strikes in a callback of garbage collection, say, gets lost.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
        worker.join(0.1)


def _after_fork_in_child() -> None:
    """The thread is the parent's, and so is what it was asked for."""
    global _worker
    _worker = None


atexit.register(_stop)
os.register_at_fork(after_in_child=_after_fork_in_child)
