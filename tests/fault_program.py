"""Programs for fresh processes, in which Inductor meets a fault. ``test_faults.py`` runs them, each by its name, and
reads what they print."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import dispatch_compile as dc


def scaled(x: Tensor) -> Tensor:
    strike_in("capture")
    return x * 3 + 1


OP = dc.register_op(scaled)
X = torch.randn(4, 32)
MODE = dc.DispatchCompileMode(config=dc.CompileConfig(on_failure="native"))
warnings.simplefilter("error", dc.DispatchCompileWarning)


def call(x: Tensor = X, mode: dc.DispatchCompileMode = MODE) -> str:
    """What becomes of a call: the warning's text, ``"interrupted"``, or ``"native"`` or ``"compiled"``."""
    hits = mode.cache.stats().hits
    try:
        with mode:
            torch.testing.assert_close(OP(x), x * 3 + 1)
    except dc.DispatchCompileWarning as warning:
        return str(warning)
    except KeyboardInterrupt:
        return "interrupted"
    return "native" if mode.cache.stats().hits == hits else "compiled"


def table(mode: dc.DispatchCompileMode = MODE) -> Any:
    return mode.cache.table(OP, OP.impls["native"], mode.config)


def end_the_pause() -> None:
    """Come to the time when the next call tries again."""
    table().postponed = replace(table().postponed, until=0.0)


def told(*calls: str) -> Any:
    """The calls, the counts, and how many specializations and guards there are."""
    return calls, asdict(MODE.cache.stats()), table().size, len(table().guarded)


def fails() -> Any:
    """Whatever the environment has in store for Inductor, which does not pass."""
    return told(call(), call())


def fails_without_triton() -> Any:
    sys.modules["triton"] = None
    x = X.cuda()
    return told(call(x), call(x))


def folder_that_cannot_be_written() -> Any:
    first = call(), call()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[2]
    meanwhile = call()
    end_the_pause()
    return told(*first, meanwhile, call(), call())


def full_disk() -> Any:
    """A folder is a small tmpfs that is full, from the start or when the C++ compiler starts, and then a bigger one."""
    folder, when = sys.argv[2:]
    fill = functools.partial(fill_up, f"{folder}/filler")
    if when == "at once":
        fill()
    else:
        sys.addaudithook(lambda event, args: fill() if starts_cpp_compiler(event, args) else None)
    first = call(), call()
    end_the_pause()
    again = call(), call()  # a second failure is not warned of
    subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
    end_the_pause()
    return told(*first, *again, call(), call())


def fill_up(path: str) -> None:
    """Write until the disk is full; once."""
    with suppress(OSError), open(path, "xb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def starts_cpp_compiler(event: str, args: tuple[Any, ...]) -> bool:
    """Whether Inductor is about to have a kernel compiled."""
    return event == "subprocess.Popen" and any("main.cpp" in str(word) for word in args[1])


def files_of_limited_size() -> Any:
    """No file may get longer than a byte, for a while."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    first = call(), call()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    end_the_pause()
    return told(*first, call(), call())


# ---- Ctrl-C

_where: str | None = None


def strike_in(place: str, strike: Callable[[], None] = lambda: signal.raise_signal(signal.SIGINT)) -> None:
    """SIGINT, with Python's own handler, if it is to strike here."""
    global _where
    if place == _where:
        _where = None
        strike()


def strike_from_a_thread() -> None:
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()


def on_audit_event(event: str, args: tuple[Any, ...]) -> None:
    """Where Inductor writes a file, and where it runs the C++ compiler, first of all to see what that can do; kernels
    may be compiled on another thread, which an interruption does not end."""
    if event == "open" and str(args[0]).startswith(os.environ["TORCHINDUCTOR_CACHE_DIR"]) and args[1] == "w":
        strike_in("writing")
    if event == "subprocess.Popen" and "-shared" in map(str, args[1]):
        strike_in("starting the C++ compiler")
        strike_in("waiting for the C++ compiler", strike_from_a_thread)


def interrupted() -> Any:
    global _where
    # A process that a shell started in the background ignores the signal, unless it asks for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(on_audit_event)
    found: dict[str, Any] = {}
    for place in ("capture", "writing", "starting the C++ compiler", "waiting for the C++ compiler"):
        _where = place
        found[place] = told(call())
        # On another thread, lest a lock that is held lets this one pass.
        eager = dc.DispatchCompileMode(config=dc.CompileConfig(backend="eager"))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(call, X, eager).result(60) == "compiled"
    return found, told(call(), call())


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
