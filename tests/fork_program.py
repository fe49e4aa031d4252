"""Programs for fresh processes, which fork. ``test_fork.py`` runs them, each by its name, and reads what they print."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from locks import locks_of_the_package
from support import GatedBackend
from torch import Tensor
from torch.library import Library

import dispatch_compile as dc
from dispatch_compile._basics import fork as _fork
from dispatch_compile._cache import background as _background

X = torch.arange(12.0).reshape(4, 3)


def twice(x: Tensor) -> Tensor:
    return x * 2


def thrice(x: Tensor) -> Tensor:
    return x * 3


twice_op, thrice_op = dc.register_op(twice), dc.register_op(thrice)


def mode_with(backend: Any, **options: Any) -> dc.DispatchCompileMode:
    return dc.DispatchCompileMode(config=dc.CompileConfig(backend=backend, **options), trace=True)


def call(mode: dc.DispatchCompileMode, op: dc.IrOp, x: Tensor = X) -> None:
    with mode:
        assert op(x).equal(op.impls["native"].func_impl_fn(x))


def told(mode: dc.DispatchCompileMode) -> list[str]:
    """What became of the calls, as ``compiled, new`` or the reason why not."""
    made = {True: "compiled, new", False: "compiled, reused"}
    return [event.reason or made[event.new] for event in mode.trace.events]


def in_a_forked_child(report: Callable[[], Any]) -> Any:
    """What ``report()`` returns in a child, which is ended if it hangs."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(200)
        os.write(writable, json.dumps(report()).encode())
        os._exit(0)
    os.close(writable)
    with open(readable) as pipe:
        reported = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    return json.loads(reported)


def busy_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def warm_and_new() -> Any:
    """The child calls what its parent compiled, and compiles; both with Inductor, which has threads of its own."""
    mode = mode_with("inductor")
    call(mode, twice_op)

    def report() -> Any:
        mode.trace.clear()
        call(mode, twice_op)
        call(mode, thrice_op)
        call(mode, thrice_op)
        return told(mode), asdict(mode.cache.stats())

    return in_a_forked_child(report), asdict(mode.cache.stats())


def while_compiling() -> Any:
    """Another thread compiles, and the fork waits for it."""
    backend = GatedBackend()
    backend.gate.set()
    mode = mode_with(backend)
    call(mode, twice_op)
    backend.gate.clear()
    compiling = busy_thread(lambda: call(mode, thrice_op))
    backend.begun.wait()
    threading.Timer(1.0, backend.gate.set).start()

    def report() -> Any:
        mode.trace.clear()
        for tokens in (4, 4, 1):
            call(mode, twice_op, X[:tokens])
        return told(mode)

    reported = in_a_forked_child(report)
    compiling.join()
    call(mode, thrice_op)
    return reported, told(mode)[-1]


def while_compiling_for_long() -> Any:
    """Another thread compiles, and does not end."""
    _fork.SECONDS_TO_WAIT = 0.1
    backend = GatedBackend()
    backend.gate.set()
    mode = mode_with(backend)
    call(mode, twice_op)
    backend.gate.clear()
    compiling = busy_thread(lambda: call(mode, thrice_op))
    backend.begun.wait()

    def report() -> Any:
        mode.trace.clear()
        call(mode, twice_op)
        call(mode, twice_op, X[:1])
        call(mode, thrice_op)
        return told(mode)

    reported = in_a_forked_child(report)
    backend.gate.set()
    compiling.join()
    call(mode, thrice_op)
    return reported, told(mode)[-1]


library = Library("fork_program", "FRAGMENT")
library.define("copied(Tensor x) -> Tensor")
library_op = torch.ops.fork_program.copied


def while_locks_are_held() -> Any:
    """Another thread holds every lock that a call, or a new mode, takes for a moment."""
    mode, held, release = mode_with("eager"), threading.Event(), threading.Event()
    call(mode, twice_op)

    def hold() -> None:
        with ExitStack() as all_of_them:
            for lock in locks_of_the_package():
                all_of_them.enter_context(lock)
            held.set()
            release.wait()

    busy_thread(hold)
    held.wait()

    def report() -> Any:
        mode.trace.clear()
        call(mode, twice_op)
        dc.register_op(copied)
        dc.register_native(library_op, copied).remove()
        other = mode_with("eager", on_new="background")
        call(other, thrice_op)
        assert other.cache.wait(60)
        call(other, thrice_op)
        return told(mode), told(other)

    reported = in_a_forked_child(report)
    release.set()
    return reported


def copied(x: Tensor) -> Tensor:
    return x.clone()


def in_the_background() -> Any:
    """The parent has a thread that compiles in the background, with work to do; the child has its own."""
    release = threading.Event()
    mode = mode_with("eager", on_new="background")
    call(mode, twice_op)
    assert mode.cache.wait(60)
    _background.ask(mode, "kept busy", lambda: release.wait)
    call(mode, thrice_op)

    def report() -> Any:
        mode.trace.clear()
        call(mode, twice_op)
        call(mode, thrice_op)
        assert mode.cache.wait(60)
        call(mode, thrice_op)
        return told(mode)

    reported = in_a_forked_child(report)
    release.set()
    return reported


MODE = mode_with("eager")


def report_of_a_process(reports: Any) -> None:
    MODE.trace.clear()
    call(MODE, twice_op)
    call(MODE, thrice_op)
    reports.put(told(MODE))


def with_multiprocessing() -> Any:
    call(MODE, twice_op)
    found = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        reports = context.SimpleQueue()
        process = context.Process(target=report_of_a_process, args=[reports])
        process.start()
        found[method] = reports.get()
        process.join()
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)  # in the child of a process in which it ran on several, GNU's OpenMP hangs by itself
    print(json.dumps(globals()[sys.argv[1]]()))
