"""Children of a process that compiles: they hang at nothing, run what was compiled, and compile what is new."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import fork_program
import pytest
import torch
from locks import import_the_package, locks_in, locks_of_the_package
from support import EAGER

import dispatch_compile as dc
from dispatch_compile._basics import fork as _fork
from dispatch_compile._cache import cache as _cache

pytestmark = [pytest.mark.run_once, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

NEW, REUSED = "compiled, new", "compiled, reused"


def result_of(program: str, folder: Path) -> Any:
    """What one of the programs printed; Inductor's cache on disk is empty when it starts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, fork_program.__file__, program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_child_runs_what_was_compiled_and_compiles_what_is_new(tmp_path):
    (told, childs_stats), parents_stats = result_of("warm_and_new", tmp_path)
    assert told == [REUSED, NEW, REUSED]
    assert childs_stats == {"compiles": 2, "hits": 4, "fallbacks": 0, "asides": 0, "loads": 0}
    assert parents_stats == {"compiles": 1, "hits": 1, "fallbacks": 0, "asides": 0, "loads": 0}


def test_a_fork_waits_for_what_another_thread_compiles(tmp_path):
    childs, parents = result_of("while_compiling", tmp_path)
    assert childs == [REUSED, REUSED, NEW]
    assert parents == REUSED


def test_a_child_of_a_process_that_is_still_compiling_runs_eagerly_what_is_new(tmp_path):
    childs, parents = result_of("while_compiling_for_long", tmp_path)
    forked = "the process was forked while another thread compiled"
    assert childs == [REUSED, forked, forked]
    assert parents == REUSED


def test_a_child_has_no_lock_that_nobody_frees(tmp_path):
    assert result_of("while_locks_are_held", tmp_path) == [[REUSED], ["is being compiled in the background", REUSED]]


def test_a_child_compiles_in_a_background_of_its_own(tmp_path):
    assert result_of("in_the_background", tmp_path) == [REUSED, "is being compiled in the background", REUSED]


def test_processes_of_multiprocessing(tmp_path):
    assert result_of("with_multiprocessing", tmp_path) == {"fork": [REUSED, NEW], "spawn": [NEW, NEW]}


# ---- Locks: a child finds free what another thread held


def test_every_lock_of_the_package_is_freed_in_children(counted):
    """Whoever adds a lock, and does not make it with ``freed_in_children``, gets to know here."""
    import_the_package()
    mode = dc.DispatchCompileMode(config=EAGER, trace=True)
    with mode:
        counted(torch.ones(4, 3))
    found = locks_of_the_package()
    assert {id(lock) for lock in (mode.trace._lock, mode._sync_lock, _cache.lock)} <= set(map(id, found))
    assert len(found) >= 9
    not_freed = [lock for lock in found if lock not in _fork._locks]
    assert not_freed == [], [gc.get_referrers(lock) for lock in not_freed]


MODULE_WITH_LOCKS = """
import collections, functools, queue, threading, weakref
in_module = threading.Lock()
nested = {"a": [(1, {"b": collections.deque([threading.RLock()])})]}
waits = threading.Condition()
waiting = queue.Queue()
def closes_over(lock=threading.Lock()):
    in_closure = threading.Lock()
    def inner():
        return in_closure
    return functools.partial(inner)
closed = closes_over()
class Holder:
    of_class = threading.Lock()
    __slots__ = ("own",)
    def __init__(self):
        self.own = threading.Lock()
class Other:
    @functools.wraps(closed)
    def method(self): ...
    def __init__(self):
        self.__dict__["own"] = threading.RLock()
others = weakref.WeakSet()
"""


def test_locks_are_found_wherever_they_are():
    module = types.ModuleType("module_with_locks")
    exec(MODULE_WITH_LOCKS, vars(module))
    sys.modules[module.__name__] = module
    try:
        held = [module.Holder(), module.Other()]
        found = list(locks_in([module.__name__]))
    finally:
        del sys.modules[module.__name__]
    expected = [
        module.in_module,
        module.nested["a"][0][1]["b"][0],
        module.waits._lock,
        module.waiting.mutex,
        module.closes_over.__defaults__[0],
        module.closed(),
        module.Holder.of_class,
        *(thing.own for thing in held),
    ]
    assert set(map(id, expected)) == set(map(id, found))
